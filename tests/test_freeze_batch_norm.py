"""`FreezeBatchNorm`: statistics stay as they are while a trainer fits, weights do not, and nothing remains of it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_tpgm import FreezeBatchNorm, TPGMCallback
from toys import Toy, quiet_trainer, sgd, train_loader, val_loader

ROOT = Path(__file__).parents[1]
by_hand_too = pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode")  # Lightning, before the first batch


SEEN: list[tuple[bool, ...]] = []  # the modes of the two norms at each training_step; no evaluation puts this back


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    SEEN.clear()


class Net(Toy):
    """A toy whose BatchNorm has seen data, with a second one in its head."""

    def __init__(self, norms: bool = True) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(partial(torch.optim.SGD, lr=0.01))
            second = nn.BatchNorm1d(5) if norms else nn.Identity()
            self.hidden = nn.Sequential(nn.Linear(12, 5), second)  # type: ignore[assignment]
            if not norms:
                self.backbone[1] = nn.GroupNorm(1, 3)
            for _ in range(3):
                self(torch.randn(8, 1, 4, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        SEEN.append(modes(self))
        return super().training_step(batch, batch_idx)


def modes(module: nn.Module) -> tuple[bool, ...]:
    return tuple(part.training for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The layers of which some statistic is another one now."""
    return {name.rpartition(".")[0] for name, b in module.named_buffers() if not torch.equal(b, before[name])}


def fit(module: pl.LightningModule, *callbacks: Any, **options: Any) -> set[str]:
    before = statistics(module)
    quiet_trainer(*callbacks, **{"max_epochs": 2, **options}).fit(module, train_loader(), val_loader())
    return moved(module, before)


@pytest.mark.parametrize(
    ("patterns", "moving"),
    [
        (None, ["backbone.1", "hidden.1"]),
        (("*",), []),
        (("backbone.*",), ["hidden.1"]),
        (["*.1"], []),
        (("backbone.?", "hidden.*"), []),
    ],
    ids=str,
)
def test_statistics_of_the_layers_that_match_stay(patterns: Any, moving: list[str]) -> None:
    callbacks = [] if patterns is None else [FreezeBatchNorm(patterns)]
    module = Net()
    assert fit(module, *callbacks) == set(moving)
    assert modes(module) == (True, True)


@by_hand_too
def test_weights_are_trained_and_normalised_by_the_statistics() -> None:
    """The same as a module whose layers are put into eval mode by hand."""
    module, by_hand = Net(), Net()
    before = module.backbone[1].weight.detach().clone()
    for layer in (by_hand.backbone[1], by_hand.hidden[1]):
        layer.eval()
    fit(module, FreezeBatchNorm())
    assert set(SEEN) == {(False, False)}
    fit(by_hand)
    assert not torch.equal(module.backbone[1].weight, before)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), by_hand.parameters(), strict=True))


def test_no_call_of_train_thaws_them() -> None:
    class Insists(Net):
        def on_train_start(self) -> None:
            self.train()

        def on_train_epoch_start(self) -> None:
            self.train()

        def on_validation_model_train(self) -> None:
            self.train()

        def on_train_batch_end(self, *_: Any) -> None:
            self.train()

    module = Insists()
    assert fit(module, FreezeBatchNorm(), val_check_interval=2) == set()
    assert modes(module) == (True, True)


@by_hand_too
def test_each_layer_gets_its_own_mode_back() -> None:
    module = Net()
    module.hidden[1].eval()
    assert fit(module, FreezeBatchNorm()) == set()
    assert modes(module) == (True, False)


class Stumbles(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 3:
            raise RuntimeError("no more")
        return super().training_step(batch, batch_idx)


def test_modes_are_put_back_after_an_exception() -> None:
    module, callback = Stumbles(), FreezeBatchNorm()
    with pytest.raises(RuntimeError, match="no more"):
        fit(module, callback)
    assert modes(module) == (True, True)
    assert SEEN == [(False, False)] * 3
    assert not callback._before


def test_a_module_that_was_put_into_eval_mode_at_the_end_stays_there() -> None:
    class Ends(Net):
        def on_train_end(self) -> None:
            self.eval()

    module = Ends()
    fit(module, FreezeBatchNorm())
    assert modes(module) == (False, False)


def test_a_second_fit() -> None:
    module, callback = Net(), FreezeBatchNorm()
    assert fit(module, callback) == fit(module, callback) == set()
    assert fit(module) == {"backbone.1", "hidden.1"}


@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize("when", ["training", "fit_end"])
@pytest.mark.parametrize("first", [True, False])
def test_with_tpgm(first: bool, when: Any, eval_mode: bool) -> None:
    """Whatever the order: the held-out loss moves no statistic, and in its own modes meets frozen layers."""
    module, tpgm = Net(), TPGMCallback(when=when, eval_mode=eval_mode)
    callbacks = [FreezeBatchNorm(), tpgm] if first else [tpgm, FreezeBatchNorm()]
    assert fit(module, *callbacks) == set()
    assert set(SEEN) == {(False, False)}
    assert len(SEEN) > 12  # the held-out ones, too
    assert modes(module) == (True, True)
    assert tpgm.radii


def test_with_backbone_finetuning() -> None:
    """Which stops and starts the tracking of statistics."""
    module = Net()
    module.optimizer = lambda parameters: sgd(list(module.head.parameters()))
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    before = module.backbone[0].weight.detach().clone()
    assert fit(module, finetuning, FreezeBatchNorm(), max_epochs=3) == set()
    assert not torch.equal(module.backbone[0].weight, before)
    assert set(SEEN) == {(False, False)}


# --- what it refuses, and says


@pytest.mark.parametrize("patterns", ["backbone.*", (), [1], None])
def test_patterns_of_another_type(patterns: Any) -> None:
    with pytest.raises(MisconfigurationException, match="`patterns` should be a sequence of one pattern or more"):
        FreezeBatchNorm(patterns)


def test_a_pattern_that_matches_nothing() -> None:
    expected = r"`patterns` has 'encoder\.\*', which matches none of the 2 BatchNorm layers.*'backbone\.1', 'hidden\.1'"
    with pytest.raises(MisconfigurationException, match=expected):
        fit(Net(), FreezeBatchNorm(["*", "encoder.*"]))


def test_a_module_without_batch_norm() -> None:
    with pytest.raises(MisconfigurationException, match="found no BatchNorm layer with running statistics in Net"):
        fit(Net(norms=False), FreezeBatchNorm())


def test_layers_that_have_seen_nothing() -> None:
    module = Net()
    module.hidden[1].reset_running_stats()
    with pytest.warns(UserWarning, match=r"freezes 1 layers that have seen no data yet, 'hidden\.1' among them"):
        fit(module, FreezeBatchNorm())
    fit(module, FreezeBatchNorm(["backbone.*"]))  # warnings are errors


def test_layers_without_statistics_and_instance_norm_are_left_alone() -> None:
    module = Net()
    module.hidden[1] = nn.BatchNorm1d(5, track_running_stats=False)
    module.backbone[1] = nn.Sequential(module.backbone[1], nn.InstanceNorm2d(3, track_running_stats=True))
    assert fit(module, FreezeBatchNorm()) == {"backbone.1.1"}
    assert set(SEEN) == {(False, True)}


# --- where it is used


def test_lightning_cli() -> None:
    arguments = ["--trainer.callbacks=lightning_tpgm.FreezeBatchNorm", "--trainer.callbacks.patterns=[backbone.*]"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = LightningCLI(Net, run=False, args=arguments, save_config_callback=None, seed_everything_default=False)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, FreezeBatchNorm))
    assert callback.patterns == ("backbone.*",)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_either_name_of_lightning(package: str) -> None:
    pytest.importorskip(package)
    code = f"""
import {package} as pl, lightning_tpgm
callback = lightning_tpgm.FreezeBatchNorm()
assert isinstance(callback, pl.Callback)
assert callback in pl.Trainer(callbacks=callback, logger=False, enable_checkpointing=False, accelerator="cpu").callbacks
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
