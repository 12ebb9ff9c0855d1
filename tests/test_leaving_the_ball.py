"""Weights that something moves out of their balls after the projection: said, with the remedy; and no false alarm."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import DiGraPCallback, FTPCallback, L2SPCallback, SPDCallback, TPGMCallback, constrain
from lightning_tpgm.methods import FTP, TPGM
from lightning_tpgm.observing.leaving import Leaving
from properties import distances
from toys import ByHand, Sharp, Toy, quiet_trainer, toy, train_loader, val_loader

try:
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:  # older releases
    WeightAveraging = None

LEFT = "is outside of its ball"
METHODS: dict[str, Callable[..., Any]] = {"tpgm": TPGMCallback, "ftp": FTPCallback}


def pretrained(optimizer: Any = None) -> Toy:
    """A toy that does not look as if nobody had trained it."""
    module = toy(0, optimizer)
    with torch.no_grad():
        module.norm.weight.copy_(torch.linspace(0.9, 1.1, 12))
    return module


def said(*callbacks: pl.Callback, module: Any = None, **options: Any) -> list[str]:
    """What our package warns of in a fit, but for what it says of the data."""
    module = pretrained() if module is None else module
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaders = options.pop("loaders", (train_loader(), val_loader()))
        resume = options.pop("resume", None)
        trainer = quiet_trainer(*callbacks, **{"max_epochs": 3, "log_every_n_steps": 1, **options})
        trainer.fit(module, *loaders, ckpt_path=resume)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "Callback: " in text]


class At(pl.Callback):
    """Calls a function of the module in one hook."""

    def __init__(self, hook: str, function: Callable[[Any], None]) -> None:
        setattr(self, hook, lambda trainer, pl_module, *_: function(pl_module))


# --- masks


def mask(module: Toy) -> None:
    module.hidden.weight.data[:, ::2] = 0


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_end", "on_train_epoch_end"])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_mask_is_said_once(make: Any, hook: str) -> None:
    """Between steps a look before the second step finds it, after the last one a look at the end of the fit."""
    (text,) = said(make(), At(hook, mask), max_epochs=1 if hook == "on_train_epoch_end" else 3)
    assert text.startswith(f"{make.__name__}: 'hidden.weight' {LEFT}, at a distance of ")
    assert "(1 of 1 such tensors)" in text
    assert "`exclude`: ['hidden.weight']" in text


def in_place(module: Toy) -> None:
    with torch.no_grad():
        module.hidden.weight[:, ::2] = 0


def for_good(module: Toy) -> None:
    prune.l1_unstructured(module.hidden, "weight", amount=0.5)
    prune.remove(module.hidden, "weight")


@pytest.mark.parametrize("write", [in_place, for_good])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_a_single_write_in_mid_run_is_said(make: Any, write: Any) -> None:
    """The next projection takes it back, so that no later look would find it."""
    steps: list[int] = []

    def once(module: Any) -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            write(module)

    (text,) = said(make(), At("on_train_batch_end", once))
    assert f"'hidden.weight' {LEFT}" in text
    assert len(steps) > 4


def inside(module: Any) -> None:
    with torch.no_grad():
        module.hidden.weight.mul_(1)


def test_writes_inside_the_ball_are_no_alarm() -> None:
    assert said(TPGMCallback(), At("on_train_batch_end", inside)) == []


@pytest.mark.parametrize("write", [lambda module: None, in_place, inside], ids=["nothing", "mask", "inside"])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_looks_are_few(make: Any, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost a pass over memory: one at the start, one at the end, and none for what the steps write or was said."""
    looks: list[Any] = []
    look = Leaving.look

    def counted(leaving: Leaving, *args: Any) -> None:
        looks.append(leaving)
        look(leaving, *args)

    monkeypatch.setattr(Leaving, "look", counted)
    said(make(), At("on_train_batch_end", write))
    assert len(looks) == 2


def test_a_mask_between_steps_is_said_before_the_fit_ends() -> None:
    """And where the logs are due, not later."""
    seen: list[int] = []

    class When(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            mask(pl_module)

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(sum(LEFT in str(warning.message) for warning in caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(TPGMCallback(), When(), log_every_n_steps=1).fit(pretrained(), train_loader(), val_loader())
    assert seen == [0, 0, 1, 1, 1, 1]


def test_the_distance_and_radius_that_are_said() -> None:
    module, callback = pretrained(), TPGMCallback()
    (text,) = said(callback, At("on_train_end", mask), module=module)
    anchor = callback.anchor["hidden.weight"]
    distance = max(distances(module.hidden.weight.detach().double() - anchor.double(), "mars"))
    assert f"at a distance of {distance:.3g} with a radius of " in text


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_model_pruning_is_said(make: Any) -> None:
    """It makes its masks permanent when the fit ends; until then the weights themselves are in their ball."""
    module = pretrained()
    pruning = ModelPruning(
        "l1_unstructured", [(module.hidden, "weight")], amount=0.5, use_lottery_ticket_hypothesis=False
    )
    (text,) = said(make(), pruning, module=module, max_epochs=2)
    assert f"'hidden.weight' {LEFT}" in text
    assert "Pruning masks" in text


def test_live_masks_from_before_the_fit_are_no_alarm() -> None:
    """What is constrained is `weight_orig`, which the mask leaves alone."""
    module, callback = pretrained(), TPGMCallback()
    prune.l1_unstructured(module.hidden, "weight", amount=0.5)
    assert said(callback, module=module) == []
    assert "hidden.weight_orig" in callback.radii
    assert float((module.hidden.weight == 0).double().mean()) == 0.5


def test_permanent_masks_from_before_the_fit_are_no_alarm() -> None:
    module = pretrained()
    prune.l1_unstructured(module.hidden, "weight", amount=0.5)
    prune.remove(module.hidden, "weight")
    assert said(TPGMCallback(), module=module) == []


# --- embeddings


class Words(pl.LightningModule):
    """An embedding, or a bag of them, under a linear layer."""

    def __init__(self, kind: Any = nn.Embedding, size: float = 0.5, lr: float = 0.5, **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words = kind(10, 4, **{"max_norm": 1.0, **options})
            self.out = nn.Linear(4, 2)
            with torch.no_grad():
                weight = self.words.weight
                weight.mul_(size / weight.norm(dim=1, keepdim=True))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, y = batch
        found = self.words(ids)
        return (self.out(found.mean(dim=1) if found.dim() == 3 else found) - y).square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def words_loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)

    def loader(n: int) -> DataLoader[Any]:
        ids = torch.randint(10, (n, 3), generator=generator)
        return DataLoader(TensorDataset(ids, 3 * torch.randn(n, 2, generator=generator)), 4)

    return loader(24), loader(12)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_anchors_longer_than_max_norm_are_said_before_the_first_step(kind: Any) -> None:
    texts = said(TPGMCallback(), module=Words(kind, size=2.0), loaders=words_loaders(), num_sanity_val_steps=0)
    assert texts[0] == (
        "TPGMCallback: The pretrained values of 10 of 10 rows of 'words.weight' (max_norm=1) are longer than max_norm:"
        " the layer shortens the rows that it looks up, which takes them out of their ball. Leave out max_norm, or use"
        " `exclude` = ['words.weight']."
    )
    assert LEFT in texts[1]
    assert len(texts) == 2


def test_what_the_warning_of_max_norm_says_helps() -> None:
    options = {"loaders": words_loaders(), "num_sanity_val_steps": 0}
    assert said(TPGMCallback(exclude=["words.weight"]), module=Words(size=2.0), **options) == []
    assert said(TPGMCallback(), module=Words(size=2.0, max_norm=None), **options) == []


def test_shortening_towards_short_anchors_stays_in_an_l2_ball() -> None:
    """To shorten a row is a projection onto a ball that holds the anchor's row: it comes no farther from there."""
    module = Words(size=0.9, lr=5.0)
    assert said(TPGMCallback(norm="l2", radius_lr=1.0), module=module, loaders=words_loaders()) == []
    assert float(module.words.weight.detach().norm(dim=1).max()) > 0.99  # there was something to shorten


def test_methods_without_radii_say_nothing() -> None:
    for make in (L2SPCallback, SPDCallback, DiGraPCallback):
        assert said(make(), module=Words(size=2.0), loaders=words_loaders(), num_sanity_val_steps=0) == []
        assert said(make(), At("on_train_end", mask)) == []


# --- no false alarms

PLAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-true"},
    "fp64": {"precision": "64-true"},
    "mixed": {"precision": "bf16-mixed"},
    "clipping": {"gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_nothing_is_said_of_an_ordinary_fit(
    make: Any, norm: Any, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leaving, "EVERY", 2)
    assert said(make(norm=norm, radius_lr=0.1), **options) == []


def test_what_ftp_leaves_out_has_no_radius_and_is_no_alarm() -> None:
    module = pretrained()
    module.unused = nn.Parameter(torch.zeros(3))  # it has no gradient, and is away from its anchor
    callback = FTPCallback(pretrained={**module.state_dict(), "unused": torch.ones(3)})
    assert said(callback, module=module) == []
    assert math.isnan(callback.radii["unused"])
    assert module.unused.tolist() == [0, 0, 0]


def test_nothing_is_said_of_radii_at_the_end() -> None:
    assert said(TPGMCallback(when="fit_end", radius_steps=3)) == []
    (text,) = said(TPGMCallback(when="fit_end", radius_steps=3), At("on_train_end", mask))
    assert LEFT in text


def averaging() -> list[pl.Callback]:
    found: list[pl.Callback] = [StochasticWeightAveraging(0.05, swa_epoch_start=1, device=None)]
    if WeightAveraging is not None:
        found.append(WeightAveraging())
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("index", range(len(averaging())))
@pytest.mark.parametrize("first", [True, False])
def test_averages_of_earlier_weights_are_no_alarm(index: int, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the radii have shrunk, so that the average is outside of the last ball."""
    monkeypatch.setattr(Leaving, "EVERY", 2)
    tpgm, average, module = TPGMCallback(radius_lr=1e-4), averaging()[index], pretrained()
    module.backbone[1] = nn.Identity()  # for BatchNorm's sake an SWA adds an epoch, whose one step projects the average

    class Shrink(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 4:
                tpgm._constraint.method.radii.value.mul_(1e-3)

    callbacks = [Shrink(), *([average, tpgm] if first else [tpgm, average])]
    assert not [text for text in said(*callbacks, module=module, max_epochs=5) if LEFT in text]
    anchor = tpgm.anchor["hidden.weight"]
    distance = max(distances(module.hidden.weight.detach().double() - anchor.double(), "mars"))
    assert distance > 2 * tpgm.radii["hidden.weight"]


def test_best_weights_that_come_back_are_no_alarm(tmp_path: Any) -> None:
    module, saved = pretrained(), {}

    def keep(module: Any) -> None:
        saved.setdefault("best", {name: value.clone() for name, value in module.state_dict().items()})

    back = At("on_train_end", lambda module: module.load_state_dict(saved["best"]))
    assert said(TPGMCallback(), At("on_train_epoch_end", keep), back, module=module) == []


@pytest.mark.parametrize("moves", [True, False])
def test_frozen_layers_are_said_only_if_they_have_left(moves: bool) -> None:
    """Here it is a callback that moves them."""

    class Freeze(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.hidden.requires_grad_(trainer.current_epoch == 0)

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if moves and trainer.current_epoch > 0:
                pl_module.hidden.weight.data.add_(0.05)

    texts = said(TPGMCallback(), Freeze())
    assert [LEFT in text and "'hidden.weight'" in text for text in texts] == ([True] if moves else [])


class Twice(torch.optim.SGD):
    """Evaluates the closure again, far away, as sharpness-aware optimizers and line searches do."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        kept = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1.0)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        super().step()
        return loss


def test_closures_at_other_weights_are_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaving, "EVERY", 2)
    assert said(TPGMCallback(), module=pretrained(lambda parameters: Twice(parameters, lr=0.05))) == []


def beside(parameters: Any) -> torch.optim.Optimizer:
    return Sharp(parameters, lr=0.05)


@pytest.mark.parametrize("masked", [True, False])
def test_a_closure_that_is_called_at_other_weights_at_first_is_no_alarm(masked: bool) -> None:
    """In manual optimization; what was written before the step is one."""
    callbacks = (TPGMCallback(loss="validation_step"), At("on_train_batch_end", mask if masked else lambda _: None))
    texts = [text for text in said(*callbacks, module=ByHand(beside)) if LEFT in text]
    assert ["'hidden.weight'" in text for text in texts] == ([True] if masked else [])


def test_a_closure_that_is_called_at_other_weights_at_first_is_no_alarm_in_a_plain_loop() -> None:
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    optimizer = beside(model.parameters())

    def closure() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()

    constraint = constrain(model, FTP(), optimizer)
    for _ in range(3):
        optimizer.step(closure)
    constraint.remove()


def test_a_resumed_run_knows_the_earlier_radii(tmp_path: Any) -> None:
    trainer = quiet_trainer(TPGMCallback(radius_lr=1e-4), max_epochs=1)
    trainer.fit(pretrained(), train_loader(), val_loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed, module = TPGMCallback(radius_lr=1e-4), pretrained()

    def shrink(module: Any) -> None:
        resumed._constraint.method.radii.value.mul_(1e-3)

    def back(module: Any) -> None:
        module.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])

    changes = At("on_train_start", shrink), At("on_train_end", back)
    assert said(resumed, *changes, module=module, max_epochs=2, resume=tmp_path / "a.ckpt") == []


def test_rounding_is_no_alarm() -> None:
    """An average is stored in the weights' dtype: each entry may move by a unit in its last place."""

    def store(module: Any) -> None:
        weight = module.hidden.weight.data
        weight.copy_(torch.nextafter(weight, torch.full_like(weight, torch.inf)))

    assert said(TPGMCallback(radius_lr=1e-4), At("on_train_end", store), precision="bf16-true") == []


def test_weights_on_another_device_are_left_alone() -> None:
    """An export may have moved the module when the fit ends; what cannot be measured raises no error."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("Expected all tensors to be on the same device")

    callback = TPGMCallback()
    measured = At("on_train_end", lambda module: setattr(callback._constraint.tensors, "distance", broken))
    assert said(callback, measured, At("on_train_end", mask)) == []


def test_a_write_in_the_training_step_is_said() -> None:
    """Lightning's closure calls it, after the step has begun."""

    class Writes(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                self.hidden.weight.data.add_(1.0)
            return super().training_step(batch, batch_idx)

    texts = said(TPGMCallback(), module=Writes())
    assert [f"'hidden.weight' {LEFT}" in text for text in texts if LEFT in text] == [True]


# --- plain loops


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("method", [TPGM, FTP])
def test_a_plain_loop_is_told_when_the_constraint_is_removed(method: Any, masked: bool) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> Tensor:
        return (model(x) - y).square().mean()

    constraint = constrain(model, method(), optimizer, held_out_loss=loss if method is TPGM else None)
    for _ in range(5):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if masked:
            model.weight.data[:, 0] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        constraint.remove()
    texts = [str(warning.message) for warning in caught]
    assert [text.startswith(f"{method.__name__}: 'weight' {LEFT}") for text in texts] == ([True] if masked else [])


# --- tensors that are split over processes

SPLIT = """
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_tpgm import constrain
from lightning_tpgm.methods import FTP
from lightning_tpgm.observing.leaving import Leaving
from toys import leave_group

Leaving.EVERY = 2
mesh = init_device_mesh("cpu", (2,))
for kind in ("fsdp2", "tensor_parallel"):
    for masked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        x, y = torch.randn(8, 4), torch.randn(8, 2)
        if kind == "fsdp2":
            fully_shard(model, mesh=mesh)
        else:
            parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        constraint = constrain(model, FTP(), optimizer)
        for _ in range(6):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        if masked and dist.get_rank() == 0:  # one process' part alone
            model[0].weight.to_local().data.zero_()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            constraint.remove()
        said = ["is outside of its ball" in str(warning.message) for warning in caught]
        with open(f"rank-{dist.get_rank()}.txt", "a") as file:
            print(kind, masked, said, file=file)
leave_group()
"""


@pytest.mark.slow
def test_split_tensors_are_measured_together(tmp_path: Path) -> None:
    """All processes look at the same moments, and all know what is outside on any of them."""
    (tmp_path / "worker.py").write_text(SPLIT)
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "worker.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [tests.parent, tests]))}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = [
        f"{kind} {masked} {[True] if masked else []}"
        for kind in ("fsdp2", "tensor_parallel")
        for masked in (False, True)
    ]
    for rank in (0, 1):
        assert (tmp_path / f"rank-{rank}.txt").read_text().splitlines() == expected
