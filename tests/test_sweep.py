"""A sweep's tolerance: which alpha it chooses, its standard error, its place in a fit, its picture."""

from __future__ import annotations

import inspect
import math
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_tpgm import TPGMCallback, WiSEFTCallback, WiSEFTSweep, wise_ft_sweep
from lightning_tpgm.callbacks.standard_error import standard_error
from properties import assert_inside_ball, assert_same
from reference import wise_ft
from toys import (
    Blobs,
    Classifier,
    Toy,
    blobs,
    quiet_trainer,
    seed_everything,
    toy,
    train_loader,
    val_loader,
    weights_of,
)

NAN, INF = math.nan, math.inf
EXACT = {"rtol": 1e-6, "atol": 1e-7}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


# --- which alpha is chosen ---


@pytest.mark.parametrize(
    ("mode", "values", "tolerance", "chosen", "best"),
    [
        ("max", (0.5, 0.88, 0.92, 0.9), 0.05, 0.3, 0.6),
        ("min", (0.5, 0.12, 0.08, 0.1), 0.05, 0.3, 0.6),
        ("max", (0.5, 0.86, 0.92, 0.9), 0.05, 0.6, 0.6),
        ("max", (0.5, 0.92, 0.92, 0.9), 0.0, 0.3, 0.3),  # among equals the smallest, as ever
        ("max", (0.5, 0.92 - 1e-7, 0.92, 0.9), 0.0, 0.6, 0.6),  # nothing is forgiven without a tolerance
        ("max", (0.91, 0.5, 0.92, 0.9), 0.05, 0.0, 0.6),  # behind a dip
        ("max", (NAN, NAN, 0.92, 0.9), 0.5, 0.6, 0.6),
        ("min", (NAN, NAN, 0.92, 0.9), 0.5, 0.6, 1.0),
        ("max", (NAN, NAN, NAN, NAN), 0.5, 1.0, 1.0),  # nothing to choose by
        ("max", (0.5, 0.5, INF, INF), 0.5, 0.6, 0.6),
        ("min", (INF, 0.5, 0.4, INF), 0.5, 0.3, 0.6),
        ("max", (0.1, 0.2, 0.3, 0.4), 9.0, 0.0, 1.0),
    ],
)
def test_chosen_alpha(mode: Any, values: tuple[float, ...], tolerance: float, chosen: float, best: float) -> None:
    sweep = WiSEFTSweep("metric", mode, (0.0, 0.3, 0.6, 1.0), values, tolerance)
    assert (sweep.chosen_alpha, sweep.best_alpha) == (chosen, best)
    backwards = WiSEFTSweep("metric", mode, (1.0, 0.6, 0.3, 0.0), values[::-1], tolerance)
    assert (backwards.chosen_alpha, backwards.best_alpha) == (chosen, best)


def test_the_tolerance_is_met_by_what_is_that_much_worse_in_32_bits() -> None:
    """45 hits of 50 are 0.02 below 46 of 50, whatever the rounding."""
    for hits in range(2, 51):
        values = tuple(float(torch.tensor(n / 50)) for n in (hits - 2, hits - 1, hits))
        assert WiSEFTSweep("acc", "max", (0.0, 0.5, 1.0), values, 0.02).chosen_alpha == 0.5


# --- the sweep ---


class Scored(Toy):
    """Logs how far alpha, which the head's bias shows, is from 0.8."""

    ends = (0.0, 1.0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        start, end = self.ends
        alpha = (float(self.head.bias.detach()[0]) - start) / (end - start)
        self.log("distance", abs(alpha - 0.8))
        self.log("score", 1 - abs(alpha - 0.8))


@pytest.mark.parametrize(("monitor", "mode"), [("score", "max"), ("distance", "min")])
def test_a_sweep_leaves_the_module_at_the_chosen_alpha(monitor: str, mode: Any) -> None:
    pretrained, module = toy(0), Scored()
    module.load_state_dict(toy(1).state_dict())
    finetuned = state(module)
    module.ends = float(pretrained.head.bias.detach()[0]), float(module.head.bias.detach()[0])
    arguments = {"mode": mode, "tolerance": 0.35, "dataloaders": val_loader()}
    sweep = wise_ft_sweep(quiet_trainer(), module, pretrained, monitor, **arguments)
    assert (sweep.chosen_alpha, sweep.best_alpha, sweep.tolerance) == (0.5, 0.8, 0.35)
    expected = wise_ft(state(pretrained), finetuned, 0.5)
    torch.testing.assert_close(state(module), {n: v.to(finetuned[n].dtype) for n, v in expected.items()}, **EXACT)


BAD = [-0.1, NAN, INF, True, None, "one_standard_eror", [0.1]]


@pytest.mark.parametrize("tolerance", BAD)
def test_a_bad_tolerance(tolerance: Any) -> None:
    message = r"^`tolerance` should be a number of at least 0 or 'one_standard_error', found "
    with pytest.raises(MisconfigurationException, match=message):
        wise_ft_sweep(quiet_trainer(), toy(), toy(), "val_loss", tolerance=tolerance)
    with pytest.raises(MisconfigurationException, match=message):
        WiSEFTCallback(alpha="sweep", monitor="val_loss", tolerance=tolerance)


def test_all_processes_choose_by_the_first_ones_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is not synchronised differs between them; the weights may not."""
    trainer = quiet_trainer()
    heard: list[float] = []

    def broadcast(value: Any, src: int = 0) -> Any:
        if not isinstance(value, float):  # Lightning's own
            return value
        heard.append(value)
        return float(len(heard))

    monkeypatch.setattr(trainer.strategy, "broadcast", broadcast)
    sweep = wise_ft_sweep(trainer, toy(1), toy(), "val_loss", alphas=[0, 0.5, 1], dataloaders=val_loader())
    assert sweep.values == (1.0, 2.0, 3.0)
    assert len(heard) == 3


# --- the standard error ---


def test_standard_error_of_examples_is_the_textbooks() -> None:
    """Batches of one example: the sample's standard deviation over the root of its size."""
    sample = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = standard_error(float(sample.mean()), [(float(v), 1) for v in sample])
    assert found == pytest.approx(float(sample.std()) / math.sqrt(50))


def test_standard_error_from_batches_is_that_of_their_examples_on_average() -> None:
    """Unequal batches, too: over many draws the squares agree to their own noise of about two percent."""
    generator, sizes = torch.Generator().manual_seed(0), [7, 7, 7, 3]
    squares = []
    for _ in range(2000):
        draws = [torch.randn(n, dtype=torch.float64, generator=generator) for n in sizes]
        found = standard_error(float(torch.cat(draws).mean()), [(float(d.mean()), len(d)) for d in draws])
        assert found is not None
        squares.append(found**2)
    assert sum(squares) / len(squares) == pytest.approx(1 / 24, rel=0.06)


@pytest.mark.parametrize(
    ("value", "batches", "expected"),
    [
        (0.75, [(1.0, 4), (0.5, 4)], math.sqrt(0.75 * 0.25 / 8)),  # hits
        (0.75, [(0.75, 8)], math.sqrt(0.75 * 0.25 / 8)),  # in one batch
        (1.0, [(1.0, 4), (1.0, 4)], 0.0),
        (1.25, [(1.0, 4), (1.5, 4)], math.sqrt((4 / 16 + 4 / 16) / 1 / 8)),  # whole numbers, and no share
        (0.3, [(0.3, 8)], None),  # one batch, no hits
        (0.8, [(1.0, 4), (0.5, 4)], None),  # no mean
        (1.5, [(1.0, 4), (0.5, 4)], None),  # a sum
        (0.75, [], None),
        (0.75, [(NAN, 4), (0.5, 4)], None),
    ],
)
def test_standard_error(value: float, batches: list[tuple[float, int]], expected: float | None) -> None:
    found = standard_error(value, batches)
    assert found == (None if expected is None else pytest.approx(expected))


def test_standard_error_of_what_is_not_finite_is_no_number() -> None:
    for value in (NAN, INF, -INF):
        assert math.isnan(standard_error(value, [(value, 4)]))  # type: ignore[arg-type]


# --- where it comes from ---


class Metered(Classifier):
    """Logs one metric in each of the ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        micro = {"num_classes": 3, "average": "micro"}
        self.forwarded, self.updated = MulticlassAccuracy(**micro), MulticlassAccuracy(**micro)
        self.f1 = MulticlassF1Score(num_classes=3, average="macro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        hits = (logits.argmax(dim=1) == y).float()
        self.forwarded(logits, y)
        self.log("forwarded", self.forwarded)  # first: no other has told Lightning the size of the batch
        self.log("loss", self.loss(batch))
        self.log("acc", hits.mean())
        self.log("step_and_epoch", hits.mean(), on_step=True, on_epoch=True)
        self.log("hits", hits.sum(), reduce_fx="sum")
        self.log("sized", hits.sum() / (len(y) + 1), batch_size=len(y) + 1)  # as if there were one example more
        self.updated.update(logits, y)
        self.log("updated", self.updated)
        self.f1(logits, y)
        self.log("f1", self.f1)

    def on_validation_epoch_end(self) -> None:
        self.log("at_end", torch.tensor(0.7))


def metered() -> tuple[Metered, Metered]:
    """Two ends that differ, one of them good."""
    start, end = Metered(), Metered()
    end.lr = 0.5
    loader = DataLoader(blobs(60, seed=1), 10)
    quiet_trainer(max_epochs=3).fit(end, loader, loader)
    return start, end


VALIDATION = 23  # examples: the last of three batches is short


class MeteredTwice(Metered):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        _, y = batch
        self.log("acc", (self(batch[0]).argmax(dim=1) == y).float().mean())


def sweep_of(monitor: str, loaders: Any = None, mode: Any = "max", make: Any = Metered) -> tuple[WiSEFTSweep, Metered]:
    start, trained = metered()
    end = make()
    end.load_state_dict(trained.state_dict())
    loaders = loaders or DataLoader(blobs(VALIDATION, seed=2), 10)
    arguments = {"alphas": [0.0, 0.5, 1.0], "mode": mode, "tolerance": "one_standard_error", "dataloaders": loaders}
    return wise_ft_sweep(quiet_trainer(), end, start, monitor, **arguments), end


@pytest.mark.parametrize("monitor", ["acc", "forwarded", "step_and_epoch", "step_and_epoch_epoch", "sized"])
def test_one_standard_error_of_hits(monitor: str) -> None:
    sweep, _ = sweep_of(monitor)
    best, n = max(sweep.values), VALIDATION + 3 * (monitor == "sized")
    assert 0.5 < best < 1
    assert sweep.tolerance == pytest.approx(math.sqrt(best * (1 - best) / n), rel=1e-5)


@pytest.mark.parametrize("monitor", ["acc", "acc/dataloader_idx_1"])
def test_one_standard_error_of_one_of_several_loaders(monitor: str) -> None:
    loaders = [DataLoader(blobs(VALIDATION, seed=2), 10), DataLoader(blobs(40, seed=3), 10)]
    if "/" not in monitor:
        with pytest.raises(MisconfigurationException, match="should be a metric that validation logs, found 'acc'"):
            sweep_of(monitor, loaders, make=MeteredTwice)
        return
    sweep, _ = sweep_of(monitor, loaders, make=MeteredTwice)
    best = max(sweep.values)
    assert sweep.tolerance == pytest.approx(math.sqrt(best * (1 - best) / 40), rel=1e-5)


def test_one_standard_error_of_a_loss_is_that_at_the_best_alpha() -> None:
    sweep, module = sweep_of("loss", mode="min")
    start, end = metered()
    best = Metered()
    best.load_state_dict(wise_ft(state(start), state(end), sweep.best_alpha))
    batches = [(best.loss(batch).item(), len(batch[1])) for batch in DataLoader(blobs(VALIDATION, seed=2), 10)]
    mean = sum(v * n for v, n in batches) / VALIDATION
    variance = sum(n * (v - mean) ** 2 for v, n in batches) / 2
    assert sweep.tolerance == pytest.approx(math.sqrt(variance / VALIDATION), rel=1e-4)
    chosen = wise_ft(state(start), state(end), sweep.chosen_alpha)
    torch.testing.assert_close(weights_of(module), {n: chosen[n].float() for n in weights_of(module)}, **EXACT)


@pytest.mark.parametrize("monitor", ["updated", "f1", "hits", "at_end"])
def test_one_standard_error_that_cannot_be_had(monitor: str) -> None:
    """It fails at the first alpha, with the remedy, and the weights are the fine-tuned ones again."""
    start, end = metered()
    finetuned = weights_of(end)
    message = rf"^The standard error of '{monitor}' = .* cannot be had from \d logged values\. .* or give a number"
    with pytest.raises(MisconfigurationException, match=message):
        wise_ft_sweep(
            quiet_trainer(),
            end,
            start,
            monitor,
            tolerance="one_standard_error",
            dataloaders=DataLoader(blobs(VALIDATION, seed=2), 10),
        )
    assert_same(weights_of(end), finetuned)


def test_one_standard_error_of_a_loss_in_one_batch_cannot_be_had() -> None:
    with pytest.raises(MisconfigurationException, match=r"'loss' = .* from 1 logged.* at least two batches"):
        sweep_of("loss", DataLoader(blobs(VALIDATION, seed=2), VALIDATION), "min")


def test_one_standard_error_on_several_processes_is_refused_before_any_work() -> None:
    trainer = quiet_trainer(devices=2, strategy="ddp")
    message = r"^`tolerance` = 'one_standard_error' needs all batches in one process, found 2 processes\. Give a number"
    with pytest.raises(MisconfigurationException, match=message):
        wise_ft_sweep(trainer, toy(1), toy(), "val_loss", tolerance="one_standard_error", dataloaders=val_loader())
    callback = WiSEFTCallback(alpha="sweep", monitor="val_loss", tolerance="one_standard_error")
    with pytest.raises(MisconfigurationException, match=message):
        callback.setup(trainer, toy(), "fit")


def test_nothing_stays_on_the_trainer() -> None:
    trainer = quiet_trainer()
    arguments = {"tolerance": "one_standard_error", "dataloaders": val_loader(), "mode": "min"}
    wise_ft_sweep(trainer, toy(1), toy(), "val_loss", **arguments)
    assert "update_metrics" not in vars(trainer.validate_loop._results)


# --- in a fit ---

SWEEP: dict[str, Any] = {"alpha": "sweep", "monitor": "val_loss", "mode": "min"}


class Measured(Toy):
    """A validation that draws random numbers, and counts how often its loaders are asked for."""

    asked = 0

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.rand(1)
        self.log("val_loss", loss := self.loss(batch), on_step=True, on_epoch=True)
        return loss

    def train_dataloader(self) -> Any:
        return train_loader()

    def val_dataloader(self) -> Any:
        self.asked += 1
        return val_loader()


def fitted(*callbacks: pl.Callback, **options: Any) -> tuple[Measured, pl.Trainer]:
    seed_everything(0)
    module = Measured()
    module.load_state_dict(toy().state_dict())
    trainer = quiet_trainer(*callbacks, **{"max_epochs": 2, **options})
    trainer.fit(module)
    return module, trainer


@pytest.mark.parametrize("tolerance", [0.0, 0.02, "one_standard_error"])
@pytest.mark.parametrize("with_tpgm", [False, True])
def test_a_fit_chooses_as_a_sweep_after_it(with_tpgm: bool, tolerance: Any) -> None:
    before, after = TPGMCallback(), WiSEFTCallback(**SWEEP, tolerance=tolerance)
    options = {"max_epochs": 8 if with_tpgm else 2}  # within balls that have had time to grow
    module, trainer = fitted(*([TPGMCallback()] if with_tpgm else []), WiSEFTCallback(alpha=None), **options)
    pretrained = toy()
    arguments = {"mode": "min", "tolerance": tolerance, "dataloaders": val_loader()}
    sweep = wise_ft_sweep(trainer, module, pretrained, "val_loss", **arguments)
    found, _ = fitted(*([before] if with_tpgm else []), after, **options)
    assert after.sweep is not None
    assert after.sweep.values == pytest.approx(sweep.values, rel=1e-6)
    assert after.sweep.chosen_alpha == sweep.chosen_alpha
    assert tolerance != 0.02 or 0 < sweep.chosen_alpha < 1
    assert after.sweep.tolerance == pytest.approx(sweep.tolerance)
    torch.testing.assert_close(state(found), state(module), **EXACT)
    if with_tpgm:
        assert_inside_ball(found, before.anchor, before.radii, before.norm)


def test_the_fit_is_left_alone(tmp_path: Path) -> None:
    """Logs, checkpoints, early stopping, the trainer's metrics and the random numbers are those without the sweep."""

    def run(folder: Path, *callbacks: pl.Callback) -> tuple[Any, ...]:
        best = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1, filename="{epoch}")
        stop = EarlyStopping("val_loss", patience=1)
        logger = CSVLogger(folder)
        options = {"logger": logger, "enable_checkpointing": True, "log_every_n_steps": 1, "max_epochs": 3}
        module, trainer = fitted(*callbacks, best, stop, **options)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rows = Path(logger.log_dir, "metrics.csv").read_text()
        saved = sorted(path.name for path in folder.glob("*.ckpt"))
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        seen = (stop.wait_count, float(stop.best_score), float(best.best_model_score or 0))
        return rows, saved, metrics, logged, seen, torch.rand(1), module.asked, state(module), trainer.state

    plain = run(tmp_path / "plain", WiSEFTCallback(alpha=1.0, log="none"))
    callback = WiSEFTCallback(**(SWEEP | {"mode": "max"}), alphas=[1.0, 0.0], log="none")
    swept = run(tmp_path / "swept", callback)
    assert_same(swept, plain)
    assert callback.sweep is not None
    assert callback.sweep.chosen_alpha == 1.0  # the worst, to compare the weights as well
    assert len(plain[1]) == 3
    assert plain[0].count("\n") > 3


@pytest.mark.parametrize(
    "bar",
    [
        TQDMProgressBar,
        pytest.param(
            RichProgressBar,
            marks=pytest.mark.skipif(
                "_live_stack" not in inspect.getsource(RichProgressBar._init_progress),
                reason="this Lightning's own RichProgressBar does not run with rich 14.1 or newer",
            ),
        ),
    ],
)
def test_with_progress_bars(bar: type[pl.Callback]) -> None:
    """Also with one whose own end comes first."""
    callback = WiSEFTCallback(**SWEEP)
    fitted(bar(), callback, enable_progress_bar=True)
    assert callback.sweep is not None


def test_what_is_saved_and_logged_after_the_fit(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = WiSEFTCallback(**SWEEP, tolerance=9.0, exclude=["head.*"])
    module, trainer = fitted(callback, logger=logger)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert callback.sweep is not None
    assert callback.sweep.chosen_alpha == 0.0
    assert torch.equal(saved["hidden.weight"], toy().hidden.weight)
    assert not torch.equal(saved["head.weight"], toy().head.weight)
    logger.save()
    header, *rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    column = header.split(",").index("wise_ft/alpha")
    assert [row.split(",")[column] for row in rows if row.split(",")[column]] == ["0.0"]
    assert callback.report()[0]["distance"] == 0
    copy = pickle.loads(pickle.dumps(callback))
    assert copy.sweep == callback.sweep
    assert repr(copy) == "WiSEFTCallback(alpha='sweep', monitor='val_loss', tolerance=9.0, exclude=('head.*',))"
    (metrics,) = trainer.validate(module, verbose=False)
    assert metrics["val_loss_epoch"] == pytest.approx(callback.sweep.values[0], rel=1e-6)


def test_its_own_loaders_are_asked_for_once() -> None:
    """As by the fit's validation: to make them may be slow, or random."""
    module, _ = fitted(WiSEFTCallback(**SWEEP))
    assert module.asked == 1


def test_a_trainer_that_fits_again_chooses_again() -> None:
    seen: list[WiSEFTSweep | None] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            seen.append(callback.sweep)

    callback = WiSEFTCallback(**SWEEP)
    module, trainer = fitted(callback, Watch())
    first = callback.sweep
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module)
    assert callback.sweep is not None
    assert callback.sweep is not first
    assert seen == [None] * 4


def test_a_validation_that_breaks_leaves_the_fine_tuned_weights() -> None:
    class Breaks(Measured):
        def on_validation_epoch_start(self) -> None:
            if self.trainer.state.fn == "validate":
                raise RuntimeError("broken")

    plain, _ = fitted()
    module = Breaks()
    module.load_state_dict(toy().state_dict())
    seed_everything(0)
    with pytest.raises(RuntimeError, match="broken"):
        quiet_trainer(WiSEFTCallback(**SWEEP), max_epochs=2).fit(module)
    assert_same(state(module), state(plain))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": "sweep"}, "^`monitor` should be a metric that validation logs, found None"),
        ({"monitor": "val_loss"}, "^`monitor` should be None without `alpha` = 'sweep', found 'val_loss'"),
        ({**SWEEP, "mode": "best"}, "^`mode` should be 'max' or 'min', found 'best'"),
        ({**SWEEP, "alphas": [2]}, r"^`alphas` should be numbers in \[0, 1\], at least one, found \[2\]"),
        ({"alpha": "swep"}, r"^`alpha` should be a number in \[0, 1\], 'sweep' or None, found 'swep'"),
    ],
)
def test_bad_arguments_of_the_callback(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        WiSEFTCallback(**arguments)


@pytest.mark.parametrize("lacking", ["loader", "limit", "step"])
def test_a_fit_without_validation_is_refused_before_it(lacking: str) -> None:
    class Unvalidated(Toy):
        validation_step = pl.LightningModule.validation_step

    module = Unvalidated() if lacking == "step" else toy()
    start = weights_of(module)
    trainer = quiet_trainer(WiSEFTCallback(**SWEEP), limit_val_batches=0 if lacking == "limit" else 1.0)
    loaders = [train_loader()] if lacking == "loader" else [train_loader(), val_loader()]
    said = {"loader": "have no `val_dataloader`", "step": "have no `validation_step`"}
    message = r"^WiSEFTCallback\(.*\) found no validation to choose alpha by"
    warned = pytest.warns(UserWarning, match=said[lacking]) if lacking in said else nullcontext()
    with warned, pytest.raises(MisconfigurationException, match=message):
        trainer.fit(module, *loaders)
    assert_same(weights_of(module), start)


def test_a_metric_that_is_not_logged_is_refused_after_the_first_validation() -> None:
    seen: list[int] = []

    class Epochs(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append(trainer.current_epoch)

    message = r"^`monitor` should be a metric that validation logs, found 'acc'\. Logged are \['val_loss"
    with pytest.raises(MisconfigurationException, match=message):
        fitted(WiSEFTCallback(alpha="sweep", monitor="acc"), Epochs())
    assert seen == [0]


def test_a_metric_of_the_training_is_refused() -> None:
    """Its value from the last training batch would be the same at each alpha."""
    module = Classifier()
    with pytest.raises(MisconfigurationException, match=r"found 'loss'\. Logged are \['val_loss'\]\.$"):
        quiet_trainer(WiSEFTCallback(alpha="sweep", monitor="loss")).fit(module, datamodule=Blobs())


def test_from_a_configuration_file(tmp_path: Path) -> None:
    arguments = "alpha: sweep, monitor: val_loss, mode: min, tolerance: one_standard_error, alphas: [0, 0.5, 1]"
    (tmp_path / "config.yaml").write_text(
        f"""trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_tpgm.TPGMCallback
    - class_path: lightning_tpgm.WiSEFTCallback
      init_args: {{{arguments}}}
"""
    )
    cli = LightningCLI(
        Classifier,
        Blobs,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        seed_everything_default=False,
        save_config_callback=None,
    )
    (callback,) = (found for found in cli.trainer.callbacks if isinstance(found, WiSEFTCallback))
    assert callback.sweep is not None
    assert callback.sweep.alphas == (0.0, 0.5, 1.0)
    assert callback.sweep.tolerance > 0


# --- the picture ---


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_plot_shows_the_band_and_both_alphas(mode: Any, sign: int) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    values = tuple(sign * value for value in (0.3, 0.1, 0.28))
    figure, axes = WiSEFTSweep("acc", mode, (1.0, 0.0, 0.5), values, 0.05).plot()
    curve, line = axes.get_lines()
    assert list(curve.get_xdata()) == [0.0, 0.5, 1.0]
    assert list(curve.get_ydata()) == [sign * value for value in (0.1, 0.28, 0.3)]
    assert set(line.get_xdata()) == {0.5}
    (band,) = axes.patches
    edges = band.get_extents().transformed(axes.transData.inverted()).intervaly
    assert sorted(edges) == pytest.approx(sorted([sign * 0.25, sign * 0.3]))
    (best,) = axes.collections
    assert best.get_offsets().tolist() == [[1.0, pytest.approx(sign * 0.3)]]
    expected = {"chosen: 0.5", "within 0.05 of best", f"best: {sign * 0.3:g} at 1"}
    assert {text.get_text() for text in axes.texts} == expected
    figure.canvas.draw()
    frame = figure.bbox
    assert all(frame.contains(*corner) for text in axes.texts for corner in text.get_window_extent().get_points())
    plt.close(figure)


def test_plot_where_no_value_is_a_number() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = WiSEFTSweep("acc", "max", (0.0, 1.0), (NAN, NAN), NAN).plot()
    figure.canvas.draw()
    assert [text.get_text() for text in axes.texts] == ["chosen and best: 1"]
    plt.close(figure)
