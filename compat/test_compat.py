"""Other projects' modules, trained with `TPGMCallback()` added and nothing else changed; `Case.more` has exceptions.

Each project is fitted three times from the same seed: with the callback; as it is; and with a callback that evaluates
the held-out loss after every step but constrains only a parameter that nothing uses. The last two must not differ.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import projects
from lightning_tpgm import TPGMCallback
from lightning_tpgm.callbacks.framework import Callback
from properties import assert_distances, assert_inside_ball, assert_same

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other projects; ours are looked for


class Case(NamedTuple):
    """A project to fit, and what is known of it.

    Args:
        fit: Fits it with these callbacks in a folder and returns what its users go on with.
        val_loss: The name under which it logs the validation loss, if it does and the loss is no random one.
        zeros: Pattern over the names of parameters that start at zero.
        more: Arguments of `TPGMCallback` that its users have to give.
        idle: Patterns over the names of parameters that want a gradient, and that the loss or the optimizer leaves out.
        again: Given what `fit` returned and the folder, predicts, saves, loads and predicts again.
    """

    fit: Callable[[list[Any], Path], Any]
    val_loss: str | None = "val_loss"
    zeros: str | None = None
    more: Mapping[str, Any] = {}  # a NamedTuple's default
    idle: tuple[str, ...] = ()
    again: Callable[[Any, Path], tuple[Any, Any]] | None = None


SCVI_IDLE = ("module.l_encoder.*", "module.decoder.px_r_decoder.*")  # of other kinds of this model

CASES = [
    Case(projects.demo_boring, val_loss=None),
    Case(projects.demo_lstm, val_loss=None),
    Case(projects.demo_transformer),
    Case(projects.chemprop_mpnn),
    Case(projects.forecasting_tft),
    Case(projects.gluonts_deepar),
    Case(
        projects.neuralforecast_nhits,
        val_loss="ptl/val_loss",
        more={"loss": "validation_step"},
        again=projects.neuralforecast_nhits_again,
    ),
    Case(projects.tabular_category_embedding, val_loss="valid_loss"),
    Case(projects.pina_pinn),
    Case(projects.geometric_gin),
    Case(projects.monai_unet),
    Case(projects.text_classifier),
    Case(projects.text_lora, zeros="*.lora_B.*"),
    Case(projects.scvi_model, val_loss=None, idle=SCVI_IDLE, again=projects.scvi_model_again),
    Case(
        projects.scvi_all_cells,
        val_loss=None,
        more={"dataloader": projects.scvi_held_out},
        idle=SCVI_IDLE,
        again=projects.scvi_model_again,
    ),
    Case(
        projects.lightly_simclr,
        val_loss=None,
        more={"dataloader": projects.simclr_pictures},
        again=projects.lightly_again,
    ),
    Case(
        projects.lightly_dino, val_loss=None, more={"dataloader": projects.dino_pictures}, again=projects.lightly_again
    ),
    Case(projects.anomalib_stfpm, val_loss=None, more={"eval_mode": False}, again=projects.anomalib_again),
    Case(
        projects.anomalib_reverse_distillation,
        val_loss=None,
        more={"eval_mode": False},
        idle=("model.encoder.*",),
        again=projects.anomalib_again,
    ),
]


class Bystander(Callback):
    """Gives the module a parameter that nothing uses, the only one whose name begins with a U."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.Unused = nn.Parameter(torch.ones(3))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Some projects have made their optimizers before; a step acts on its own optimizer's tensors alone."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if not any(parameter is pl_module.Unused for group in groups for parameter in group["params"]):
            groups[0]["params"].append(pl_module.Unused)


ALL_BUT_THE_BYSTANDER = ["[!U]*"]


class Watch(Callback):
    """Listed last: looks at weights, radii and metrics after every batch, and at everything at the end."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = folder / "middle.ckpt"
        self.radii: list[dict[str, float]] = []
        self.held_out: list[float] = []
        self.metrics: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainable = ((name, value) for name, value in pl_module.named_parameters() if value.requires_grad)
        self.start = {name: value.detach().clone() for name, value in trainable}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note_metrics(trainer)
        for tpgm in (callback for callback in trainer.callbacks if isinstance(callback, TPGMCallback)):
            assert_inside_ball(pl_module, tpgm.anchor, tpgm.radii, "mars")
            assert_distances(pl_module, tpgm.anchor, tpgm.distances, "mars")
            self.radii.append(tpgm.radii)
            self.held_out.append(trainer.callback_metrics["tpgm/heldout_loss"].item())
            if trainer.global_step == 3:
                trainer.save_checkpoint(self.checkpoint)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._note_metrics(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._note_metrics(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._note_metrics(trainer)
        self.end = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        self.optimizers = copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers])
        self.generators = [torch.get_rng_state(), np.random.get_state(), random.getstate()]

    def _note_metrics(self, trainer: Any) -> None:
        """Keep all that the project has logged so far."""
        logged: Mapping[str, Tensor] = trainer.callback_metrics
        self.metrics.append({name: value.clone() for name, value in logged.items() if not name.startswith("tpgm")})


class Run(NamedTuple):
    """What one fit leaves behind."""

    watch: Watch
    tpgm: TPGMCallback | None
    warnings: list[str]
    fitted: Any
    folder: Path


def run(case: Case, folder: Path, *callbacks: Any) -> Run:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    used = [*callbacks, Watch(folder)]
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.chdir(folder)  # some projects write where they are
        fitted = case.fit(used, folder)
    (watch,) = (callback for callback in used if isinstance(callback, Watch))
    tpgm = next((callback for callback in used if isinstance(callback, TPGMCallback)), None)
    return Run(watch, tpgm, [str(warning.message) for warning in caught], fitted, folder)


def is_idle(case: Case, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in case.idle)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.fit.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def constrained(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The project with `TPGMCallback()`; fails where a weight leaves its ball in any step."""
    return run(case, tmp_path_factory.mktemp("constrained"), TPGMCallback(**case.more))


@pytest.fixture(scope="module")
def plain(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The project as it is, but for the parameter that nothing uses."""
    return run(case, tmp_path_factory.mktemp("plain"), Bystander())


@pytest.fixture(scope="module")
def evaluated(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same with the held-out loss evaluated after every step, and only that parameter constrained."""
    folder = tmp_path_factory.mktemp("evaluated")
    return run(case, folder, Bystander(), TPGMCallback(exclude=ALL_BUT_THE_BYSTANDER, every_n_steps=1, **case.more))


def test_it_trains_inside_the_balls_with_a_falling_held_out_loss(case: Case, constrained: Run) -> None:
    losses, start, end = constrained.watch.held_out, constrained.watch.start, constrained.watch.end
    assert len(losses) >= 9
    assert all(map(isfinite, losses))
    assert min(losses[1:]) < losses[0]
    assert set(constrained.tpgm.radii) == set(start)
    idle, used = ([name for name in start if is_idle(case, name) is flag] for flag in (True, False))
    assert all(torch.equal(start[name], end[name]) for name in idle)
    assert sum(not torch.equal(start[name], end[name]) for name in used) > len(used) / 2
    ours = [message for message in constrained.warnings if "TPGM" in message or "held-out" in message]
    # true of modules, or heads, that are built here and never pretrained; nothing else is complained of
    true = ("look like a random initialisation", "looks freshly initialised")
    assert not [message for message in ours if not any(words in message for words in true)]


def test_anchors_are_the_weights_at_the_start(case: Case, constrained: Run) -> None:
    assert_same(constrained.tpgm.anchor, constrained.watch.start)
    if case.zeros is not None:
        zeros = [value for name, value in constrained.tpgm.anchor.items() if fnmatchcase(name, case.zeros)]
        assert len(zeros) > 0
        assert not any(value.any() for value in zeros)


def test_radii_move(case: Case, constrained: Run) -> None:
    first, last = (
        {name: radius for name, radius in radii.items() if not is_idle(case, name)}
        for radii in (constrained.watch.radii[0], constrained.watch.radii[-1])
    )
    still = [name for name, radius in last.items() if not isfinite(radius)]
    assert all(constrained.tpgm.distances[name] == 0 for name in still)
    # a convolution's bias before a normalisation has no gradient but rounding noise, which is another on each processor
    counted = [name for name in last if not name.endswith("conv.bias") and name not in still]
    assert sum(last[name] != first[name] for name in counted) > 0.75 * len(counted)


def test_constraint_holds_in_a_checkpoint(constrained: Run) -> None:
    content = torch.load(constrained.watch.checkpoint, weights_only=False)
    (state,) = (state for key, state in content["callbacks"].items() if key.startswith("TPGMCallback"))
    learned = state["method"]["radii"]
    radii = dict(zip(learned["names"], learned["value"].tolist(), strict=True))
    assert_same(radii, constrained.watch.radii[2])
    assert_inside_ball(content["state_dict"], state["anchor"], radii, "mars")


def test_evaluation_leaves_no_trace(plain: Run, evaluated: Run) -> None:
    assert list(evaluated.tpgm.radii) == ["Unused"]
    assert len(evaluated.watch.held_out) >= 9
    for what in ("metrics", "end", "optimizers", "generators"):
        assert_same(getattr(evaluated.watch, what), getattr(plain.watch, what), what)


def test_held_out_loss_is_the_validation_loss(case: Case, evaluated: Run) -> None:
    """The held-out data are the validation data, in one batch; after the last step both see the same weights."""
    if case.val_loss is None:
        pytest.skip("this project logs no validation loss")
    logged = evaluated.watch.metrics[-1][case.val_loss].item()
    assert evaluated.watch.held_out[-1] == pytest.approx(logged, rel=1e-5)


def test_it_is_saved_and_loaded_and_predicts(case: Case, constrained: Run) -> None:
    if case.again is None:
        pytest.skip("by Lightning's checkpoints, see above")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(constrained.folder)
        found, again = case.again(constrained.fitted, constrained.folder)
    assert_same(again, found)
