"""Held-out evaluation where it went wrong in the field: errors, modes, and batches that Lightning would give."""

from __future__ import annotations

import csv
import functools
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_tpgm import TPGMCallback, project_checkpoint
from lightning_tpgm.__main__ import main
from lightning_tpgm.callbacks import heldout
from lightning_tpgm.callbacks.framework import comes_in_turn, validation_loader
from lightning_tpgm.callbacks.heldout import HeldOutBatches
from lightning_tpgm.callbacks.loaders import own_loader
from lightning_tpgm.callbacks.step_errors import described
from properties import assert_same
from toys import FEATURES, Blobs, Classifier, blobs, leave_group, trainer_in, weights_of

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def fit(tmp_path: Path, module: pl.LightningModule, callback: TPGMCallback, *data: Any, **settings: Any) -> pl.Trainer:
    trainer = trainer_in(tmp_path, **{"limit_val_batches": 0, "callbacks": [callback], **settings})
    trainer.fit(module, *(data or (Blobs(),)))
    return trainer


# --- whatever the user's step raises


class Fails(Classifier):
    """Its steps raise an error in eval mode; they keep to one batch of training before."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if not self.training:
            raise self.error
        return self.loss(batch)

    validation_step = training_step


class OwnError(Exception):
    """A library's own."""


ERRORS = [
    ValueError("expected targets"),
    AttributeError("'NoneType' object has no attribute 'aux'"),
    AssertionError(),
    RuntimeError("cudnn RNN backward can only be called in training mode"),
    TypeError("unhashable"),
    KeyError("label"),
    IndexError("too far"),
    NotImplementedError("in eval mode"),
    StopIteration(),
    OwnError("mine"),
    OSError("no such file"),
]
STEPS: dict[str, Any] = {
    "training_step": None,
    "validation_step": "validation_step",
    "loss callable": lambda pl_module, batch: pl_module.training_step(batch, 0),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_of_a_step_is_explained(error: Exception, step: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, Fails(error), TPGMCallback(loss=STEPS[step]))
    text = str(caught.value)
    assert caught.value.__cause__ is error
    assert text.startswith(f"The {step} failed on a held-out batch: {type(error).__name__}: {error}\n")
    assert (
        "in eval mode, to learn the radii, on a batch that is a list of 2 ([0]: float32 tensor of shape (8, 6), [1]:"
        in text
    )
    assert "The last training batch has the same structure." in text
    first = {
        "training_step": "(1) the training_step needs train mode",
        "validation_step": "(1) what validation does is not",
    }
    assert f"likeliest first:\n{first.get(step, '(1) the loss callable needs what')}" in text
    for remedy in ("`eval_mode=False`", "`dataloader`", "tpgm_dataloader()", "`loss`"):
        assert remedy in text


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SIGTERMException(), SystemExit(3), MisconfigurationException("Lightning's own")]
)
def test_interruptions_and_lightnings_errors_pass_through(error: BaseException, tmp_path: Path) -> None:
    raised: list[BaseException] = []

    class Keep(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
            raised.append(exception)

    callback = TPGMCallback()
    with pytest.raises((type(error), SystemExit)):
        fit(tmp_path, Fails(error), callback, callbacks=[callback, Keep()])
    assert raised[0] is error


class Dicts(Dataset[Any]):
    """Examples of another kind than the training data's."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return {"image": torch.zeros(3, 4, dtype=torch.uint8), "label": 1}


def test_a_batch_of_another_structure_is_the_first_cause(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, Classifier(), TPGMCallback(DataLoader(Dicts(), 4)))
    text = str(caught.value)
    assert (
        "a batch that is a dict with the keys ['image', 'label'] (['image']: uint8 tensor of shape (4, 3, 4), " in text
    )
    differs = (
        "It differs in structure from the last training batch: the batch is a dict with the keys ['image', 'label'], in"
    )
    assert f"{differs} training a list of 2.\n" in text
    assert "likeliest first:\n(1) held-out batches look different from those that it is written for" in text
    assert type(caught.value.__cause__) is not MisconfigurationException


def test_a_batch_of_another_structure_is_the_first_cause_in_a_loss_callable_too(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="It differs in structure") as caught:
        fit(tmp_path, Classifier(), TPGMCallback(DataLoader(Dicts(), 4), loss=STEPS["loss callable"]))
    causes = str(caught.value).partition("likeliest first:\n")[2].splitlines()
    assert [cause.partition(" ")[0] for cause in causes] == ["(1)", "(2)", "(3)"]
    assert causes[0].startswith("(1) held-out batches look different from those that it is written for")
    assert causes[1].startswith("(2) the loss callable needs what only the training loop gives it")


class Odd(dict[str, Tensor]):
    """Says no keys."""

    def keys(self) -> Any:
        raise RuntimeError("no keys")


def test_a_batch_that_cannot_be_described_does_not_stop_training() -> None:
    assert described(Odd()) == {"": "Odd"}
    assert described({"x": {"y": torch.ones(2, 3)}}) == {
        "": "dict with the keys ['x']",
        "['x']": "dict with the keys ['y']",
        "['x']['y']": "float32 tensor of shape (2, 3)",
    }
    assert len(described([{"a": [1] * 10000}] * 10000)) == 50


@pytest.mark.parametrize("size", [8, 3])
def test_the_number_of_examples_is_no_difference(size: int, tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(size, 2), torch.zeros(size, dtype=torch.long)), size)
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, Classifier(), TPGMCallback(loader))
    differs = f"[0] is a float32 tensor of shape ({size}, 2), in training a float32 tensor of shape (8, 6).\n"
    assert f"It differs in structure from the last training batch: {differs}" in str(caught.value)


def test_transfer_hooks_are_explained_too(tmp_path: Path) -> None:
    class Module(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if not self.trainer.training:
                raise ValueError("no augmentation here")
            return batch

    train, val = Blobs().train_dataloader(), Blobs().val_dataloader()
    with pytest.raises(MisconfigurationException, match="The training_step failed on a held-out batch: ValueError: no"):
        fit(tmp_path, Module(), TPGMCallback(), train, val)


def test_an_error_of_the_gradient_says_so(tmp_path: Path) -> None:
    class InPlace(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            hidden = loss.exp()
            result = hidden * 2
            if not self.training:
                hidden += 1
            return result

    expected = (
        r"^The gradient of the held-out loss of the training_step failed on a held-out batch: RuntimeError: .*inplace"
    )
    with pytest.raises(MisconfigurationException, match=expected) as caught:
        fit(tmp_path, InPlace(), TPGMCallback())
    assert type(caught.value.__cause__) is RuntimeError
    assert "held-out batches look different" not in str(caught.value)


def test_out_of_memory_has_its_own_cause(tmp_path: Path) -> None:
    error = (
        torch.OutOfMemoryError("CUDA out of memory.")
        if hasattr(torch, "OutOfMemoryError")
        else RuntimeError("CUDA out of memory.")
    )
    with pytest.raises(MisconfigurationException, match=r"\(1\) the batch is too large .* `dataloader` with smaller"):
        fit(tmp_path, Fails(error), TPGMCallback())


def test_without_a_training_batch_it_says_that(tmp_path: Path) -> None:
    torch.save(Classifier().state_dict(), tmp_path / "a.pt")
    torch.save(Classifier().state_dict(), tmp_path / "b.pt")
    trainer = trainer_in(tmp_path)
    with pytest.raises(MisconfigurationException, match="There is no training batch to compare it with"):
        project_checkpoint(
            Fails(ValueError("x")), tmp_path / "a.pt", tmp_path / "b.pt", Blobs().val_dataloader(), trainer=trainer
        )


class Unspeakable(RuntimeError):
    """Fails to say what it is, as errors do whose constructor was not called."""

    def __str__(self) -> str:
        raise AttributeError("no message")


def test_an_error_without_text_is_explained(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"failed on a held-out batch: Unspeakable, whose text cannot be"
    ):
        fit(tmp_path, Fails(Unspeakable()), TPGMCallback())


def test_an_error_without_text_in_the_backward_pass(tmp_path: Path) -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            raise Unspeakable

    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.loss(batch)
            return loss if self.training else Backward.apply(loss)  # type: ignore[no-untyped-call]

    with pytest.raises(MisconfigurationException, match=r"^The gradient of .* failed on .*: Unspeakable, whose text"):
        fit(tmp_path, Module(), TPGMCallback())


# --- whatever the loader raises


class Broken(Dataset[Any]):
    """Raises an error where it is said to."""

    def __init__(self, error: Exception, where: str) -> None:
        self.error, self.where, self.data = error, where, blobs(16)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Any:
        if self.where == "data set":
            raise self.error
        return self.data[index]

    def fail(self, *_: Any) -> Any:
        raise self.error

    def loader(self) -> Any:
        if self.where == "function":
            raise self.error
        options: dict[str, Any] = {"collate_fn": self.fail} if self.where == "collate_fn" else {}
        if self.where == "worker":
            options = {"num_workers": 1, "worker_init_fn": self.fail}
        return DataLoader(self, 8, **options)


@forks
@pytest.mark.parametrize("where", ["data set", "collate_fn", "worker", "function"])
@pytest.mark.parametrize("by", ["dataloader", "tpgm_dataloader"])
def test_an_error_of_the_loader_names_the_loader(where: str, by: str, tmp_path: Path) -> None:
    error = ValueError("no such image")
    module, make = Classifier(), Broken(error, where).loader
    module.tpgm_dataloader = make  # type: ignore[assignment]
    with pytest.raises(
        MisconfigurationException, match=r"(?s)^The held-out loader failed to .*no such image"
    ) as caught:
        fit(tmp_path, module, TPGMCallback(make if by == "dataloader" else None))
    assert "_step" not in str(caught.value)
    assert "Mend that, or pass another `dataloader`." in str(caught.value)
    assert isinstance(caught.value.__cause__, ValueError)  # a worker's is made anew


def test_an_error_without_text_of_the_loader(tmp_path: Path) -> None:
    error = Unspeakable()
    expected = r"^The held-out loader failed to give a batch: Unspeakable, whose text cannot be read"
    with pytest.raises(MisconfigurationException, match=expected) as caught:
        fit(tmp_path, Classifier(), TPGMCallback(Broken(error, "data set").loader))
    assert caught.value.__cause__ is error


# --- modes


class Recurrent(Classifier):
    """Two recurrent layers with dropout between them, as cuDNN wants them for a backward pass: in train mode."""

    def __init__(self, strict: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rnn = nn.LSTM(FEATURES, FEATURES, num_layers=2, dropout=0.5, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.strict = strict

    def forward(self, x: Tensor) -> Tensor:
        if self.strict and not self.rnn.training:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return super().forward(self.drop(self.rnn(x[:, None])[0][:, -1]))


seen: list[tuple[bool, ...]] = []


def test_recurrent_layers_alone_are_in_train_mode_without_dropout(tmp_path: Path) -> None:
    class Module(Recurrent):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((self.training, self.rnn.training, self.drop.training, bool(self.rnn.dropout)))
            return self.loss(batch)

    seen.clear()
    module = Module()
    fit(tmp_path, module, TPGMCallback(every_n_steps=1))
    assert seen == [(True, True, True, True), (False, True, False, False)] * 4
    assert module.rnn.dropout == 0.5
    assert all(part.training for part in module.modules())


def test_recurrent_layers_with_dropout_of_their_own_are_in_eval_mode(tmp_path: Path) -> None:
    """On a CPU: there is no cuDNN that would refuse."""

    class Drops(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            modes.append(self.training)
            return super().forward(*args)

    modes: list[bool] = []
    module = Recurrent(strict=False)
    module.rnn = Drops(module.rnn.input_size, module.rnn.hidden_size, batch_first=True)
    fit(tmp_path, module, TPGMCallback(every_n_steps=1))
    assert modes == [True, False] * 4


def test_recurrent_layers_give_the_values_of_eval_mode(tmp_path: Path) -> None:
    def eval_mode_loss(pl_module: Recurrent, batch: Any) -> Tensor:
        pl_module.rnn.eval()
        return pl_module.loss(batch)

    runs = []
    for loss in (eval_mode_loss, None):
        module, callback = Recurrent(strict=False), TPGMCallback(loss=loss)
        torch.manual_seed(0)
        fit(tmp_path, module, callback)
        runs.append((weights_of(module), callback.radii))
    assert_same(runs[0], runs[1])


class NeedsTraining(Classifier):
    """A detector: in eval mode it gives predictions. A part of it stays in eval mode, BatchNorm has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)
        self.frozen = nn.BatchNorm1d(FEATURES, affine=False).eval()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(self.drop(self.frozen(self.norm(x))))
        return logits if self.training else {"predictions": logits.argmax(-1)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        seen.append((self.training, self.norm.training, self.frozen.training, self.drop.training))
        return cross_entropy(self(batch[0]), batch[1])


eval_mode_is_noticed = pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode at the start of training")


@eval_mode_is_noticed
def test_eval_mode_false_evaluates_in_the_modules_own_modes(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="`eval_mode=False`"):
        fit(tmp_path, NeedsTraining(), TPGMCallback(every_n_steps=1))
    seen.clear()
    fit(tmp_path, NeedsTraining(), TPGMCallback(eval_mode=False, every_n_steps=1))
    assert seen == [(True, True, False, True)] * 8


@eval_mode_is_noticed
def test_eval_mode_false_leaves_no_trace(tmp_path: Path) -> None:
    """The only constrained parameter is one that nothing else uses."""

    class Module(NeedsTraining):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + 0 * self.extra.sum()

    runs = []
    for with_callback in (True, False):
        module = Module()
        callback = TPGMCallback(eval_mode=False, exclude=["[!e]*"])
        torch.manual_seed(0)
        fit(tmp_path, module, callback, callbacks=[callback] if with_callback else [])
        runs.append((dict(module.state_dict()), [part.training for part in module.modules()], torch.get_rng_state()))
    assert_same(runs[0], runs[1])


def test_the_error_in_train_mode_names_no_mode_to_try(tmp_path: Path) -> None:
    class Module(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(batch[0]) == 4:
                raise ValueError("too few")
            return self.loss(batch)

    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, Module(), TPGMCallback(DataLoader(blobs(4), 4), eval_mode=False))
    assert "evaluated in the modes that the module trains in, to learn" in str(caught.value)
    assert "eval_mode" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 0, "no"])
def test_eval_mode_is_a_bool(value: Any) -> None:
    with pytest.raises(
        MisconfigurationException, match=re.escape(f"`eval_mode` should be True or False, found {value!r}.")
    ):
        TPGMCallback(eval_mode=value)


@eval_mode_is_noticed
def test_projecting_a_checkpoint_in_train_mode(tmp_path: Path) -> None:
    torch.save(NeedsTraining().state_dict(), tmp_path / "a.pt")
    module = NeedsTraining()
    with torch.no_grad():
        module.head.weight.add_(1.0)
    torch.save(module.state_dict(), tmp_path / "b.pt")
    arguments = (tmp_path / "a.pt", tmp_path / "b.pt", Blobs().val_dataloader())
    with pytest.raises(MisconfigurationException, match="`eval_mode=False`"):
        project_checkpoint(NeedsTraining(), *arguments, trainer=trainer_in(tmp_path))
    callback = project_checkpoint(
        NeedsTraining(), *arguments, radius_steps=2, eval_mode=False, trainer=trainer_in(tmp_path)
    )
    assert callback.radii["head.weight"] > 0


# --- messages


class WithoutLoaders(Classifier):
    def val_dataloader(self) -> Any:
        return None


def test_validation_loader_that_is_none_with_validation_off(tmp_path: Path) -> None:
    expected = r"found no held-out data.*, because val_dataloader\(\) gave None.* Pass `dataloader`, or define"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(tmp_path, WithoutLoaders(), TPGMCallback(), Blobs().train_dataloader())


@pytest.mark.filterwarnings("ignore:Total length of .* is zero")
@pytest.mark.parametrize("loaders", [[], {}, CombinedLoader([], "sequential")], ids=["list", "dict", "combined"])
@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_no_validation_loader_in_the_collection(loaders: Any, limit_val_batches: float, tmp_path: Path) -> None:
    expected = r"found no held-out data.*, because there is no validation loader.* Pass `dataloader`, or define"
    train = Blobs().train_dataloader()
    with pytest.raises(MisconfigurationException, match=expected):
        fit(tmp_path, Classifier(), TPGMCallback(), train, loaders, limit_val_batches=limit_val_batches)


@pytest.mark.parametrize(
    "given",
    [[None], {"a": Blobs().val_dataloader(), "b": None}, CombinedLoader([None], "max_size"), 3, [[], 0.5]],
    ids=["list", "dict", "combined", "number", "numbers"],
)
def test_collection_with_what_is_no_loader(given: Any, tmp_path: Path) -> None:
    """Lightning says so itself where it validates."""
    module = Classifier()
    module.val_dataloader = lambda: given  # type: ignore[method-assign]
    found = type(0.5 if given == [[], 0.5] else 3 if given == 3 else None).__name__
    message = (
        f"val_dataloader\\(\\) of Classifier should give a loader, or a collection .*found {found}. Leave that out,"
    )
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module, TPGMCallback(), Blobs().train_dataloader())
    message = f"`val_dataloaders` should give a loader, or a collection of them, found {found}. Leave that out, or pass"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, Classifier(), TPGMCallback(), Blobs().train_dataloader(), given)


@pytest.mark.parametrize("name", ["val_dataloader", "tpgm_dataloader"])
@pytest.mark.parametrize("in_datamodule", [True, False])
@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_method_with_arguments(name: str, in_datamodule: bool, limit_val_batches: float, tmp_path: Path) -> None:
    def method(self: Any, folder: str, *, stage: str, more: int = 0) -> Any:
        raise NotImplementedError

    base = Blobs if in_datamodule else Classifier
    owner: Any = type("Owner", (base,), {name: method})()
    loaders = [Blobs().train_dataloader(), *([Blobs().val_dataloader()] if name == "tpgm_dataloader" else [])]
    module, data = (Classifier(), [owner]) if in_datamodule else (owner, loaders)
    message = rf"{name}\(\) of Owner should be called without arguments, found that it needs 'folder', 'stage'. Give"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, module, TPGMCallback(), *data, limit_val_batches=limit_val_batches)


def given_arguments(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any) -> Any:
        return method(*args, batch_size=8)

    return call


def test_a_decorator_may_give_the_arguments(tmp_path: Path) -> None:
    """`inspect.signature` shows those of the function inside."""

    class Data(Blobs):
        @given_arguments
        def val_dataloader(self, batch_size: int) -> Any:
            return DataLoader(self.val, batch_size)

    callback = TPGMCallback()
    fit(tmp_path, Classifier(), callback, Data())
    assert callback.radii
    TPGMCallback(given_arguments(lambda batch_size: DataLoader(blobs(8), batch_size)))


def test_tpgm_dataloader_may_be_any_function(tmp_path: Path) -> None:
    class Data(Blobs):
        tpgm_dataloader: Any = staticmethod(lambda: DataLoader(blobs(8), 4))

    callback = TPGMCallback()
    fit(tmp_path, Classifier(), callback, Data())
    assert callback.radii
    Data.tpgm_dataloader = DataLoader(blobs(8), 4)
    with pytest.raises(MisconfigurationException, match=r"tpgm_dataloader\(\) of Data should be a method .*DataLoader"):
        fit(tmp_path, Classifier(), TPGMCallback(), Data())


class Stream(IterableDataset[Any]):
    """Without end, and without length."""

    def __iter__(self) -> Iterator[Any]:
        data = blobs(64)
        yield from (data[i % 64] for i in itertools.count())


def dataset_of(size: int = 8) -> Any:
    return blobs(size)


NO_LOADER: list[tuple[Any, str]] = [
    (blobs(8), r"`dataloader` should be a loader, found the data set 'TensorDataset'.* Pass DataLoader\(dataset"),
    (Dicts(), r"found the data set 'Dicts'.* Pass DataLoader\(dataset"),
    (Stream(), r"found the data set 'Stream'.*batch_size=None"),
    (type("Dataset", (list,), {"__module__": "datasets.arrow_dataset"})(), r"found the data set 'Dataset'"),
    ([Blobs().val_dataloader()], r"found a list of loaders. Pass CombinedLoader\(loaders, 'sequential'\)"),
    ({"a": Blobs().val_dataloader()}, r"found a dict of loaders. Pass CombinedLoader"),
    (Blobs(), r"found the LightningDataModule 'Blobs'. Pass it to trainer\.fit and leave `dataloader` out"),
]


@pytest.mark.parametrize(("given", "message"), NO_LOADER)
def test_what_is_no_loader(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        TPGMCallback(given)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, Classifier(), TPGMCallback(lambda: given))


def needs_arguments(folder: str, batch_size: int, *more: int, workers: int = 0, **options: int) -> Any:
    raise NotImplementedError


def test_function_with_arguments(tmp_path: Path) -> None:
    message = (
        r"function that is called without arguments, found .*, which needs 'folder', 'batch_size'. Pass a loader, or"
    )
    with pytest.raises(MisconfigurationException, match=message):
        TPGMCallback(needs_arguments)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, Classifier(), TPGMCallback("test_held_out_faults:needs_arguments"))
    with pytest.raises(MisconfigurationException, match="which needs 'dataset'"):
        TPGMCallback(DataLoader)


def one_argument(batch: Any) -> Any:
    raise NotImplementedError


def three_arguments(pl_module: Any, batch: Any, batch_idx: int) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize("loss", [one_argument, three_arguments, lambda: None, Classifier().loss])
def test_loss_with_other_arguments(loss: Callable[..., Any]) -> None:
    message = (
        r"`loss` should be a callable \(pl_module, batch\) -> Tensor, found '.*' with the arguments \[.*\]: .*\. Let it"
    )
    with pytest.raises(MisconfigurationException, match=message):
        TPGMCallback(loss=loss)


def test_a_star_on_the_command_line(tmp_path: Path) -> None:
    """jsonargparse reads YAML, where a star begins an alias."""
    torch.save(Classifier().state_dict(), tmp_path / "a.pt")
    module = Classifier()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.rand_like(parameter))
    torch.save(module.state_dict(), tmp_path / "b.pt")
    for exclude in (
        ["--exclude", "*.bias"],
        ["--exclude=*.bias"],
        ["--exclude", "['*.bias']"],
        ["--exclude+", "*.bias"],
    ):
        arguments = {"pretrained": "a.pt", "finetuned": "b.pt", "output": "c.pt"}
        files = [f"--{name}={tmp_path / file}" for name, file in arguments.items()]
        options = ["--model=toys.Classifier", "--dataloader=test_held_out_faults:held_out", "--radius_steps=2"]
        main(["project", *files, *options, "--accelerator=cpu", "--eval_mode=false", *exclude])
        found = torch.load(tmp_path / "c.pt", weights_only=True)
        same = [name for name, value in module.state_dict().items() if torch.equal(found[name], value)]
        assert same == ["backbone.0.bias", "head.bias"], exclude


def held_out() -> Any:
    return Blobs().val_dataloader()


# --- batches that Lightning would give


class Pairs(Classifier):
    """Takes a batch of each of two loaders."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch["a"]) + self.loss(batch["b"])


@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
@pytest.mark.parametrize(("mode", "length"), [("min_size", 2), ("max_size_cycle", 4), ("max_size", 4)])
def test_mode_of_the_validation_loaders_is_kept(
    mode: Any, length: int, limit_val_batches: float, tmp_path: Path
) -> None:
    batches: list[Any] = []

    def own_loss(pl_module: Pairs, batch: Any) -> Tensor:
        batches.append(batch)
        return pl_module.loss(batch["a"])

    loaders = {"a": DataLoader(blobs(32), 8), "b": DataLoader(blobs(16), 8)}
    module = Pairs()
    if mode == "max_size":
        module.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    train = DataLoader(blobs(64, seed=1), 8)
    combined = CombinedLoader(loaders, mode)
    fit(
        tmp_path,
        module,
        TPGMCallback(loss=own_loss, every_n_steps=1),
        train,
        combined,
        limit_val_batches=limit_val_batches,
        max_epochs=2,
    )
    assert [list(batch) for batch in batches] == [["a", "b"]] * 16
    one_pass = torch.cat([batch["a"][0] for batch in batches[:length]])
    assert len(one_pass.unique(dim=0)) == len(one_pass)
    assert not torch.equal(batches[0]["a"][0], batches[length]["a"][0])  # shuffled
    assert combined.flattened == list(loaders.values())


def test_validation_loader_of_lightning_is_where_it_was(tmp_path: Path) -> None:
    """The private part that is used, with the mode that `trainer.val_dataloaders` has not."""
    trainer = trainer_in(tmp_path)
    assert validation_loader(trainer) is None
    combined = CombinedLoader([Blobs().val_dataloader()], "max_size_cycle")
    trainer.fit(Pairs_of_one(), Blobs().train_dataloader(), combined)
    assert validation_loader(trainer) is combined
    assert not comes_in_turn(combined)
    assert comes_in_turn(CombinedLoader([], "sequential"))
    assert not isinstance(trainer.val_dataloaders, CombinedLoader)


class Pairs_of_one(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch[0])


def none_if_odd(examples: list[Any]) -> Any:
    value = int(examples[0])
    return None if value % 2 else torch.tensor(value)


def test_batches_that_are_none_are_passed_over() -> None:
    loader: DataLoader[Any] = DataLoader(range(5), collate_fn=none_if_odd)  # type: ignore[arg-type]
    batches = HeldOutBatches([loader, CombinedLoader([loader], "sequential")], seed=0)
    found = [(int(batch.batch), batch.batch_idx) for batch in (batches.draw() for _ in range(7))]
    assert found == [(0, 0), (2, 2), (4, 4), (0, 0), (2, 2), (4, 4), (0, 0)]
    with pytest.raises(MisconfigurationException, match="gave no batch"):
        HeldOutBatches([DataLoader([1, 3], collate_fn=none_if_odd)], seed=0).draw()  # type: ignore[arg-type]


class Counting(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        data = blobs(80)
        yield from (data[i] for i in range(80))


class Wrapper:
    """Gives what a loader gives, and has whatever it has."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        yield from self.loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class WrapperOfSeveral:
    """Has no length."""

    def __init__(self, loader: Any) -> None:
        self.loaders = [loader]

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(*self.loaders)


class ItsOwnIterator:
    """Has one iterator."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        self.batches = iter(self.loader)
        return self

    def __next__(self) -> Any:
        return next(self.batches)


def persistent() -> Any:
    return DataLoader(Counting(), 8, num_workers=1, persistent_workers=True)


SHARED: dict[str, Callable[[], Any]] = {
    "loader": persistent,
    "wrapper": lambda: Wrapper(persistent()),
    "wrapper of several": lambda: WrapperOfSeveral(persistent()),
    "wrapper of a wrapper": lambda: Wrapper(Wrapper(persistent())),
    "its own iterator": lambda: ItsOwnIterator(DataLoader(Counting(), 8)),
}


@forks
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
def test_loaders_that_validation_shares(given: bool, kind: str, tmp_path: Path) -> None:
    """Validation begins the one iterator of such a loader anew; all batches are drawn all the same, on resume, too."""

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[list[Tensor], pl.Trainer, dict[str, Tensor]]:
        drawn: list[Tensor] = []

        def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
            drawn.append(batch[0].clone())
            return pl_module.loss(batch)

        loader, module = SHARED[kind](), Classifier()
        callback = TPGMCallback(loader if given else None, loss=own_loss, every_n_steps=1)
        trainer = trainer_in(tmp_path, max_epochs=epochs, callbacks=[callback])
        trainer.fit(module, Blobs(train=24).train_dataloader(), loader, ckpt_path=ckpt_path)
        return drawn, trainer, weights_of(module)

    drawn, _, weights = run(4)
    assert_same(drawn, list(blobs(80).tensors[0].split(8)) + list(blobs(80).tensors[0].split(8))[:2])
    first, trainer, _ = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, _, resumed = run(4, tmp_path / "half.ckpt")
    assert_same(first + second, drawn)
    assert_same(resumed, weights)


class Slots:
    """Is its own iterator, and has no ``__dict__``."""

    __slots__ = ("batches", "loader")

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    __iter__, __next__ = ItsOwnIterator.__iter__, ItsOwnIterator.__next__


class Endless:
    """Its one iterator is begun before the fit, and whenever it has ended."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.batches = loader, iter(loader)

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
        return next(self.batches) if batch is None else batch


def beside(other: Any) -> Any:
    wrapper: Any = Wrapper(DataLoader(blobs(16), 8))
    wrapper.other = other
    return wrapper


@forks
@pytest.mark.parametrize(
    "make",
    [
        lambda: Slots(DataLoader(blobs(16), 8)),
        lambda: Endless(DataLoader(blobs(16), 8, num_workers=1)),
        lambda: beside(row for row in "ab"),
        lambda: beside(iter(["a", "b"])),
        lambda: beside(csv.reader(["a,b"])),
    ],
    ids=["slots", "iterator with workers", "generator", "iterator of a list", "made in C"],
)
def test_iterators_that_no_copy_can_be_made_of(make: Any, tmp_path: Path) -> None:
    """What a wrapper holds stays what it is, whatever that is."""
    callback = TPGMCallback(make(), every_n_steps=1)
    fit(tmp_path, Classifier(), callback)
    assert callback.radii


def test_own_loader_is_a_copy_only_where_it_must_be() -> None:
    plain = DataLoader(blobs(8), 4)
    assert own_loader(plain) is plain
    kept = DataLoader(blobs(8), 4, num_workers=1, persistent_workers=True)
    batches = [torch.ones(2), kept]
    assert own_loader(batches) is batches
    around, several = Wrapper(plain), WrapperOfSeveral(plain)
    assert own_loader(around) is around
    assert own_loader(several) is several
    combined = CombinedLoader({"a": kept, "b": [plain]}, "max_size_cycle")
    own: Any = own_loader(combined)
    assert own is not combined
    assert own.iterables["b"] == [plain]
    assert own.iterables["a"] is not kept
    assert (own.iterables["a"].persistent_workers, kept.persistent_workers) == (False, True)
    assert combined.flattened == [kept, plain]


@pytest.mark.parametrize("reload", [0, 1])
def test_reloaded_validation_loaders_are_followed(reload: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(heldout, "rank_zero_info", said.append)
    used: list[float] = []

    class Data(Blobs):
        def val_dataloader(self) -> DataLoader[Any]:
            assert self.trainer is not None
            x, y = self.val.tensors
            return DataLoader(TensorDataset(torch.full_like(x, self.trainer.current_epoch), y), 8)

    def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
        used.append(batch[0].mean().item())
        return pl_module.loss(batch)

    fit(
        tmp_path,
        Classifier(),
        TPGMCallback(loss=own_loss, every_n_steps=1),
        Data(),
        limit_val_batches=1.0,
        max_epochs=3,
        reload_dataloaders_every_n_epochs=reload,
    )
    # validation at the end of an epoch asks for the loaders of that epoch
    assert used == [0.0] * 8 + [float(reload)] * 4
    assert len(said) == 1


@pytest.mark.parametrize("hook", ["val_dataloader", "tpgm_dataloader"])
@pytest.mark.parametrize(("every", "expected"), [(0, [0, 0, 0, 0]), (1, [0, 1, 2, 3]), (2, [0, 0, 2, 2])])
def test_loaders_are_reloaded_with_validation_off(every: int, expected: list[int], hook: str, tmp_path: Path) -> None:
    """In one run, and in one that is resumed between epochs; 3 batches, so that passes end within epochs."""

    def make(self: Any) -> DataLoader[Any]:
        x, y = blobs(24).tensors
        epoch = torch.full_like(x[:, 0], self.trainer.current_epoch if every else 0)
        return DataLoader(TensorDataset(torch.column_stack([x[:, :-1], epoch]), y), 8)

    data = type("Data", (Blobs,), {hook: make})
    options: dict[str, Any] = {"reload_dataloaders_every_n_epochs": every}

    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[list[Tensor], pl.Trainer]:
        drawn: list[Tensor] = []

        def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
            drawn.append(batch[0].clone())
            return pl_module.loss(batch)

        callback = TPGMCallback(loss=own_loss, every_n_steps=1)
        trainer = trainer_in(tmp_path, limit_val_batches=0, max_epochs=epochs, callbacks=[callback], **options)
        torch.manual_seed(0)
        trainer.fit(Classifier(), data(), ckpt_path=ckpt_path)
        return drawn, trainer

    drawn, _ = run(4)
    assert [int(batch[0, -1]) for batch in drawn[::4]] == expected
    assert [int(batch[0, -1]) for batch in drawn[3::4]] == expected
    if every == 1:  # the pass that was broken off, and the next one, in another order
        assert not torch.equal(drawn[3][:, :-1], drawn[4][:, :-1])
    first, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, _ = run(4, tmp_path / "half.ckpt")
    assert_same(first + second, drawn)


# --- modules with a backward of their own


class Inside(torch.autograd.Function):
    """Its backward pass works only where the module's own `backward` has prepared it, as torch's loss_parallel()."""

    prepared = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        if not Inside.prepared:
            raise RuntimeError("outside of loss_parallel()")
        return grad


class OwnBackward(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return Inside.apply(super().loss(batch))  # type: ignore[no-any-return,no-untyped-call]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        Inside.prepared = True
        try:
            super().backward(loss, *args, **kwargs)
        finally:
            Inside.prepared = False


def test_a_modules_own_backward_is_used(tmp_path: Path) -> None:
    runs = []
    for module in (OwnBackward(), Classifier()):
        callback = TPGMCallback(radius_steps=2)
        fit(tmp_path, module, callback)
        grads = {name: parameter.grad for name, parameter in module.named_parameters()}
        runs.append((weights_of(module), grads, callback.radii))
    assert_same(runs[0], runs[1])


class LossParallel(pl.LightningModule):
    """As Lightning's own example of tensor parallelism, if there is a mesh."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.hidden, self.out = nn.Linear(FEATURES, 8), nn.Linear(8, 4)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            from torch.distributed.tensor import Replicate, Shard  # torch 2.4 has it elsewhere

            split = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
            plan = {"hidden": ColwiseParallel(output_layouts=Replicate()), "out": split}
            parallelize_module(self, self.device_mesh["tensor_parallel"], plan)

    def _context(self) -> Any:
        return nullcontext() if self.device_mesh is None else loss_parallel()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with self._context():
            return cross_entropy(self.out(self.hidden(batch[0]).tanh()), batch[1])

    def backward(self, *args: Any, **kwargs: Any) -> None:
        with self._context():
            super().backward(*args, **kwargs)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def radii_of_loss_parallel(folder: Path, **settings: Any) -> dict[str, float]:
    callback = TPGMCallback(Blobs().val_dataloader())
    trainer = trainer_in(folder, **{"callbacks": [callback], "use_distributed_sampler": False, **settings})
    trainer.fit(LossParallel(), Blobs().train_dataloader())
    return callback.radii


def tensor_parallel_process(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"TORCHELASTIC_RUN_ID": "test"}
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    torch.save(radii_of_loss_parallel(folder, devices=2, strategy=strategy), folder / f"{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_loss_parallel_gives_the_radii_of_one_process(tmp_path: Path) -> None:
    pytest.importorskip("torch.distributed.tensor")
    torch.multiprocessing.spawn(tensor_parallel_process, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one == other
    assert one == pytest.approx(radii_of_loss_parallel(tmp_path), rel=1e-5)


# --- streams without end


class StreamWithLength(Stream):
    """Says that it ends."""

    def __init__(self, length: Any) -> None:
        self.length = length

    def __len__(self) -> Any:
        return self.length


@pytest.mark.parametrize("stream", [Stream(), *map(StreamWithLength, [10**6, 10**30, float("inf")])])
def test_a_resumed_run_says_how_much_of_a_stream_it_draws_again(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(heldout, "rank_zero_info", said.append)

    def run(epochs: int, ckpt_path: Path | None = None) -> pl.Trainer:
        callback = TPGMCallback(DataLoader(stream, 8), every_n_steps=1)
        trainer = trainer_in(tmp_path, limit_val_batches=0, max_epochs=epochs, callbacks=[callback])
        trainer.fit(Classifier(), Blobs(), ckpt_path=ckpt_path)
        return trainer

    run(1).save_checkpoint(tmp_path / "a.ckpt")
    assert [text for text in said if "again" in text] == []
    run(2, tmp_path / "a.ckpt")
    (text,) = (text for text in said if "again" in text)
    assert text.startswith("To go on where the run was, 4 held-out batches are drawn again: their stream is read")
    assert "pass a `dataloader` whose passes end sooner" in text


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("sequential", ["stream", "stream", "points"]),
        ("max_size_cycle", ["both", "both"]),
        ("max_size", ["both", "stream"]),
        ("min_size", ["both"]),
    ],
)
def test_a_pass_over_combined_loaders_ends_with_the_length_of_a_stream(
    mode: Any, expected: list[str], tmp_path: Path
) -> None:
    """Two batches, whatever it would give, so that the others come and a resumed run draws few again."""
    seen: list[str] = []

    def own_loss(pl_module: Classifier, batch: Any) -> Tensor:
        both = isinstance(batch, dict)
        parts = [value for value in batch.values() if value is not None] if both else [batch]
        seen.append("both" if len(parts) == 2 else "stream" if both or len(batch[0]) == 8 else "points")
        return pl_module.loss(parts[0])

    loaders = {"a": DataLoader(StreamWithLength(16), 8), "b": DataLoader(blobs(4), 4)}
    callback = TPGMCallback(CombinedLoader(loaders, mode), loss=own_loss, every_n_steps=1)
    fit(tmp_path, Classifier(), callback, max_epochs=2)
    assert seen == [*itertools.islice(itertools.cycle(expected), 8)]


@pytest.mark.parametrize(("loss", "said"), [(None, True), ("validation_step", False)])
def test_a_step_that_splits_its_examples_itself_may_share_them(loss: Any, said: bool, tmp_path: Path) -> None:
    """Forecasters train on the first values of each series, and validate on the last ones of the same."""
    same = DataLoader(TensorDataset(torch.arange(48.0).reshape(6, 8)), batch_size=6)

    class Splits(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0][:, :4]).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.layer(batch[0][:, 4:]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    trainer = trainer_in(tmp_path, callbacks=[TPGMCallback(loss=loss)])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(Splits(), same, same)
    assert any("held-out examples are training examples" in str(each.message) for each in seen) == said
