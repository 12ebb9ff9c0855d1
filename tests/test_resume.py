"""Invariant 4, "Exact resume": stopping and resuming gives what never stopping gives, bit for bit on the CPU."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_tpgm import DiGraPCallback, FTPCallback, TPGMCallback
from properties import assert_same
from toys import (
    BATCH_SIZE,
    SaveOnException,
    StatefulLoader,
    Toy,
    adamw,
    images,
    quiet_trainer,
    toy,
    train_loader,
    val_loader,
)

# The callbacks that stop a run are not there when it is resumed.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.:UserWarning")

# Older releases of Lightning repeat a part of what came before: the last batch, the epoch's end, on_train_epoch_start.
needs_exact_lightning = pytest.mark.skipif(
    not hasattr(_TrainingEpochLoop, "restarted_on_train_batch_end"), reason="Lightning itself does not resume exactly"
)

EPOCHS, STEPS = 3, 6  # optimizer steps an epoch
MakeCallback = Callable[[], TPGMCallback]


class ResumableToy(Toy):
    """Trains on a loader that can be stopped anywhere: a batch that was not trained on is handed out again."""

    def train_dataloader(self) -> StatefulLoader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return StatefulLoader(images(STEPS * BATCH_SIZE, seed=1), in_flight=lambda: progress.ready - progress.processed)

    def val_dataloader(self) -> DataLoader:
        return val_loader()


def resumable(seed: int, optimizer: Any = None) -> ResumableToy:
    module = ResumableToy(optimizer)
    module.load_state_dict(toy(seed).state_dict())
    return module


def outcome(trainer: pl.Trainer, module: pl.LightningModule, callback: TPGMCallback, path: Path) -> dict[str, Any]:
    """All that a run ends with: weights and buffers, optimizers, the callback's state and what it shows."""
    trainer.save_checkpoint(path / "outcome.ckpt")
    checkpoint = torch.load(path / "outcome.ckpt", weights_only=True)
    return {
        "weights": checkpoint["state_dict"],
        "optimizers": checkpoint["optimizer_states"],
        "callback": checkpoint["callbacks"][callback.state_key],
        **{name: getattr(callback, name) for name in ("radii", "distances") if hasattr(callback, name)},
        "step": trainer.global_step,
    }


def uninterrupted(
    make: MakeCallback, path: Path, *others: pl.Callback, optimizer: Any = None, **options: Any
) -> dict[str, Any]:
    torch.manual_seed(7)
    module, callback = resumable(0, optimizer), make()
    trainer = quiet_trainer(callback, *others, **{"max_epochs": EPOCHS, **options})
    trainer.fit(module)
    start = {name: parameter.detach() for name, parameter in resumable(0).named_parameters()}
    result = outcome(trainer, module, callback, path)
    anchor = result["callback"]["anchor"]
    assert_same(anchor, {name: start[name].to(anchor[name].dtype) for name in anchor})
    return result


def resumed(
    make: MakeCallback, checkpoint: Path, path: Path, *others: pl.Callback, optimizer: Any = None, **options: Any
) -> dict[str, Any]:
    """Everything is made anew, with other weights and under another seed."""
    torch.manual_seed(8)
    module, callback = resumable(1, optimizer), make()
    if options.get("precision") == "64-true":
        module.double()  # Lightning restores the weights before it converts the module: it would round them to float32
    trainer = quiet_trainer(callback, *others, **{"max_epochs": EPOCHS, **options})
    trainer.fit(module, ckpt_path=checkpoint)
    return outcome(trainer, module, callback, path)


# --- ways to stop: each trains for a while and returns the checkpoint to resume from


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def _interrupt_handler() -> Iterator[None]:
    """Ctrl-C raises: a job in the background starts with it off, and Lightning leaves it off after it caught one."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


class At(pl.Callback):
    """Acts once, in one hook, when so many optimizer steps have been made."""

    def __init__(self, hook: str, step: int, act: Callable[[pl.Trainer], None]) -> None:
        self.done = False

        def at(trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking and not self.done:
                self.done = True
                act(trainer)

        setattr(self, hook, at)


def stop(*_: Any) -> None:
    raise Stop


def press_ctrl_c(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def train_until(*callbacks: pl.Callback, optimizer: Any = None, **options: Any) -> None:
    torch.manual_seed(7)
    trainer = quiet_trainer(*callbacks, **{"max_epochs": EPOCHS, **options})
    trainer.fit(resumable(0, optimizer))


def after_an_epoch(make: MakeCallback, path: Path, **options: Any) -> Path:
    train_until(make(), ModelCheckpoint(path, filename="a"), **options, max_epochs=1, enable_checkpointing=True)
    return path / "a.ckpt"


def after_a_validation(make: MakeCallback, path: Path, **options: Any) -> Path:
    best = ModelCheckpoint(path, filename="{step}", monitor="val_loss", mode="max", save_top_k=-1)
    train_until(make(), best, **options, val_check_interval=3, max_steps=9, enable_checkpointing=True)
    return path / "step=9.ckpt"


def at_a_step(make: MakeCallback, path: Path, **options: Any) -> Path:
    saver = ModelCheckpoint(path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    train_until(make(), saver, **options, max_steps=8, enable_checkpointing=True)
    return path / "step=8.ckpt"


def by_save_checkpoint(make: MakeCallback, path: Path, step: int = 8, first: bool = False, **options: Any) -> Path:
    save = At("on_train_batch_end", step, lambda trainer: trainer.save_checkpoint(path / "saved.ckpt"))
    callbacks = [save, make()] if first else [make(), save]
    train_until(*callbacks, **{"max_steps": step + 2, **options})
    return path / "saved.ckpt"


def by_save_checkpoint_listed_first(make: MakeCallback, path: Path, **options: Any) -> Path:
    return by_save_checkpoint(make, path, first=True, **options)


def interrupted(hook: str, step: int, act: Callable[..., None], error: type[BaseException]) -> Callable[..., Path]:
    """Stops by an exception in a hook; a checkpoint is written then."""

    def stop_by_it(make: MakeCallback, path: Path, **options: Any) -> Path:
        save = SaveOnException(path / "exception.ckpt")
        with pytest.raises(error):
            train_until(make(), At(hook, step, act), save, **options, enable_checkpointing=True)
        return save.path

    return stop_by_it


class StopsInStep(ResumableToy):
    """Stops before its forward pass: that changes the buffers of BatchNorm, and no callback could undo it."""

    act: Callable[..., None]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.training and self.trainer.global_step == 8:
            self.act()
        return super().training_step(batch, batch_idx)


def in_training_step(act: Callable[..., None], error: type[BaseException]) -> Callable[..., Path]:
    def stop_by_it(make: MakeCallback, path: Path) -> Path:
        torch.manual_seed(7)
        module = StopsInStep()
        module.load_state_dict(resumable(0).state_dict())
        module.act = act
        save = SaveOnException(path / "exception.ckpt")
        with pytest.raises(error):
            quiet_trainer(make(), save, max_epochs=EPOCHS, enable_checkpointing=True).fit(module)
        return save.path

    return stop_by_it


CTRL_C = (KeyboardInterrupt, SystemExit)
STOPS = {
    "after an epoch": after_an_epoch,
    "after a validation": after_a_validation,
    "at a step": at_a_step,
    "save_checkpoint": by_save_checkpoint,
    "save_checkpoint, listed first": by_save_checkpoint_listed_first,
    "exception at batch start": interrupted("on_train_batch_start", 8, stop, Stop),
    "exception at batch end": interrupted("on_train_batch_end", 8, stop, Stop),
    "exception in validation": interrupted("on_validation_batch_end", 6, stop, Stop),
    "exception before the first step": interrupted("on_train_batch_start", 0, stop, Stop),
    "exception in training_step": in_training_step(stop, Stop),
    "Ctrl-C at batch end": interrupted("on_train_batch_end", 8, press_ctrl_c, CTRL_C),
    "Ctrl-C in training_step": in_training_step(press_ctrl_c, CTRL_C),
}


@pytest.mark.parametrize("how", STOPS)
def test_exact_resume_however_it_stops(how: str, tmp_path: Path) -> None:
    options = {"val_check_interval": 3} if how == "after a validation" else {}
    expected = uninterrupted(TPGMCallback, tmp_path, **options)
    checkpoint = STOPS[how](TPGMCallback, tmp_path)
    assert torch.load(checkpoint, weights_only=True)["global_step"] < EPOCHS * STEPS
    assert_same(resumed(TPGMCallback, checkpoint, tmp_path, **options), expected)


@pytest.mark.filterwarnings(
    "ignore:.*was called without a model:UserWarning", "ignore:.*no last checkpoint:UserWarning"
)
def test_exact_resume_by_lightnings_on_exception_checkpoint(tmp_path: Path) -> None:
    """Its way: the same trainer arguments again, and the last checkpoint is found by itself."""
    expected = uninterrupted(TPGMCallback, tmp_path)
    saver = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Stop):
        train_until(TPGMCallback(), At("on_train_batch_end", 8, stop), saver, enable_checkpointing=True)
    found = resumed(TPGMCallback, None, tmp_path, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
    assert_same(found, expected)


SETTINGS: dict[str, tuple[MakeCallback, Any]] = {
    "l2": (lambda: TPGMCallback(norm="l2"), None),
    "AdamW": (TPGMCallback, adamw),
    "every_n_steps": (lambda: TPGMCallback(every_n_steps=3), None),
    "radius_steps": (lambda: TPGMCallback(radius_steps=2), None),
    "both, l2, AdamW": (lambda: TPGMCallback(every_n_steps=3, radius_steps=2, norm="l2"), adamw),
    "exclude": (lambda: TPGMCallback(exclude=["head.*", "scale"]), None),
    "validation_step": (lambda: TPGMCallback(loss="validation_step"), None),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_resume_with_each_setting(setting: str, tmp_path: Path) -> None:
    make, optimizer = SETTINGS[setting]
    expected = uninterrupted(make, tmp_path, optimizer=optimizer)
    checkpoint = by_save_checkpoint(make, tmp_path, optimizer=optimizer)
    assert_same(resumed(make, checkpoint, tmp_path, optimizer=optimizer), expected)


@pytest.mark.parametrize("make", [TPGMCallback, FTPCallback, DiGraPCallback])
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_exact_resume_in_each_precision(precision: str, make: MakeCallback, tmp_path: Path) -> None:
    expected = uninterrupted(make, tmp_path, precision=precision)
    checkpoint = by_save_checkpoint(make, tmp_path, precision=precision)
    assert_same(resumed(make, checkpoint, tmp_path, precision=precision), expected)


@pytest.mark.parametrize(
    "step", [1, 2, 3, 4, 5, 7, 11, 17, *(pytest.param(n, marks=needs_exact_lightning) for n in (6, 12))]
)
def test_exact_resume_from_each_step(step: int, tmp_path: Path) -> None:
    def make() -> TPGMCallback:
        return TPGMCallback(every_n_steps=3, radius_steps=2)

    expected = uninterrupted(make, tmp_path)
    assert_same(resumed(make, by_save_checkpoint(make, tmp_path, step), tmp_path), expected)


@needs_exact_lightning
def test_exact_resume_with_accumulation(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3, "max_epochs": 4}
    expected = uninterrupted(TPGMCallback, tmp_path, **options)
    assert expected["step"] == 8
    checkpoint = by_save_checkpoint(TPGMCallback, tmp_path, step=3, **options)
    assert_same(resumed(TPGMCallback, checkpoint, tmp_path, **options), expected)


def test_exact_resume_twice(tmp_path: Path) -> None:
    """A resumed run writes checkpoints that can be resumed from."""
    expected = uninterrupted(TPGMCallback, tmp_path)
    first = by_save_checkpoint(TPGMCallback, tmp_path, step=4)
    second = At("on_train_batch_end", 8, lambda trainer: trainer.save_checkpoint(tmp_path / "second.ckpt"))
    resumed(TPGMCallback, first, tmp_path, second, max_steps=9)
    assert_same(resumed(TPGMCallback, tmp_path / "second.ckpt", tmp_path), expected)


def test_exact_resume_of_a_finished_run(tmp_path: Path) -> None:
    """Nothing is left to train; all that was learned is there, and goes into the next checkpoint."""
    expected = uninterrupted(TPGMCallback, tmp_path)
    module, callback = resumable(1), TPGMCallback()
    trainer = quiet_trainer(callback, max_epochs=EPOCHS)
    trainer.fit(module, ckpt_path=tmp_path / "outcome.ckpt")
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert_same(again["callbacks"][callback.state_key], expected["callback"])


def test_a_finished_run_goes_on_in_the_same_trainer(tmp_path: Path) -> None:
    """Resuming it trains nothing; with more epochs the same trainer goes on from there, with the original anchor."""
    uninterrupted(TPGMCallback, tmp_path)
    module, callback = resumable(1), TPGMCallback()
    trainer = quiet_trainer(callback, max_epochs=EPOCHS)
    trainer.fit(module, ckpt_path=tmp_path / "outcome.ckpt")
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.fit(module)
    state = callback.state_dict()
    assert_same(state["anchor"], {name: parameter.detach() for name, parameter in resumable(0).named_parameters()})
    assert state["method"]["steps"] == {0: (EPOCHS + 1) * STEPS}


def test_exact_resume_for_more_epochs(tmp_path: Path) -> None:
    expected = uninterrupted(TPGMCallback, tmp_path, max_epochs=EPOCHS + 1)
    uninterrupted(TPGMCallback, tmp_path)
    found = resumed(TPGMCallback, tmp_path / "outcome.ckpt", tmp_path, max_epochs=EPOCHS + 1)
    assert_same(found, expected)


def test_state_is_plain(tmp_path: Path) -> None:
    """Files load with weights_only=True: no numpy scalars, no classes; tensors on the CPU."""
    module, callback = resumable(0), TPGMCallback()
    trainer = quiet_trainer(callback)
    trainer.fit(module)
    allowed = (dict, list, str, int, float, bool, type(None), Tensor)

    def check(value: Any) -> None:
        assert type(value) in allowed, type(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(item)
        if isinstance(value, Tensor):
            assert value.device.type == "cpu"
            assert not value.requires_grad

    check(callback.state_dict())
    assert TPGMCallback().state_dict() == {}


# --- held-out loaders


class Noisy(torch.utils.data.Dataset):
    """A random transform: each draw of an item is another."""

    def __init__(self) -> None:
        self.data = images(10, seed=2)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.data[index]
        return x + torch.randn_like(x), y


class Stream(IterableDataset):
    """A shuffled stream without a length."""

    def __iter__(self) -> Iterator[Any]:
        data = images(10, seed=2)
        return (data[int(i)] for i in torch.randperm(10))


def held_out_loader() -> DataLoader:
    """What an import path leads to."""
    return DataLoader(images(10, seed=2), BATCH_SIZE, shuffle=True)


HELD_OUT: dict[str, Callable[[], Any]] = {
    "loader": val_loader,
    "shuffled loader": held_out_loader,
    "shuffled by a generator": lambda: DataLoader(
        images(10, seed=2), BATCH_SIZE, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "factory": lambda: held_out_loader,
    "import path": lambda: "test_resume:held_out_loader",
    "random transform": lambda: DataLoader(Noisy(), BATCH_SIZE, shuffle=True),
    "stream": lambda: DataLoader(Stream(), BATCH_SIZE),
    "list": lambda: list(val_loader()),
    "weighted sampler": lambda: DataLoader(
        images(10, seed=2), BATCH_SIZE, sampler=torch.utils.data.WeightedRandomSampler([0.1] * 10, 10)
    ),
}


@pytest.mark.parametrize("kind", HELD_OUT)
def test_exact_resume_of_the_held_out_data(kind: str, tmp_path: Path) -> None:
    """Step 8 is in the middle of the third pass over three batches."""

    def make() -> TPGMCallback:
        return TPGMCallback(HELD_OUT[kind](), radius_lr=0.05, every_n_steps=1)

    expected = uninterrupted(make, tmp_path)
    assert expected["callback"]["method"]["held_out"]["passes"] == 5
    assert_same(resumed(make, by_save_checkpoint(make, tmp_path), tmp_path), expected)


class TwoValidationLoaders(ResumableToy):
    def val_dataloader(self) -> list[DataLoader]:
        return [val_loader(), DataLoader(images(6, seed=4), BATCH_SIZE)]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch)


class OwnHeldOutData(ResumableToy):
    def tpgm_dataloader(self) -> DataLoader:
        return DataLoader(images(6, seed=4), BATCH_SIZE)


@pytest.mark.parametrize("kind", [TwoValidationLoaders, OwnHeldOutData])
def test_exact_resume_of_the_callbacks_own_loaders(kind: type[ResumableToy], tmp_path: Path) -> None:
    def run(seed: int, checkpoint: Path | None = None, **options: Any) -> dict[str, Any]:
        torch.manual_seed(seed)
        module, callback = kind(), TPGMCallback()
        module.load_state_dict(toy(seed).state_dict())
        save = At("on_train_batch_end", 8, lambda trainer: trainer.save_checkpoint(tmp_path / "saved.ckpt"))
        trainer = quiet_trainer(callback, save, max_epochs=EPOCHS, **options)
        trainer.fit(module, ckpt_path=checkpoint)
        return outcome(trainer, module, callback, tmp_path)

    expected = run(0)
    run(0, max_steps=9)
    assert_same(run(1, tmp_path / "saved.ckpt"), expected)


# --- several instances


def two_instances() -> list[TPGMCallback]:
    return [TPGMCallback(exclude=["head.*"]), TPGMCallback(val_loader(), norm="l2", exclude=["[!h]*", "hidden.*"])]


def test_exact_resume_of_two_instances(tmp_path: Path) -> None:
    def run(seed: int, checkpoint: Path | None = None, **options: Any) -> list[dict[str, Any]]:
        torch.manual_seed(seed)
        module, callbacks = resumable(seed), two_instances()
        save = At("on_train_batch_end", 8, lambda trainer: trainer.save_checkpoint(tmp_path / "saved.ckpt"))
        trainer = quiet_trainer(*callbacks, save, max_epochs=EPOCHS, **options)
        trainer.fit(module, ckpt_path=checkpoint)
        return [outcome(trainer, module, callback, tmp_path) for callback in callbacks]

    expected = run(0)
    assert len({callback.state_key for callback in two_instances()}) == 2
    assert set(expected[1]["radii"]) == {"head.weight", "head.bias"}
    assert not set(expected[0]["radii"]) & set(expected[1]["radii"])
    run(0, max_steps=9)
    assert_same(run(1, tmp_path / "saved.ckpt"), expected)


def test_a_checkpoint_of_another_norm_is_refused(tmp_path: Path) -> None:
    uninterrupted(TPGMCallback, tmp_path)
    refused = "^The state should be one of TPGM with norm 'l2', found one of TPGM with norm 'mars'. Go on with"
    with pytest.raises(MisconfigurationException, match=refused):
        quiet_trainer(TPGMCallback(norm="l2"), max_epochs=EPOCHS + 1).fit(
            resumable(1), ckpt_path=tmp_path / "outcome.ckpt"
        )


def test_state_key_depends_on_exclude_alone() -> None:
    """Not on its order, and not on what may well change between runs."""
    key = TPGMCallback(exclude=["a", "b"]).state_key
    assert TPGMCallback(exclude=("b", "a")).state_key == key
    assert TPGMCallback(exclude=["a", "b"], radius_lr=1.0, norm="l2", every_n_steps=2).state_key == key
    assert TPGMCallback(exclude=["a"]).state_key != key
    assert TPGMCallback().state_key != key


# --- one trainer, one callback, several fits


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def test_fit_called_twice_goes_on(tmp_path: Path) -> None:
    """Same anchor, same radii; with an optimizer that remembers nothing it equals one long fit."""

    def run(*epochs: int) -> dict[str, Any]:
        torch.manual_seed(7)
        module, callback = toy(optimizer=plain_sgd), TPGMCallback()
        trainer = quiet_trainer(callback)
        for n in epochs:
            trainer.fit_loop.max_epochs = n
            trainer.fit(module, train_loader(), val_loader())
        return outcome(trainer, module, callback, tmp_path)

    expected = run(3)
    start = {name: parameter.detach() for name, parameter in toy().named_parameters()}
    assert_same(expected["callback"]["anchor"], start)
    assert_same(run(1, 3), expected)
    assert_same(run(1, 2, 3), expected)


def test_second_trainer_starts_afresh(tmp_path: Path) -> None:
    """A callback that has been used is as good as new: the anchor is what the second fit starts from."""
    outcomes = []
    for reuse in (True, False):
        torch.manual_seed(7)
        module, callback = toy(), TPGMCallback()
        quiet_trainer(callback).fit(module, train_loader(), val_loader())
        second_start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        callback = callback if reuse else TPGMCallback()
        torch.manual_seed(7)
        trainer = quiet_trainer(callback)
        trainer.fit(module, train_loader(), val_loader())
        outcomes.append(outcome(trainer, module, callback, tmp_path))
        assert_same(outcomes[-1]["callback"]["anchor"], second_start)
    assert_same(*outcomes)


def test_a_checkpoint_that_was_not_used_is_forgotten(tmp_path: Path) -> None:
    """Resuming a finished run trains nothing; the same callback in another trainer then starts afresh."""
    uninterrupted(TPGMCallback, tmp_path)
    callback = TPGMCallback()
    quiet_trainer(callback, max_epochs=EPOCHS).fit(resumable(1), ckpt_path=tmp_path / "outcome.ckpt")
    module = resumable(2)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    quiet_trainer(callback).fit(module)
    assert_same(callback.state_dict()["anchor"], start)
    assert callback.state_dict()["method"]["steps"] == {0: STEPS}


def test_after_an_exception_the_same_trainer_goes_on() -> None:
    module, callback = resumable(0), TPGMCallback()
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    trainer = quiet_trainer(callback, At("on_train_batch_end", 8, stop), max_epochs=EPOCHS)
    with pytest.raises(Stop):
        trainer.fit(module)
    steps = callback.state_dict()["method"]["steps"][0]
    trainer.callbacks = [callback]
    trainer.fit(module)
    assert_same(callback.state_dict()["anchor"], start)
    assert steps == 8
    assert callback.state_dict()["method"]["steps"][0] > steps


# --- parameters that are unfrozen later


class Unfreeze(BackboneFinetuning):
    """Also unfreezes when a run is resumed after the epoch of unfreezing, which Lightning leaves to its users."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch >= self.unfreeze_backbone_at_epoch:
            self.make_trainable(pl_module.backbone)


BACKBONE = {"backbone.0.weight", "backbone.0.bias"}  # BatchNorm is trained from the start


@pytest.mark.parametrize("step", [3, *(pytest.param(n, marks=needs_exact_lightning) for n in (8, 14))])
@pytest.mark.parametrize("first", [True, False], ids=["unfreeze listed first", "unfreeze listed last"])
def test_exact_resume_around_unfreezing(step: int, first: bool, tmp_path: Path) -> None:
    """The backbone is unfrozen at step 6."""

    def run(seed: int, checkpoint: Path | None = None, **options: Any) -> dict[str, Any]:
        torch.manual_seed(seed)
        module, callback, unfreeze = resumable(seed), TPGMCallback(), Unfreeze(1, train_bn=False)
        start = dict(resumable(0).named_parameters())
        save = At("on_train_batch_end", step, lambda trainer: trainer.save_checkpoint(tmp_path / "saved.ckpt"))
        callbacks = [unfreeze, callback] if first else [callback, unfreeze]
        trainer = quiet_trainer(*callbacks, save, max_epochs=EPOCHS, **options)
        trainer.fit(module, ckpt_path=checkpoint)
        anchor = callback.state_dict()["anchor"]
        assert_same(anchor, {name: start[name].detach() for name in anchor})
        assert (set(anchor) >= BACKBONE) == (trainer.current_epoch > 1)
        return outcome(trainer, module, callback, tmp_path)

    expected = run(0)
    assert set(expected["radii"]) == {name for name, _ in toy().named_parameters()}
    run(0, max_steps=step + 1)
    assert_same(run(1, tmp_path / "saved.ckpt"), expected)


@pytest.mark.parametrize("way", ["save_checkpoint", "after the fit"])
def test_exact_resume_before_anything_is_constrained(way: str, tmp_path: Path) -> None:
    """All that may be constrained is frozen until step 6; the checkpoint is from before."""

    def run(seed: int, checkpoint: Path | None = None, **options: Any) -> dict[str, Any]:
        torch.manual_seed(seed)
        module = resumable(seed)
        callback = TPGMCallback(exclude=["[!b]*", "backbone.1.*"])
        save = At("on_train_batch_end", 3, lambda trainer: trainer.save_checkpoint(tmp_path / "saved.ckpt"))
        trainer = quiet_trainer(Unfreeze(1, train_bn=False), callback, save, **{"max_epochs": EPOCHS, **options})
        trainer.fit(module, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        return outcome(trainer, module, callback, tmp_path) if not options else {}

    expected = run(0)
    assert set(expected["radii"]) == BACKBONE
    run(0, max_epochs=1) if way == "after the fit" else run(0, max_steps=4)
    checkpoint = tmp_path / ("after.ckpt" if way == "after the fit" else "saved.ckpt")
    assert_same(run(1, checkpoint), expected)


def test_pretrained_is_not_needed_to_resume(tmp_path: Path) -> None:
    """The anchors are in the checkpoint. What had none (a new head) has none after resuming, and stays free."""
    pretrained = {name: value for name, value in toy(5).state_dict().items() if not name.startswith("head")}

    def make() -> TPGMCallback:
        return TPGMCallback(pretrained=pretrained)

    torch.manual_seed(7)
    module, callback = resumable(0), make()
    trainer = quiet_trainer(callback, max_epochs=EPOCHS)
    trainer.fit(module)
    expected = outcome(trainer, module, callback, tmp_path)
    assert_same(expected["callback"]["anchor"], {name: pretrained[name] for name in expected["radii"]})
    assert not any(name.startswith("head") for name in expected["radii"])

    checkpoint = by_save_checkpoint(make, tmp_path)
    assert_same(resumed(make, checkpoint, tmp_path), expected)
    assert_same(resumed(TPGMCallback, checkpoint, tmp_path), expected)


def test_pretrained_is_not_needed_to_resume_before_unfreezing(tmp_path: Path) -> None:
    """Nor is it for parameters that join after the resume: their pretrained values are in the checkpoint, too."""
    pretrained = toy(5).state_dict()

    def run(seed: int, checkpoint: Path | None = None, **arguments: Any) -> dict[str, Any]:
        torch.manual_seed(seed)
        module, callback = resumable(seed), TPGMCallback(**arguments)
        save = At("on_train_batch_end", 3, lambda trainer: trainer.save_checkpoint(tmp_path / "saved.ckpt"))
        trainer = quiet_trainer(Unfreeze(1, train_bn=False), callback, save, max_epochs=EPOCHS)
        trainer.fit(module, ckpt_path=checkpoint)
        return outcome(trainer, module, callback, tmp_path)

    expected = run(0, pretrained=pretrained)
    anchor = expected["callback"]["anchor"]
    assert set(anchor) >= BACKBONE
    assert_same(anchor, {name: pretrained[name] for name in anchor})
    assert_same(run(1, tmp_path / "saved.ckpt"), expected)
    assert_same(run(1, tmp_path / "saved.ckpt", pretrained=pretrained), expected)


# --- tuners


class Tunable(ResumableToy):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.05

    def train_dataloader(self) -> DataLoader:
        return train_loader(STEPS)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def tunable(seed: int = 0) -> Tunable:
    module = Tunable()
    module.load_state_dict(toy(seed).state_dict())
    return module


@pytest.mark.parametrize("used", [False, True], ids=["new callback", "used callback"])
def test_learning_rate_finder_before_the_fit(used: bool, tmp_path: Path) -> None:
    """It saves and restores a checkpoint before the fit has started; the anchor is what the fit starts from."""
    callback = TPGMCallback()
    if used:
        quiet_trainer(callback).fit(tunable(3))
    module = tunable()
    finder = LearningRateFinder(num_training_steps=5)
    trainer = quiet_trainer(finder, callback, default_root_dir=tmp_path, enable_checkpointing=True)
    trainer.fit(module)
    assert_same(callback.state_dict()["anchor"], {n: p.detach() for n, p in tunable().named_parameters()})
    # what it tried is not counted; in older releases of Lightning the first epoch is shorter by that
    assert callback.state_dict()["method"]["steps"] == {0: trainer.global_step}
    assert trainer.global_step > 0
    assert len(callback.radii) == 11


class FindsLater(LearningRateFinder):
    """Lightning's documented way to look for a learning rate again in mid-training."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def test_learning_rate_finder_in_mid_training(tmp_path: Path) -> None:
    """What it tried is taken back, also what the callback learned meanwhile."""
    module, callback = tunable(), TPGMCallback()
    seen: list[dict[str, Any]] = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            seen.append({"radii": callback.radii, "state": callback.state_dict()["method"]["radii"]})

    finder = FindsLater(num_training_steps=3, update_attr=False)
    trainer = quiet_trainer(Look(), finder, Look(), callback, max_epochs=2, default_root_dir=tmp_path)
    trainer.fit(module)
    assert_same(seen[3], seen[2])
    assert callback.state_dict()["method"]["steps"] == {0: 2 * STEPS}
    assert_same(callback.state_dict()["method"]["radii"]["value"].tolist(), list(callback.radii.values()))
