"""Invariant 1, "No trace": evaluating the held-out loss changes nothing but the radii."""

from __future__ import annotations

import csv
import logging
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassPrecision, MulticlassRecall

from lightning_tpgm import TPGMCallback
from lightning_tpgm.callbacks.isolation import Isolation
from properties import assert_same
from toys import CLASSES, FEATURES, Blobs, Counted, blobs, seed_everything, trainer_in

BATCH_SIZE = 8


class Meter:
    """A running mean as users write it: numbers, a list, and a tensor that is changed in place."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0
        self.values: list[float] = []
        self.largest = torch.zeros(())

    def update(self, value: float) -> None:
        self.sum, self.count = self.sum + value, self.count + 1
        self.values.append(value)
        self.largest.clamp_(min=value)


class Busy(pl.LightningModule):
    """Its steps change everything that a step may change, and most of it changes what the next step does.

    Only ``unused`` plays no part. Not every line is good style, but every line is seen in users' modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 5, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.BatchNorm1d(5)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(5, CLASSES)
        self.unused = nn.Parameter(torch.ones(3))
        self.hidden = [nn.Sequential(nn.BatchNorm1d(5, affine=False))]  # in a plain list: none of `modules()`
        self.hidden_metric = {"mean": MeanMetric()}

        per_class = {"num_classes": CLASSES, "average": "macro"}
        self.metrics = MetricCollection(  # precision and recall share a state, auroc grows a list
            {
                "precision": MulticlassPrecision(**per_class),
                "recall": MulticlassRecall(**per_class),
                "auroc": MulticlassAUROC(num_classes=CLASSES, thresholds=None),
            },
            prefix="train_",
        )
        self.val_metrics = self.metrics.clone(prefix="val_")
        self.accuracy = MulticlassAccuracy(num_classes=CLASSES)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

        self.calls, self.last_loss, self.phase = 0, None, "idle"
        self.history: list[float] = []
        self.pairs = ([0], [0])
        self.nested: dict[str, Any] = {"losses": [], "by_class": defaultdict(list), "counts": Counter()}
        self.labels: set[int] = set()
        self.window: deque[float] = deque(maxlen=3)
        self.meter, self.meters = Meter(), {"loss": Meter()}
        self.moving_average = torch.zeros(())
        self.histogram = np.zeros(CLASSES, dtype=np.int64)
        self.generator = torch.Generator().manual_seed(7)
        self.numpy_generator, self.numpy_legacy = np.random.default_rng(7), np.random.RandomState(7)
        self.python_generator = random.Random(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(x.unsqueeze(1))[0][:, -1]
        return self.head(self.dropout(self.hidden[0](self.norm(x)) + self.frozen(x)))

    def step(self, batch: Any, name: str) -> Tensor:
        x, y = batch
        noise = torch.rand(len(x), 1) + torch.rand(len(x), 1, generator=self.generator)
        factor = random.random() + self.python_generator.random() + float(np.random.rand())
        factor += float(self.numpy_generator.random() + self.numpy_legacy.rand())
        logits = self(x + 0.1 * factor * noise)
        loss = cross_entropy(logits, y) * (1 + 0.01 * self.calls) + 0.01 * self.moving_average
        value = loss.item()

        metrics = self.val_metrics if name == "val" else self.metrics
        metrics.update(logits.softmax(1), y)
        self.log_dict(metrics, on_step=False, on_epoch=True)
        self.hidden_metric["mean"].update(value)
        self.log(f"{name}_accuracy", self.accuracy(logits, y), on_step=True, on_epoch=True)
        self.log(f"{name}_loss", loss, on_step=True, on_epoch=True)
        self.logger.log_metrics({f"{name}_direct": value}, step=self.calls)
        for logger in self.loggers:
            logger.experiment.log_metrics({f"{name}_experiment": value}, step=self.calls)

        self.seen += 1
        self.scratch = self.scratch + 1  # another tensor under the same name
        self.register_buffer("latest", logits.detach().mean(0))
        self.calls, self.last_loss, self.phase = self.calls + 1, loss.detach(), name
        self.history.append(value)
        self.pairs[0][0] += 1
        self.nested["losses"].append(value)
        self.nested["by_class"][int(y[0])].append(value)
        self.nested["counts"][int(y[0])] += 1
        self.nested[name] = self.calls
        self.labels.add(self.calls)
        self.window.append(value)
        self.meter.update(value)
        self.meters["loss"].update(value)
        self.moving_average.mul_(0.9).add_(0.1 * loss.detach())
        self.histogram[:] += torch.bincount(y, minlength=CLASSES).numpy()
        self.note = f"{name} {self.calls}"  # an attribute that was not there before
        self.norm.momentum = 0.1 / self.calls
        self.dropout.p = 0.3 / self.calls
        self.dropout.train()
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "val")

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def busy_loss(pl_module: Busy, batch: Any) -> Tensor:
    return pl_module.step(batch, "callable")


def plain(value: Any) -> Any:
    """A copy that nobody changes, in types that can be compared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | deque):
        return [plain(item) for item in value]
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, Meter):
        return plain(vars(value))
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return plain(value.get_state())
    if isinstance(value, nn.Module):
        return everything_in(value)
    assert value is None or isinstance(value, int | float | str), type(value)
    return value


OWN = ("momentum", "p", "_update_count", "_computed", "_groups", "_groups_checked", "_state_is_copy")


def everything_in(module: nn.Module) -> dict[str, Any]:
    """All that a step can change in a module and its parts."""
    found: dict[str, Any] = {}
    for prefix, part in module.named_modules():
        found[f"{prefix} flag"] = part.training
        found[f"{prefix} attributes"] = {name: plain(vars(part)[name]) for name in OWN if name in vars(part)}
        for name, buffer in part.named_buffers(recurse=False):
            found[f"{prefix} buffer {name}"] = plain(buffer)
        for name, parameter in part.named_parameters(recurse=False):
            found[f"{prefix} weight {name}"] = plain(parameter)
            found[f"{prefix} gradient {name}"] = plain(parameter.grad)
            found[f"{prefix} wants gradient {name}"] = parameter.requires_grad
        if hasattr(part, "metric_state"):
            found[f"{prefix} state"] = plain(part.metric_state)
    if isinstance(module, Busy):
        names = [name for name in vars(module) if not name.startswith("_") and name != "training"]
        found["user attributes"] = {name: plain(vars(module)[name]) for name in names}
    return found


def random_states() -> list[Any]:
    return [torch.get_rng_state(), torch.initial_seed(), plain(np.random.get_state()), random.getstate()]


class Recorder(pl.Callback):
    """Keeps all that is there after every batch and at an exception."""

    def __init__(self) -> None:
        self.moments: list[Any] = []

    def record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = [plain(optimizer.state_dict()) for optimizer in trainer.optimizers]
        logged = {k: plain(v) for k, v in trainer.callback_metrics.items() if not k.startswith("tpgm")}
        loggers = [id(logger) for logger in trainer.loggers]
        self.moments.append([everything_in(pl_module), optimizers, logged, loggers == self.loggers, random_states()])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.loggers = [id(logger) for logger in trainer.loggers]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.record(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.record(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.record(trainer, pl_module)


def users_rows(metrics_file: str) -> list[dict[str, str]]:
    """What the user logged in a CSV file, row by row: without the callback's own columns and rows."""
    rows = [
        {name: value for name, value in row.items() if value and not name.startswith("tpgm")}
        for row in csv.DictReader(metrics_file.splitlines())
    ]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def run(tmp_path: Path, *callbacks: pl.Callback) -> tuple[Busy, list[Any], str]:
    """Two epochs of four steps, from the same start each time; the module, all moments and the metrics file."""
    seed_everything(1)
    module, recorder = Busy(), Recorder()
    logger = CSVLogger(tmp_path)
    trainer = trainer_in(tmp_path, max_epochs=2, logger=logger, callbacks=[*callbacks, recorder])
    data = Blobs()
    with suppress(Interruption, SystemExit, MisconfigurationException):  # the last: the first with likely causes
        trainer.fit(module, DataLoader(data.train, BATCH_SIZE, shuffle=True), DataLoader(data.val, BATCH_SIZE))
    recorder.record(trainer, module)
    logger.save()
    return module, recorder.moments, (Path(logger.log_dir) / "metrics.csv").read_text()


def all_but_unused() -> list[str]:
    return [name for name, _ in Busy().named_parameters() if name != "unused"]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> tuple[Busy, list[Any], str]:
    """The run without the callback."""
    return run(tmp_path_factory.mktemp("without"))


@pytest.mark.parametrize("loss", [None, "validation_step", busy_loss], ids=["training_step", "validation_step", "own"])
def test_run_is_identical_to_one_without_the_callback(
    loss: Any, without: tuple[Busy, list[Any], str], tmp_path: Path
) -> None:
    held_out = Counted(blobs(20, seed=3))
    loader = DataLoader(held_out, BATCH_SIZE, shuffle=True)
    callback = TPGMCallback(loader, exclude=all_but_unused(), loss=loss, radius_steps=2, every_n_steps=1)
    module, moments, metrics_file = run(tmp_path, callback)

    assert list(callback.radii) == ["unused"]
    # 8 optimizer steps, 2 batches each, 3 batches a pass: the held-out data were really used
    assert held_out.count == 5 * 20 + BATCH_SIZE
    _, expected_moments, expected_file = without
    assert len(expected_moments) == 11
    for moment, (found, expected) in enumerate(zip(moments, expected_moments, strict=True)):
        assert_same(found, expected, f"moment {moment}")
    assert users_rows(metrics_file) == users_rows(expected_file)
    assert len(users_rows(expected_file)) > 16
    assert "train_direct" in metrics_file
    assert "tpgm/distance" in metrics_file
    assert "train_experiment" in metrics_file
    assert module.frozen.training is False


def test_default_loader_leaves_no_trace(without: tuple[Busy, list[Any], str], tmp_path: Path) -> None:
    """The callback's own shuffling loader over the validation data moves no generator either.

    With ``log="none"`` the metrics file is the same to the byte.
    """
    _, moments, metrics_file = run(tmp_path, TPGMCallback(exclude=all_but_unused(), log="none"))
    assert_same(moments, without[1])
    assert metrics_file == without[2]


# --- a step that raises ---


class Interruption(Exception):
    pass


class RaisesAfterFirstStep(pl.Callback):
    """Raises at the very moment at which `TPGMCallback` would evaluate."""

    def __init__(self, exception: type[BaseException]) -> None:
        self.exception = exception

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(self.stop)

    def stop(self, *_: Any) -> None:
        raise self.exception


@pytest.mark.parametrize("exception", [Interruption, KeyboardInterrupt])
def test_step_that_raises_leaves_no_trace(exception: type[BaseException], tmp_path: Path) -> None:
    def raises_in_the_middle(pl_module: Busy, batch: Any) -> Tensor:
        pl_module.step(batch, "callable")
        assert not pl_module.norm.training
        raise exception

    callback = TPGMCallback(blobs_loader(), exclude=all_but_unused(), loss=raises_in_the_middle)
    _, moments, metrics_file = run(tmp_path / "with", callback)
    _, expected_moments, expected_file = run(tmp_path / "without", RaisesAfterFirstStep(exception))
    assert len(expected_moments) == 2
    assert_same(moments, expected_moments)
    assert metrics_file == expected_file


@pytest.mark.parametrize("exception", [Interruption, KeyboardInterrupt])
def test_step_that_raises_in_the_loader_leaves_no_trace(exception: type[BaseException], tmp_path: Path) -> None:
    def interrupted_loader() -> Any:
        seed_everything(99)
        raise exception

    callback = TPGMCallback(interrupted_loader, exclude=all_but_unused())
    _, moments, metrics_file = run(tmp_path / "with", callback)
    _, expected_moments, expected_file = run(tmp_path / "without", RaisesAfterFirstStep(exception))
    assert_same(moments, expected_moments)
    assert metrics_file == expected_file


def blobs_loader() -> DataLoader[Any]:
    return DataLoader(blobs(BATCH_SIZE), BATCH_SIZE)


# --- the context by itself ---


class Bare(pl.LightningModule):
    """A module without anything, to hang one thing on."""


def inside_no_trace(module: pl.LightningModule, action: Callable[[], Any], tmp_path: Path) -> None:
    with Isolation().no_trace(trainer_in(tmp_path), module):
        action()


def test_objects_stay_the_same_objects(tmp_path: Path) -> None:
    """Whoever else holds a list or a tensor of the module sees it restored."""
    module = Bare()
    module.values, module.total, module.meter = [1.0], torch.ones(2), Meter()
    values, total, meter, largest = module.values, module.total, module.meter, module.meter.largest

    def change() -> None:
        module.values.append(2.0)
        module.values = [3.0]
        module.total += 1
        module.total = torch.zeros(2)
        module.meter.update(5.0)
        module.meter.largest = torch.full((), 9.0)
        module.meter = Meter()

    inside_no_trace(module, change, tmp_path)
    assert module.values is values
    assert module.total is total
    assert module.meter is meter
    assert meter.largest is largest
    assert values == [1.0]
    assert total.tolist() == [1, 1]
    assert (meter.sum, meter.count, meter.values, largest.item()) == (0, 0, [], 0)


def test_metrics_are_empty_inside_and_restored(tmp_path: Path) -> None:
    """A collection that has found its groups goes on like its twin that nobody touched."""
    probabilities, y = torch.rand(8, CLASSES).softmax(1), torch.arange(8) % CLASSES
    torch.manual_seed(0)
    module, twin = Busy(), Busy()
    twin.load_state_dict(module.state_dict())

    def change() -> None:
        assert module.metrics["auroc"].preds == []
        module.metrics.update(probabilities.flip(0), y)
        module.metrics.update(probabilities.flip(1), y)
        module.metrics.compute()

    for one in (module, twin):
        one.metrics.update(probabilities, y)
    states = module.metrics["auroc"].preds
    assert_same(states, twin.metrics["auroc"].preds)  # looking at a member changes the collection
    inside_no_trace(module, change, tmp_path)
    assert_same(everything_in(module), everything_in(twin))
    assert vars(module.metrics["auroc"])["preds"] is states
    computed = []
    for one in (module, twin):
        one.metrics.update(probabilities.roll(1, 0), y)
        computed.append([one.metrics.compute(), one.metrics["recall"].compute()])
    assert_same(*computed)
    assert_same(everything_in(module), everything_in(twin))


def test_every_module_is_in_eval_mode_inside_and_flags_are_put_back_one_by_one(tmp_path: Path) -> None:
    module = Busy()
    module.frozen.eval()
    flags = {name: part.training for name, part in module.named_modules()}
    assert set(flags.values()) == {True, False}
    inside_no_trace(module, lambda: expect(not any(part.training for part in module.modules())), tmp_path)
    assert {name: part.training for name, part in module.named_modules()} == flags


def expect(condition: bool) -> None:
    assert condition


@pytest.mark.parametrize("wrapped", [False, True])
def test_module_says_itself_what_stays_in_train_mode(wrapped: bool, tmp_path: Path) -> None:
    """A scaler of targets, for instance, whose eval mode is meant for predictions."""

    class Particular(Bare):
        def __init__(self) -> None:
            super().__init__()
            self.scaler, self.dropout, self.frozen = nn.Dropout(), nn.Dropout(), nn.Dropout().eval()

        def on_validation_model_eval(self) -> None:
            super().on_validation_model_eval()
            self.scaler.train()

    module, trainer = Particular(), trainer_in(tmp_path)
    trainer.strategy.model = whole = nn.Sequential(module) if wrapped else module  # wrapped as DDP does it
    module.trainer = trainer
    with Isolation().no_trace(trainer, module):
        assert [part for part in whole.modules() if part.training] == [module.scaler]
    assert [part for part in whole.modules() if not part.training] == [module.frozen]


class Labelled(Tensor):
    """A tensor of a library's own, with a method that needs what `detach` does not keep."""

    def clone(self, *_: Any, **__: Any) -> Any:
        raise AttributeError


def test_tensor_of_a_librarys_own_is_put_back(tmp_path: Path) -> None:
    module = Bare()
    module.residual = residual = torch.ones(2).as_subclass(Labelled)

    def change() -> None:
        module.residual += 1
        module.residual = torch.zeros(2)

    inside_no_trace(module, change, tmp_path)
    assert module.residual is residual
    assert residual.tolist() == [1, 1]


def test_generators_are_put_back_after_an_exception(tmp_path: Path) -> None:
    def change() -> None:
        torch.rand(3)
        np.random.rand(3)
        random.random()
        torch.manual_seed(5)
        raise Interruption

    before = random_states()
    with pytest.raises(Interruption):
        inside_no_trace(Bare(), change, tmp_path)
    assert_same(random_states(), before)


class Inner(pl.LightningModule):
    """A LightningModule within another one, and through which it logs."""

    def __init__(self, log: Callable[..., None], log_dict: Callable[..., None]) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.log, self.log_dict = log, log_dict  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        self.log("inner", x.mean())
        self.log_dict({"inner_too": x.mean()}, on_step=True, on_epoch=True)
        return self.layer(x)


class Spread(nn.Module):
    """An ordinary module that was given the method `log` of another one."""

    def __init__(self, log: Callable[..., None]) -> None:
        super().__init__()
        self.write = log

    def forward(self, x: Tensor) -> Tensor:
        self.write("spread", x.std())
        return x


class Outer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner(self.log, self.log_dict)
        self.spread = Spread(self.log)
        self.unused = nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.inner(self.spread(x)), y)
        self.log("outer", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_nested_module_logs_nothing(tmp_path: Path) -> None:
    """The held-out points are far away: a value that leaked into a log would differ."""

    class LoggedValues(pl.Callback):
        values: list[dict[str, Tensor]]

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            names = ("inner", "inner_too_step", "spread", "outer")
            self.values = [*getattr(self, "values", []), {name: trainer.callback_metrics[name] for name in names}]

    far = blobs(16)
    far.tensors[0].mul_(100)
    callback = TPGMCallback(DataLoader(far, BATCH_SIZE), exclude=["inner.*"])
    logged = []
    for callbacks in ([], [callback]):
        seed_everything(0)
        values = LoggedValues()
        module = Outer()
        own = dict(vars(module.inner))
        trainer_in(tmp_path, callbacks=[*callbacks, values]).fit(module, Blobs().train_dataloader())
        logged.append(values.values)
        assert "log" not in vars(module)
        assert vars(module.inner)["log"] is own["log"]
    assert len(logged[0]) == 4
    assert_same(logged[1], logged[0])


def test_own_log_is_called_as_it_is(tmp_path: Path) -> None:
    """A function that returns the value, and one of the standard library's loggers."""

    class Returns(Bare):
        def log(self, name: str, value: Any, prog_bar: bool = False) -> Any:  # type: ignore[override]
            super().log(name, value)
            return value

    module, other = Returns(), Bare()
    other.log = logger = logging.getLogger("a project's own")  # type: ignore[method-assign]
    found = []
    inside_no_trace(module, lambda: found.extend([module.log("a", 1.5), other.log.info("b")]), tmp_path)  # type: ignore[attr-defined]
    assert found == [1.5, None]
    assert other.log is logger  # type: ignore[comparison-overlap]
    assert pl.LightningModule.log.__name__ == "log"


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # users' old modules are what is meant here
def test_script_module_is_restored(tmp_path: Path) -> None:
    """Attributes of TorchScript live elsewhere; its buffers and flags are put back all the same."""
    module = Bare()
    module.traced = traced = torch.jit.script(nn.BatchNorm1d(2))

    def change() -> None:
        assert not traced.training
        traced.train()
        traced(torch.rand(4, 2))

    before = {name: buffer.clone() for name, buffer in traced.named_buffers()}
    inside_no_trace(module, change, tmp_path)
    assert_same(dict(traced.named_buffers()), before)
    assert traced.training
