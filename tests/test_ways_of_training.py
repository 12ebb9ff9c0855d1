"""Projects as they are found: modules, data and trainers of many kinds, with the callback added and nothing changed.

What is tested elsewhere: LBFGS, accumulation, fused optimizers, gradient scalers, manual optimization and GANs in
test_steps.py; clipping, precisions, thawing, several optimizers and reuse for every method in test_contract.py; tied
weights and two callbacks in test_combining.py and test_contract.py; weights that are made in configure_model or loaded
in setup() in test_anchor.py; Ctrl-C, exceptions and LearningRateFinder in test_resume.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import lightning.pytorch.callbacks as pl_callbacks
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_tpgm import TPGMCallback, WiSEFTCallback
from lightning_tpgm.callbacks.method import MethodCallback
from properties import assert_inside_balls, assert_same
from toys import CLASSES, AfterEachStep, Blobs, Classifier, blobs, seed_everything, trainer_in, weights_of

EMA = getattr(pl_callbacks, "EMAWeightAveraging", None)
NEEDS_EMA = pytest.mark.skipif(EMA is None, reason="this lightning has no WeightAveraging")


def fit(tmp_path: Path, module: Any, *callbacks: pl.Callback, data: Any = None, **settings: Any) -> pl.Trainer:
    """Two epochs from the same seeds every time."""
    seed_everything(0)
    trainer = trainer_in(tmp_path, **{"max_epochs": 2, "callbacks": list(callbacks), **settings})
    trainer.fit(module, data or Blobs())
    return trainer


# --- modules ---


class WeightNorm(Classifier):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.head)


class SpectralNorm(Classifier):
    """Its forward changes two buffers in train mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            parametrizations.spectral_norm(self.backbone[0])


class TiedEmbedding(Classifier):
    """One table reads tokens and scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, 8)
        nn.init.eye_(self.table.weight)
        del self.head
        self.scores = nn.Linear(8, CLASSES, bias=False)
        self.scores.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.backbone(x) + self.table(x.argmax(dim=1) % CLASSES))


class Checkpointed(Classifier):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.backbone, x.requires_grad_(), use_reentrant=self.use_reentrant)
        return self.head(hidden)


class Quantised(Classifier):
    """An int8 layer with its scale as a frozen buffer, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.arange(8 * 8).reshape(8, 8).remainder(7).sub(3).to(torch.int8)
        self.quantised = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        return self.head(self.backbone(x) @ (self.quantised * self.scale))


class StepsItsScheduler(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Lightning's own stepping is switched off."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx % 2 and self.training:
            self.lr_schedulers().step()
        return super().training_step(batch, batch_idx)


class Freezing(Classifier):
    """Trains its head in the first epoch, its backbone in the second."""

    def on_train_epoch_start(self) -> None:
        second = self.current_epoch == 1
        self.backbone.requires_grad_(second)
        self.head.requires_grad_(not second)


class AsksItsTrainer(Classifier):
    """Needs the trainer in its step, and logs as for several processes."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
        assert self.trainer.training
        assert self.trainer.train_dataloader is not None
        loss = self.loss(batch) * (1 + progress)
        self.log("loss", loss, sync_dist=True, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        self.log_dict({"progress": progress}, sync_dist=True)
        return {"loss": loss, "logits": self(batch[0]).detach()}


def compiled_submodule() -> Classifier:
    module = Classifier()
    module.backbone = torch.compile(module.backbone, backend="aot_eager")  # the backend that needs no compiler
    return module


class Silent(Classifier):
    """Logs nothing: `self.log` within a compiled step fails in torch and Lightning themselves."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)


def compiled_module() -> Any:
    return torch.compile(Silent(), backend="aot_eager")


MODULES: dict[str, Callable[[], Any]] = {
    "plain": Classifier,
    "weight norm": WeightNorm,
    "spectral norm": SpectralNorm,
    "tied embedding": TiedEmbedding,
    "checkpointing, reentrant": lambda: Checkpointed(True),
    "checkpointing, not reentrant": lambda: Checkpointed(False),
    "compiled submodule": compiled_submodule,
    "compiled module": compiled_module,
    "quantised": Quantised,
    "steps its scheduler": StepsItsScheduler,
    "stages": Freezing,
    "asks its trainer": AsksItsTrainer,
}
CONSTRAINED = {
    "weight norm": {f"head.parametrizations.weight.original{i}" for i in (0, 1)},
    "spectral norm": {"backbone.0.parametrizations.weight.original"},
    "tied embedding": {"table.weight"},
}


def inner(module: Any) -> pl.LightningModule:
    """The module that a compiled one wraps."""
    return getattr(module, "_orig_mod", module)


def clean(names: Any) -> set[str]:
    return {name.replace("_orig_mod.", "") for name in names}


@pytest.mark.parametrize("kind", MODULES)
def test_module_is_constrained(kind: str, tmp_path: Path) -> None:
    """Every floating-point parameter has its ball, which holds after every step, and the radii are learned."""
    module = MODULES[kind]()
    start = {name.replace("_orig_mod.", ""): value for name, value in weights_of(inner(module)).items()}
    looks: list[int] = []

    def look(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        looks.append(1)
        weights = {name.replace("_orig_mod.", ""): p for name, p in pl_module.named_parameters()}
        holder = nn.Module()
        holder.named_parameters = weights.items  # type: ignore[method-assign, assignment]
        assert_inside_balls(holder, start, callback.radii)

    callback = TPGMCallback()
    fit(tmp_path, module, callback, AfterEachStep(look))
    assert len(looks) == 8
    expected = {name: value for name, value in start.items() if value.is_floating_point()}
    assert callback.radii.keys() == expected.keys() >= CONSTRAINED.get(kind, set())
    assert_same({name: callback.anchor[name] for name in expected}, expected)
    assert all(radius > 0 for radius in callback.radii.values())
    assert all(distance > 0 for distance in callback.distances.values())


@pytest.mark.parametrize("kind", MODULES)
def test_module_is_evaluated_without_a_trace(kind: str, tmp_path: Path) -> None:
    """With nothing but an unused parameter to constrain, the run is the one without the callback, to the bit."""

    def run(*callbacks: TPGMCallback) -> dict[str, Any]:
        module = MODULES[kind]()
        inner(module).unused = nn.Parameter(torch.ones(2))
        for callback in callbacks:
            callback.exclude = tuple(clean(dict(inner(module).named_parameters())) - {"unused"})
        trainer = fit(tmp_path, module, *callbacks)
        metrics = {name: value for name, value in trainer.callback_metrics.items() if "tpgm" not in name}
        optimizer = trainer.optimizers[0].state_dict()
        return {"module": dict(inner(module).state_dict()), "metrics": metrics, "optimizer": optimizer}

    callback = TPGMCallback(every_n_steps=1)
    assert_same(run(callback), run())
    assert list(callback.radii) == ["unused"]
    assert callback.state_dict()["method"]["held_out"]["drawn"] == 8


def test_compiled_is_as_not_compiled(tmp_path: Path) -> None:
    """The same radii and weights, under the same names; a checkpoint of one resumes as the other."""
    found = {}
    for kind in ("plain", "compiled submodule", "compiled module"):
        module, callback = MODULES[kind](), TPGMCallback()
        fit(tmp_path, module, callback).save_checkpoint(tmp_path / f"{kind}.ckpt")
        found[kind] = list(weights_of(inner(module)).values()), callback.radii
    for kind, (weights, radii) in found.items():
        torch.testing.assert_close(weights, found["plain"][0], rtol=1e-5, atol=1e-6, msg=lambda m, k=kind: f"{k}: {m}")
        assert radii == pytest.approx(found["plain"][1], rel=1e-4, abs=1e-6)

    trainer = trainer_in(tmp_path, callbacks=[callback := TPGMCallback()], max_epochs=3)
    trainer.fit(MODULES["compiled module"](), Blobs(), ckpt_path=tmp_path / "plain.ckpt")
    assert callback.state_dict()["method"]["steps"] == {0: 12}


# --- batches ---


class Named(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Data:
    x: Tensor
    y: Tensor


class Custom:
    """What graph libraries have: an object that moves itself."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.moved = x, y, 0

    def to(self, device: Any) -> Custom:
        moved = Custom(self.x.to(device), self.y.to(device))
        moved.moved = self.moved + 1
        return moved


BATCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y},
    "named tuple": Named,
    "dataclass": Data,
    "custom class": Custom,
    "nested": lambda x, y: [{"x": x}, (y, ["text"] * len(y))],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batch_of_any_kind(kind: str, tmp_path: Path) -> None:
    """The same radii as with tuples, from the default held-out loader, which keeps the loader's `collate_fn`."""

    class OfBatches(Blobs):
        def loader(self, data: TensorDataset) -> DataLoader[Any]:
            return DataLoader(data, 8, collate_fn=lambda rows: BATCHES[kind](*default_collate(rows)))

        def train_dataloader(self) -> DataLoader[Any]:
            return self.loader(self.train)

        def val_dataloader(self) -> DataLoader[Any]:
            return self.loader(self.val)

    class Module(Classifier):
        def loss(self, batch: Any) -> Tensor:
            if kind == "nested":
                x, y = batch[0]["x"], batch[1][0]
            else:
                x, y = (batch["x"], batch["y"]) if kind == "dict" else (batch.x, batch.y)
            assert type(batch) is type(BATCHES[kind](x, y))
            assert getattr(batch, "moved", 1) == 1
            return cross_entropy(self(x), y)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)  # to log it, Lightning would ask for the batch size of a custom class

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)

    runs = []
    for module, data in ((Module(), OfBatches()), (Classifier(), Blobs())):
        callback = TPGMCallback()
        fit(tmp_path, module, callback, data=data)
        runs.append([weights_of(module), callback.radii])
    assert_same(runs[0], runs[1])


# --- trainers ---

TRAINERS: dict[str, tuple[dict[str, Any], int]] = {  # settings, number of optimizer steps
    "overfit_batches": ({"overfit_batches": 2}, 4),
    "fast_dev_run": ({"fast_dev_run": 2}, 2),
    "limit_val_batches=0": ({"limit_val_batches": 0}, 8),
    "no sanity check": ({"num_sanity_val_steps": 0}, 8),
    "max_steps": ({"max_steps": 3, "max_epochs": -1}, 3),
    "val_check_interval": ({"val_check_interval": 1}, 8),
    "clipping by norm": ({"gradient_clip_val": 0.1}, 8),
    "clipping by value": ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, 8),
    "detect_anomaly": ({"detect_anomaly": True}, 8),
    "barebones": ({"barebones": True}, 8),
    "inference_mode=False": ({"inference_mode": False}, 8),
    "reload_dataloaders": ({"reload_dataloaders_every_n_epochs": 1}, 8),
}


@pytest.mark.filterwarnings("ignore:You requested to overfit")
@pytest.mark.parametrize("setting", TRAINERS)
def test_trainer_setting(setting: str, tmp_path: Path) -> None:
    settings, steps = TRAINERS[setting]
    module, callback = Classifier(), TPGMCallback(every_n_steps=1)
    start = weights_of(module)
    if setting == "barebones":  # refuses these, even if they say that it should not
        trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=[callback], **settings)
        with pytest.warns(UserWarning, match=r"self.log\("):  # of the module's own logging
            trainer.fit(module, Blobs())
    else:
        fit(tmp_path, module, callback, **settings)
    assert callback.state_dict()["method"]["radii"]["step"].tolist() == [steps] * 4
    assert_inside_balls(module, start, callback.radii)
    assert all(not torch.equal(weight, start[name]) for name, weight in weights_of(module).items())


def test_a_barebones_trainer_is_told_nothing_to_log() -> None:
    """It warns of every call, and here the module makes none."""

    class Silent(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

    quick: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "limit_val_batches": 0}
    trainer = pl.Trainer(**quick, callbacks=[TPGMCallback()], barebones=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Silent(), Blobs())
    assert not any("barebones" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("when", ["training", "fit_end"])
def test_no_epoch_at_all(when: Any, tmp_path: Path) -> None:
    """Nothing was trained, so nothing is learned, changed or complained about; the callback serves another fit."""
    module, callback = Classifier(), TPGMCallback(when=when)
    start = weights_of(module)
    trainer = fit(tmp_path, module, callback, max_epochs=0)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert_same(weights_of(module), start)
    assert callback.radii == {}
    fit(tmp_path, module, callback)
    assert all(radius > 0 for radius in callback.radii.values())


def test_checkpoints_every_few_steps(tmp_path: Path) -> None:
    """Each holds weights inside the balls whose radii it holds."""
    module, callback = Classifier(lr=1.0), TPGMCallback()
    start = weights_of(module)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, module, saving, callback, enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 2
    for file in files:
        saved = torch.load(file, weights_only=True)
        (state,) = (value for key, value in saved["callbacks"].items() if "TPGM" in key)
        copy = Classifier()
        copy.load_state_dict(saved["state_dict"])
        radii = state["method"]["radii"]
        assert_inside_balls(copy, start, dict(zip(radii["names"], radii["value"].tolist(), strict=True)))


# --- other callbacks ---


class Resizable(Classifier):
    """Its batch size and learning rate can be tuned."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(blobs(32, seed=1), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(blobs(16, seed=2), 8)


def find_batch_size(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    Tuner(trainer).scale_batch_size(module, steps_per_trial=1, max_trials=2, init_val=2)


def find_lr(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    Tuner(trainer).lr_find(module, num_training=16, early_stop_threshold=None)


@pytest.mark.parametrize("way", ["BatchSizeFinder", find_batch_size, find_lr])
def test_tuning_before_the_fit(way: Any, tmp_path: Path) -> None:
    """The trials leave no trace: the fit is the one with what they found from the start."""
    finders = [BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=2)] if way == "BatchSizeFinder" else []
    module, callback = Resizable(), TPGMCallback()
    trainer = trainer_in(tmp_path, callbacks=[*finders, callback])
    if callable(way):
        way(trainer, module)
    seed_everything(0)
    trainer.fit(module)
    untuned = Resizable()
    assert (module.batch_size, module.lr) != (untuned.batch_size, untuned.lr)

    expected, reference = Resizable(), TPGMCallback()
    expected.batch_size, expected.lr = module.batch_size, module.lr
    seed_everything(0)
    trainer_in(tmp_path, callbacks=[reference]).fit(expected)
    assert_same(weights_of(module), weights_of(expected))
    assert_same(callback.state_dict(), reference.state_dict())


def largest_radii(seen: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(radii[name] for radii in seen) for name in seen[0]}


class Radii(pl.Callback):
    """Notes radii and weights after every batch."""

    def __init__(self, callback: TPGMCallback) -> None:
        self.callback = callback
        self.radii: list[dict[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.radii.append(self.callback.radii)
        self.weights.append(weights_of(pl_module))


@NEEDS_EMA
@pytest.mark.parametrize("first", [True, False], ids=["EMA first", "EMA last"])
def test_moving_average(first: bool, tmp_path: Path) -> None:
    """In either order it averages projected weights; the result is inside the largest ball that there was.

    (The last radius may be smaller than those of the weights that went into the average.)
    """
    module, callback = Classifier(), TPGMCallback()
    start, seen = weights_of(module), Radii(callback)
    average = EMA(decay=0.5)
    fit(tmp_path, module, *([average, callback] if first else [callback, average]), seen)
    expected = seen.weights[0]
    for weights in seen.weights[1:]:
        expected = {name: value.lerp(weights[name], 0.5) for name, value in expected.items()}
    torch.testing.assert_close(weights_of(module), expected, rtol=1e-5, atol=1e-7)
    assert_inside_balls(module, start, largest_radii(seen.radii))


@pytest.mark.parametrize("batch_norm", [True, False], ids=["BatchNorm", "no BatchNorm"])
@pytest.mark.parametrize("first", [True, False], ids=["SWA first", "SWA last"])
def test_stochastic_weight_averaging(first: bool, batch_norm: bool, tmp_path: Path) -> None:
    """As above. (The epoch that it adds for BatchNorm ends with one step without gradients, and a projection.)"""
    module, callback = Classifier(), TPGMCallback()
    if batch_norm:
        module.backbone.append(nn.BatchNorm1d(8))
    start, seen = weights_of(module), Radii(callback)
    average = StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2, annealing_epochs=1)
    fit(tmp_path, module, *([average, callback] if first else [callback, average]), seen, max_epochs=4)
    ends = [seen.weights[i] for i in (3, 7, 11)]  # it averages at the start of the epochs 1, 2 and 3
    expected = {name: sum(weights[name] for weights in ends) / 3 for name in start}
    torch.testing.assert_close(weights_of(module), expected, rtol=1e-5, atol=1e-7)
    assert_inside_balls(module, start, largest_radii(seen.radii))


AT_END: dict[str, Callable[[], MethodCallback]] = {
    "TPGM": lambda: TPGMCallback(when="fit_end", radius_steps=2),
    "WiSE-FT": lambda: WiSEFTCallback(alpha=0.0),
}


@pytest.mark.parametrize("average", [pytest.param("EMA", marks=NEEDS_EMA), "SWA"])
@pytest.mark.parametrize("first", [True, False], ids=["average first", "average last"])
@pytest.mark.parametrize("kind", AT_END)
def test_average_that_would_overwrite_what_a_method_does_at_the_end(
    kind: str, first: bool, average: str, tmp_path: Path
) -> None:
    """Listed before the method it is constrained, too; listed after it, a warning tells the remedy."""
    callback, module = AT_END[kind](), Classifier()
    averaging = EMA(decay=0.5) if average == "EMA" else StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    message = (
        rf"{type(averaging).__name__} writes .* after {type(callback).__name__}.*List {type(averaging).__name__} before"
    )
    with nullcontext() if first else pytest.warns(UserWarning, match=message):
        fit(tmp_path, module, *([averaging, callback] if first else [callback, averaging]))
    if first and isinstance(callback, TPGMCallback):
        assert_inside_balls(module, callback.anchor, callback.radii)
    elif first:
        assert_same(weights_of(module), weights_of(Classifier()))
