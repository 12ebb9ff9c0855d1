"""`lightning_tpgm.constrain` in plain loops: the callbacks' runs to the bit, under any loop, wrapper and optimizer."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_tpgm import (
    AnchorDecayCallback,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    constrain,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.constraint import Constraint
from lightning_tpgm.methods import FTP, L2SP, SPD, TPGM, AnchorDecay, DiGraP, Method, WiSEFT
from properties import assert_distances, assert_inside_ball, assert_same
from reference import ReferenceDiGraP, ReferenceFTP, ReferenceL2SP, ReferenceSPD, ReferenceTPGM
from reference import Tensors as Values
from test_contract import Branches, fused, parameters, values
from test_exact_method import Tensors, reference_run
from test_family import OPTIMIZERS as FLOAT64_OPTIMIZERS
from test_family import STEPS, ByHand, WithOptimizer, start
from test_family import assert_same as assert_close_to_loop
from toys import adamw, quiet_trainer, sgd, toy, train_loader, val_loader

Batch = Sequence[Tensor]
MakeOptimizer = Callable[[Any], Optimizer]
TRAIN: list[Batch] = list(train_loader(8))
HELD_OUT: list[Batch] = list(val_loader())  # three, the last one short


class Case(NamedTuple):
    """A method, and the callback with the same arguments; strong ones, so that what it does shows."""

    make: Callable[[], Method]
    callback: Callable[..., MethodCallback]


RARE: dict[str, Any] = {"norm": "l2", "radius_steps": 2, "every_n_steps": 2}
CASES = {
    "TPGM mars": Case(partial(TPGM, every_n_steps=1), partial(TPGMCallback, every_n_steps=1)),
    "TPGM l2": Case(partial(TPGM, **RARE), partial(TPGMCallback, **RARE)),
    "FTP": Case(FTP, FTPCallback),
    "DiGraP": Case(partial(DiGraP, 0.3), partial(DiGraPCallback, 0.3)),
    "SPD": Case(partial(SPD, 0.9), partial(SPDCallback, 0.9)),
    "L2-SP": Case(partial(L2SP, 0.5), partial(L2SPCallback, 0.5)),
    "AnchorDecay": Case(partial(AnchorDecay, 2.0), partial(AnchorDecayCallback, 2.0)),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# --- the loop ---


def mse(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def of_branches(model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(model, Branches)
    return sum(model.losses((batch[0], batch[1])), torch.zeros(()))


def backward_first(optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
    closure()
    optimizer.step()


def closure_by_position(optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
    optimizer.step(closure)


def closure_by_keyword(optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
    optimizer.step(closure=closure)


class Loop:
    """What a user of `constrain` writes; all random numbers are in the data.

    Args:
        case: Its method is made anew.
        optimizer: Makes the optimizer of all parameters.
        model: What is trained; wrapped or not.
        loss: Of the model on a batch.
        backward: Of that loss.
        step: Calls the closure that computes the gradients, and the optimizer.
        options: Of `constrain`.
    """

    def __init__(
        self,
        case: Case,
        optimizer: MakeOptimizer = sgd,
        model: nn.Module | None = None,
        *,
        loss: Callable[[nn.Module, Batch], Tensor] = mse,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        step: Callable[[Optimizer, Callable[[], Tensor]], None] = backward_first,
        **options: Any,
    ) -> None:
        self.model = toy() if model is None else model
        self.optimizer = optimizer(self.model.parameters())
        self.loss, self.backward, self.step = loss, backward, step
        self.drawn = 0  # held-out batches
        method = case.make()
        if isinstance(method, TPGM):
            options["held_out_loss"] = self.held_out_loss
        self.constraint = constrain(self.model, method, self.optimizer, **options)

    def held_out_loss(self) -> Tensor:
        """On the next of three batches, in eval mode, as the callback does it."""
        self.model.eval()
        loss = self.loss(self.model, HELD_OUT[self.drawn % 3])
        self.model.train()
        self.drawn += 1
        return loss

    def train(self, batches: Iterable[Batch]) -> Loop:
        for batch in batches:
            self.step(self.optimizer, partial(self.gradients, batch))
        return self

    def gradients(self, batch: Batch) -> Tensor:
        loss = self.loss(self.model, batch)
        self.optimizer.zero_grad()
        self.backward(loss)
        return loss

    def outcome(self) -> dict[str, Any]:
        return outcome(self.model, self.optimizer, self.constraint)

    def checkpoint(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "constraint": self.constraint}
        return {"drawn": self.drawn, **{name: part.state_dict() for name, part in parts.items()}}

    def resume(self, checkpoint: dict[str, Any]) -> Loop:
        self.drawn = checkpoint["drawn"]
        self.constraint.load_state_dict(checkpoint["constraint"])
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        return self


def outcome(model: nn.Module, optimizer: Optimizer, constraint: Constraint | MethodCallback) -> dict[str, Any]:
    """Weights, buffers, the optimizer's state, and the constraint's but for the position in the held-out data."""
    state = copy.deepcopy(constraint.state_dict())
    state["method"].pop("held_out", None)
    return {
        "weights": values(model),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "state": state,
        "radii": getattr(constraint, "radii", {}),
        "report": constraint.report(),
    }


@cache
def plain_outcome(case: Case, optimizer: MakeOptimizer = sgd, exclude: tuple[str, ...] = ()) -> dict[str, Any]:
    """That of a plain loop over all batches, which calls backward first."""
    return Loop(case, optimizer, exclude=exclude).train(TRAIN).outcome()


def callback_of(case: Case, **options: Any) -> MethodCallback:
    held_out = {"dataloader": HELD_OUT} if isinstance(case.make(), TPGM) else {}
    return case.callback(**held_out, **options)


def fitted(callback: MethodCallback, module: pl.LightningModule, batches: Sequence[Batch] = TRAIN) -> pl.Trainer:
    trainer = quiet_trainer(callback, log_every_n_steps=1, limit_val_batches=0)
    trainer.fit(module, DataLoader(batches, batch_size=None), val_loader())
    return trainer


def lbfgs(params: Any) -> Optimizer:
    return torch.optim.LBFGS(params, lr=0.1, max_iter=3)


# --- the callback's run ---


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_plain_loop_is_the_callback(case: Case, optimizer: MakeOptimizer) -> None:
    module, callback = toy(optimizer=optimizer), callback_of(case)
    trainer = fitted(callback, module)
    found = plain_outcome(case, optimizer)
    assert_same(found, outcome(module, trainer.optimizers[0], callback))
    if isinstance(callback, DiGraPCallback):
        omegas = {row["name"]: row["omega"] for row in found["report"]}
        assert omegas == callback.omegas
        assert max(omegas.values()) > 0


@pytest.mark.parametrize("name", ["TPGM mars", "DiGraP", "SPD"])
def test_a_plain_loop_with_lbfgs_is_the_callback(name: str) -> None:
    module, callback = toy(optimizer=lbfgs), callback_of(CASES[name])
    trainer = fitted(callback, module)
    loop = Loop(CASES[name], lbfgs, step=closure_by_position).train(TRAIN)
    assert_same(loop.outcome(), outcome(module, trainer.optimizers[0], callback))


def test_methods_change_the_run(case: Case) -> None:
    """Else the tests of equality would say little."""
    model = toy()
    optimizer = sgd(model.parameters())
    for batch in TRAIN:
        optimizer.zero_grad()
        mse(model, batch).backward()
        optimizer.step()
    constrained = plain_outcome(case)["weights"]
    same = [name for name, weight in parameters(model).items() if torch.equal(weight, constrained[name])]
    assert set(same) <= {"backbone.0.bias"}  # BatchNorm undoes it: it hardly moves


def test_distances_and_balls(case: Case) -> None:
    start, loop = parameters(toy()), Loop(case, adamw).train(TRAIN)
    norm = loop.constraint.method.norm
    assert_same(loop.constraint.anchor, start)
    assert_distances(loop.model, start, loop.constraint.distances, norm)
    assert set(loop.constraint.radii) == (set(start) if loop.constraint.method.has_radii else set())
    if loop.constraint.method.has_radii:
        assert_inside_ball(loop.model, start, loop.constraint.radii, norm)


@pytest.mark.parametrize("name", ["TPGM mars", "SPD"])
def test_options_are_the_callbacks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """`exclude`, `pretrained` (it lacks the head, which is reported) and `anchor_device`."""
    case = CASES[name]
    pretrained = {name: value for name, value in toy(3).state_dict().items() if not name.startswith("head.")}
    options: dict[str, Any] = {"exclude": ["hidden.*"], "pretrained": pretrained, "anchor_device": "cpu"}
    module, callback = toy(), callback_of(case, **options)
    trainer = fitted(callback, module)
    with caplog.at_level("INFO", logger="lightning_tpgm"):
        loop = Loop(case, **options)
    title = type(loop.constraint.method).__name__
    assert f"{title}: Not constrained, because `pretrained` lacks them: head.weight, head.bias." in caplog.messages
    assert_same(loop.train(TRAIN).outcome(), outcome(module, trainer.optimizers[0], callback))
    kept = {n: weight for n, weight in parameters(toy(3)).items() if not n.startswith(("head.", "hidden."))}
    assert_same(loop.constraint.anchor, kept)


# --- resuming ---

THAWS_AT = 3


def thawing_loop(case: Case, seed: int) -> Loop:
    """Its backbone is frozen for three steps."""
    model = toy(seed)
    model.backbone.requires_grad_(False)
    return Loop(case, adamw, model)


def thawing(loop: Loop, steps: range) -> Loop:
    for i in steps:
        if i >= THAWS_AT:
            loop.model.get_submodule("backbone").requires_grad_(True)
        loop.train(TRAIN[i : i + 1])
    return loop


@cache
def never_stopped(case: Case) -> dict[str, Any]:
    return thawing(thawing_loop(case, 0), range(len(TRAIN))).outcome()


@pytest.mark.parametrize("step", [2, 5], ids=["before thawing", "after thawing"])
def test_resume_is_never_stopping(case: Case, step: int, tmp_path: Path) -> None:
    """To the bit, in a new model with other weights; the anchors are the original ones, also of what thaws later."""
    torch.save(thawing(thawing_loop(case, 0), range(step)).checkpoint(), tmp_path / "stopped.pt")
    resumed = thawing_loop(case, 1)
    resumed.model.get_submodule("backbone").requires_grad_(step > THAWS_AT)
    resumed.resume(torch.load(tmp_path / "stopped.pt", weights_only=True))
    assert_same(thawing(resumed, range(step, len(TRAIN))).outcome(), never_stopped(case))
    anchors = resumed.constraint.anchor
    assert_same(anchors, {name: parameters(toy(0))[name] for name in anchors})
    assert set(anchors) == set(parameters(toy(0)))


def test_resume_from_a_checkpoint_of_the_callback(case: Case, tmp_path: Path) -> None:
    callback = callback_of(case)
    fitted(callback, toy(optimizer=adamw), TRAIN[:7]).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    never_stopped = Loop(case, adamw).train(TRAIN[:7])
    resumed = Loop(case, adamw, toy(1)).resume(
        {
            "drawn": never_stopped.drawn,
            "model": saved["state_dict"],
            "optimizer": saved["optimizer_states"][0],
            "constraint": saved["callbacks"][callback.state_key],
        }
    )
    assert_same(resumed.train(TRAIN[7:]).outcome(), never_stopped.train(TRAIN[7:]).outcome())


@pytest.mark.parametrize("name", ["TPGM mars", "TPGM l2", "FTP", "DiGraP"])
def test_the_callback_resumes_from_the_state_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    """After six steps, and six held-out batches: the callback begins its data anew, with the first of three."""
    case = CASES[name]
    callback = callback_of(case)
    trainer = fitted(callback, toy(optimizer=adamw), TRAIN[:6])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    loop = Loop(case, adamw).train(TRAIN[:6])
    saved["callbacks"][callback.state_key] = loop.constraint.state_dict()
    torch.save(saved, tmp_path / "b.ckpt")

    module, callback = toy(1, adamw), callback_of(case)
    trainer = quiet_trainer(callback, log_every_n_steps=1, limit_val_batches=0, max_epochs=2)
    trainer.fit(module, DataLoader(TRAIN[6:], batch_size=None), val_loader(), ckpt_path=tmp_path / "b.ckpt")
    assert_same(outcome(module, trainer.optimizers[0], callback), loop.train(TRAIN[6:]).outcome())


def test_state_of_another_model_is_refused(case: Case) -> None:
    state = Loop(case).constraint.state_dict()
    state["anchor"]["head.weight"] = torch.zeros(3, 3)
    message = r"^The checkpoint's anchor of 'head.weight' has shape \(3, 3\), found shape \(2, 5\)"
    with pytest.raises(ValueError, match=message):
        Loop(case).constraint.load_state_dict(state)


# --- closures ---


@pytest.mark.parametrize(("optimizer", "step"), [(sgd, closure_by_position), (adamw, closure_by_keyword)])
def test_a_closure_is_backward_first(case: Case, optimizer: MakeOptimizer, step: Any) -> None:
    assert_same(Loop(case, optimizer, step=step).train(TRAIN).outcome(), plain_outcome(case, optimizer))


def test_lbfgs_sees_changed_gradients_in_each_call() -> None:
    """L2-SP under LBFGS is LBFGS on a loss with the penalty written out."""
    loop = Loop(CASES["L2-SP"], lbfgs, step=closure_by_position).train(TRAIN)

    def penalised(model: nn.Module, batch: Batch) -> Tensor:
        apart = [(weight - anchors[name]).square().sum() for name, weight in model.named_parameters()]
        return mse(model, batch) + 0.25 * torch.stack(apart).sum()

    anchors, expected = parameters(toy()), toy()
    optimizer, calls = lbfgs(expected.parameters()), 0
    for batch in TRAIN:

        def closure(batch: Batch = batch) -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = penalised(expected, batch)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert calls > 2 * len(TRAIN)
    torch.testing.assert_close(parameters(loop.model), parameters(expected), rtol=1e-4, atol=1e-5)


# --- which optimizer steps what ---


def with_two_optimizers(case: Case) -> tuple[Branches, list[Optimizer], Constraint]:
    model = Branches()
    optimizers = [model.optimizer(branch.parameters()) for branch in (model.left, model.right)]
    method = case.make()
    # one batch for all: each optimizer's step evaluates the held-out loss
    held_out = {"held_out_loss": lambda: of_branches(model, HELD_OUT[0])} if isinstance(method, TPGM) else {}
    return model, optimizers, constrain(model, method, optimizers, **held_out)


def test_two_optimizers_are_one(case: Case) -> None:
    """One optimizer for each branch is one for both, up to the order of sums."""
    model, optimizers, constraint = with_two_optimizers(case)
    single, (left, right), one = with_two_optimizers(case)
    one.steps.follow([both := torch.optim.SGD([*left.param_groups, *right.param_groups])])
    for batch in TRAIN:
        model.zero_grad()
        of_branches(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        both.zero_grad()
        of_branches(single, batch).backward()
        both.step()
    torch.testing.assert_close(parameters(model), parameters(single), rtol=1e-6, atol=1e-7)
    assert constraint.radii == pytest.approx(one.radii, rel=1e-5, abs=1e-7)
    assert constraint.distances == pytest.approx(one.distances, rel=1e-5, abs=1e-6)


def test_a_step_leaves_the_tensors_of_other_optimizers_alone(case: Case) -> None:
    """They have gradients, and are not where their anchors are."""
    model, (left, right), _ = with_two_optimizers(case)
    for batch in TRAIN[:3]:
        of_branches(model, batch).backward()
        left.step()
        right.step()
    of_branches(model, TRAIN[3]).backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.right.named_parameters()}
    left.step()
    assert_same({name: (p.detach().clone(), p.grad.clone()) for name, p in model.right.named_parameters()}, before)


def test_an_optimizer_over_the_head_leaves_the_rest_alone(case: Case) -> None:
    """The head trains as if the rest were frozen, up to the order of sums; the rest stays where the user put it."""

    def of_head(model: nn.Module) -> MakeOptimizer:
        return lambda _: sgd(model.get_submodule("head").parameters())

    model, frozen = toy(), toy()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    loop, expected = Loop(case, of_head(model), model), Loop(case, of_head(frozen), frozen)
    with torch.no_grad():
        model.scale.add_(1)
        frozen.scale.add_(1)
    before = parameters(model)
    loop.train(TRAIN)
    expected.train(TRAIN)
    assert set(loop.constraint.anchor) == set(before)
    rest = {name: value for name, value in before.items() if not name.startswith("head.")}
    assert_same({name: parameters(model)[name] for name in rest}, rest)
    torch.testing.assert_close(parameters(model.head), parameters(frozen.head), rtol=1e-6, atol=1e-7)
    shown = {name: loop.constraint.distances[name] for name in expected.constraint.distances}
    assert shown == pytest.approx(expected.constraint.distances, rel=1e-5, abs=1e-6)
    assert list(shown) == ["head.weight", "head.bias"]


# --- gradient scalers ---


def bad(batch: Batch) -> Batch:
    """A batch whose loss, and gradients, are infinite."""
    return [batch[0], torch.full_like(batch[1], torch.inf)]


def or_inf(model: nn.Module, batch: Batch) -> Tensor:
    infinite = batch[1].isinf().any()
    return of_branches(model, [batch[0], batch[1].nan_to_num(posinf=0)]) * torch.where(infinite, torch.inf, 1.0)


def scaled_loop(case: Case, optimizer: MakeOptimizer, unscales: bool = False) -> Loop:
    """Under a gradient scaler; its scale is a power of two."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def step(optimizer: Optimizer, closure: Callable[[], Tensor]) -> None:
        closure()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    def backward(loss: Tensor) -> None:
        scaler.scale(loss).backward()

    return Loop(case, optimizer, Branches(), loss=or_inf, backward=backward, step=step)


def with_bad_ones() -> list[Batch]:
    return [bad(TRAIN[0]), *TRAIN[:3], bad(TRAIN[0]), *TRAIN[3:]]


@pytest.mark.parametrize("unscales", [False, True])
def test_a_step_that_a_scaler_skips_is_none(case: Case, unscales: bool) -> None:
    expected = Loop(case, adamw, Branches(), loss=of_branches).train(TRAIN).outcome()
    assert_same(scaled_loop(case, adamw, unscales).train(with_bad_ones()).outcome(), expected)


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("name", ["FTP", "DiGraP", "SPD", "L2-SP"])
def test_a_fused_optimizer_under_a_scaler_is_refused(name: str, unscales: bool) -> None:
    """Also after `unscale_`, as for clipping: what such an optimizer skips is called a step all the same."""
    loop = scaled_loop(CASES[name], fused, unscales)
    title = type(loop.constraint.method).__name__
    with pytest.raises(ValueError, match=rf"^{title} needs unscaled gradients, but AdamW unscales .*fused=False"):
        loop.train(with_bad_ones())


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("name", ["TPGM mars", "AnchorDecay"])
def test_a_step_that_a_fused_optimizer_skips_moves_no_weight(name: str, unscales: bool) -> None:
    loop = scaled_loop(CASES[name], fused, unscales).train(TRAIN[:5])
    weights, seen = parameters(loop.model), loop.constraint.radii
    loop.train([bad(TRAIN[0])])
    assert_same(parameters(loop.model), weights)
    assert loop.constraint.radii == seen


def test_a_first_step_that_a_fused_optimizer_skips_begins_no_radius() -> None:
    """The model may be away from its anchors already."""
    linear, scaler = nn.Linear(2, 2), torch.amp.GradScaler("cpu", init_scale=256.0)
    pretrained, start = ({name: value + add for name, value in parameters(linear).items()} for add in (1, 0))
    optimizer, method = fused(linear.parameters()), TPGM()
    constrain(linear, method, optimizer, pretrained=pretrained, held_out_loss=lambda: linear(torch.ones(1, 2)).sum())
    scaler.scale(linear(torch.full((1, 2), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    assert method.radii.value.isnan().all()
    assert_same(parameters(linear), start)


# --- layers that are frozen and thaw ---


def test_a_layer_that_thaws_joins_with_its_anchor(case: Case) -> None:
    """Its anchor is what it held then; from then on the method acts on it."""
    model = toy()
    model.hidden.requires_grad_(False)
    loop = Loop(case, model=model).train(TRAIN[:2])
    names = {"hidden.weight", "hidden.bias"}
    assert not names & set(loop.constraint.anchor)
    assert_same(parameters(model.hidden), parameters(toy().hidden))
    with torch.no_grad():
        model.hidden.weight.add_(0.1)
    held = parameters(model.hidden)
    model.hidden.requires_grad_(True)
    loop.train(TRAIN[2:])
    assert names <= set(loop.constraint.anchor)
    assert_same({name: loop.constraint.anchor[f"hidden.{name}"] for name in held}, held)
    norm, radii = loop.constraint.method.norm, loop.constraint.radii
    assert_distances(model, loop.constraint.anchor, loop.constraint.distances, norm)
    if loop.constraint.method.has_radii:
        assert_inside_ball(model, loop.constraint.anchor, radii, norm)
        assert all(radii[name] > 0 for name in names)
    else:
        assert not torch.equal(parameters(model.hidden)["weight"], held["weight"])
    assert {row["name"] for row in loop.constraint.report()} == set(parameters(model))


def test_a_layer_that_is_frozen_is_left_alone(case: Case) -> None:
    """To the bit, though it is not where its anchor is; when it thaws again its anchor is the original one."""
    loop = Loop(case).train(TRAIN[:3])
    hidden = loop.model.get_submodule("hidden")
    hidden.requires_grad_(False)
    held = parameters(hidden)
    assert not torch.equal(held["weight"], toy().hidden.weight)
    shown = loop.constraint.radii
    loop.train(TRAIN[3:6])
    assert_same(parameters(hidden), held)
    assert {n: r for n, r in loop.constraint.radii.items() if "hidden" in n} == {
        n: r for n, r in shown.items() if "hidden" in n
    }
    hidden.requires_grad_(True)
    loop.train(TRAIN[6:])
    assert not torch.equal(parameters(hidden)["weight"], held["weight"])
    assert_same(loop.constraint.anchor, parameters(toy()))


# --- errors ---


def test_tpgm_needs_a_held_out_loss() -> None:
    with pytest.raises(ValueError, match=r"^`held_out_loss` is missing: TPGM .* FTP needs no held-out data"):
        constrain(model := toy(), TPGM(), sgd(model.parameters()))


@pytest.mark.parametrize("name", [name for name in CASES if "TPGM" not in name])
def test_no_other_method_takes_a_held_out_loss(name: str) -> None:
    model, method = toy(), CASES[name].make()
    with pytest.raises(ValueError, match=rf"^`held_out_loss` has no effect with {type(method).__name__}\."):
        constrain(model, method, sgd(model.parameters()), held_out_loss=lambda: mse(model, HELD_OUT[0]))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda loss: float(loss.detach()), "'float'"),
        (Tensor.detach, r"a tensor of shape \(\)"),
        (lambda loss: loss.expand(2), r"a tensor of shape \(2,\)"),
        (lambda loss: None, "'NoneType'"),
    ],
    ids=["float", "detached", "two elements", "nothing"],
)
def test_a_held_out_loss_that_is_none_is_refused(spoil: Callable[[Tensor], Any], found: str) -> None:
    """When it is first evaluated; the weights are left inside their balls."""
    model = toy()
    optimizer = sgd(model.parameters())
    constraint = constrain(model, TPGM(), optimizer, held_out_loss=lambda: spoil(mse(model, HELD_OUT[0])))
    mse(model, TRAIN[0]).backward()
    with pytest.raises(ValueError, match=f"^`held_out_loss` should return a scalar tensor .*, found {found}"):
        optimizer.step()
    assert_inside_ball(model, parameters(toy()), constraint.radii, "mars")


def test_a_held_out_loss_that_raises_once() -> None:
    """The user's own error is raised, the weights are inside their balls, and the next step is a step."""
    loop = Loop(CASES["TPGM mars"]).train(TRAIN[:2])
    loop.loss = lambda model, batch: mse(model, batch if model.training else batch[:1])
    with pytest.raises(IndexError):
        loop.train(TRAIN[2:3])
    assert_inside_ball(loop.model, loop.constraint.anchor, loop.constraint.radii, "mars")
    seen, loop.loss = loop.constraint.radii, mse
    loop.model.train()
    loop.train(TRAIN[3:4])
    assert loop.drawn == 3
    assert loop.constraint.radii != seen
    assert_inside_ball(loop.model, loop.constraint.anchor, loop.constraint.radii, "mars")


def test_a_radius_that_the_held_out_loss_does_not_depend_on_takes_no_step() -> None:
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "ab"})
    optimizer, method, x = torch.optim.SGD(model.parameters(), lr=0.1), TPGM(every_n_steps=1), torch.ones(1, 2)
    constrain(model, method, optimizer, held_out_loss=lambda: model["a"](x).square().sum())
    for _ in range(2):
        model["b"](model["a"](x)).sum().backward()
        optimizer.step()
    assert method.radii.step.tolist() == [2, 0]


def test_a_held_out_loss_that_is_not_finite_skips_one_update() -> None:
    case = CASES["TPGM mars"]
    loop = Loop(case).train(TRAIN[:2])
    adam = loop.constraint.state_dict()["method"]["radii"]["exp_avg"]
    loop.loss = lambda model, batch: mse(model, batch) * (1 if model.training else torch.nan)
    loop.train(TRAIN[2:3])
    assert int(loop.constraint.method.skipped) == 1
    assert torch.equal(loop.constraint.state_dict()["method"]["radii"]["exp_avg"], adam)
    assert_inside_ball(loop.model, loop.constraint.anchor, loop.constraint.radii, "mars")
    loop.loss = mse
    loop.train(TRAIN[3:4])
    assert int(loop.constraint.method.skipped) == 1
    assert not torch.equal(loop.constraint.state_dict()["method"]["radii"]["exp_avg"], adam)


def test_a_pattern_without_match_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^`exclude` pattern 'haed\.\*' matches no parameter\. .* 'head.weight'"):
        Loop(case, exclude=["haed.*"])


def test_nothing_to_constrain_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^\w+ has nothing to constrain: .*`exclude` = \['\*'\]\.$"):
        Loop(case, exclude=["*"])


def test_pretrained_weights_that_do_not_fit_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^`pretrained` matches no parameter by name and shape"):
        Loop(case, pretrained=nn.Linear(7, 7))
    with pytest.raises(ValueError, match=r"^`pretrained` should hold tensors by parameter name"):
        Loop(case, pretrained={})
    with pytest.raises(FileNotFoundError, match=r"^`pretrained` should be an existing file, found '.*a\.ckpt'"):
        Loop(case, pretrained=tmp_path / "a.ckpt")


def test_nothing_of_a_refused_constraint_stays_on_the_optimizer() -> None:
    model = toy()
    optimizer = sgd(model.parameters())
    with pytest.raises(ValueError, match="nothing to constrain"):
        constrain(model, FTP(), optimizer, exclude=["*"])
    assert hooks_of(optimizer) == []


# --- the end ---


def hooks_of(optimizer: Optimizer) -> list[Any]:
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


def test_removed_it_leaves_the_run_alone(case: Case) -> None:
    loop = Loop(case).train(TRAIN[:6])
    assert len(hooks_of(loop.optimizer)) == 2
    loop.constraint.remove()
    assert hooks_of(loop.optimizer) == []
    plain = toy()
    plain.load_state_dict(loop.model.state_dict())
    optimizer = sgd(plain.parameters())
    optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))
    loop.train(TRAIN[6:])
    for batch in TRAIN[6:]:
        optimizer.zero_grad()
        mse(plain, batch).backward()
        optimizer.step()
    assert_same(values(loop.model), values(plain))
    loop.constraint.remove()  # again: nothing happens
    assert hooks_of(loop.optimizer) == []


def test_removed_it_still_tells_what_it_learned(case: Case) -> None:
    loop = Loop(case).train(TRAIN)
    constraint = loop.constraint
    seen = constraint.report(), constraint.radii, constraint.distances, constraint.anchor, constraint.state_dict()
    assert len(seen[0]) == len(parameters(toy()))
    constraint.remove()
    found = constraint.report(), constraint.radii, constraint.distances, constraint.anchor, constraint.state_dict()
    assert_same(found, seen)


def test_removed_it_lets_go_of_the_model() -> None:
    """Though the constraint, its method and what they learned live on."""

    def trained(case: Case) -> tuple[Constraint, weakref.ref[Tensor]]:
        loop = Loop(case).train(TRAIN[:2])
        loop.constraint.remove()
        return loop.constraint, weakref.ref(loop.model.get_parameter("head.weight"))

    found = {name: trained(case) for name, case in CASES.items()}
    gc.collect()
    assert [name for name, (_, parameter) in found.items() if parameter() is not None] == []


AT_END = {
    "TPGM": Case(lambda: TPGM(norm="l2", when="fit_end", radius_steps=3), TPGMCallback),
    "WiSE-FT": Case(WiSEFT, TPGMCallback),
}


@pytest.mark.parametrize("name", AT_END)
def test_methods_that_act_at_the_end_do_so_in_finish(name: str) -> None:
    loop = Loop(AT_END[name]).train(TRAIN)
    plain = Loop(CASES["L2-SP"])
    plain.constraint.remove()
    plain.train(TRAIN)
    assert_same(values(loop.model), values(plain.model))
    tuned, anchors = values(plain.model), values(toy())
    loop.constraint.finish()
    if name == "TPGM":
        assert loop.drawn == 3
        assert set(loop.constraint.radii) == set(parameters(toy()))
        assert_inside_ball(loop.model, parameters(toy()), loop.constraint.radii, "l2")
        assert min(row["ratio"] for row in loop.constraint.report()) < 0.9
    else:  # buffers, too
        mixed = {n: torch.lerp(anchors[n], v, 0.5) if v.is_floating_point() else v for n, v in tuned.items()}
        torch.testing.assert_close(values(loop.model), mixed)
    shown = loop.constraint.report(), loop.constraint.radii
    assert len(shown[0]) >= len(parameters(toy()))
    loop.constraint.remove()
    assert_same((loop.constraint.report(), loop.constraint.radii), shown)


def test_methods_that_act_at_the_end_need_no_optimizer() -> None:
    model = toy()
    constraint = constrain(model, WiSEFT(0.0))
    with torch.no_grad():
        model.scale.add_(1)
    constraint.finish()
    assert_same(values(model), values(toy()))


# --- wrappers ---

HEAD = ("head.*",)


@pytest.mark.parametrize("name", ["TPGM mars", "DiGraP", "AnchorDecay"])
def test_in_a_compiled_model(name: str) -> None:
    case = CASES[name]
    loop = Loop(case, model=torch.compile(toy(), backend="eager"), exclude=HEAD).train(TRAIN)
    found = loop.outcome()
    found["weights"] = {name.removeprefix("_orig_mod."): value for name, value in found["weights"].items()}
    assert_same(found, plain_outcome(case, exclude=HEAD))


def test_in_fabric(case: Case) -> None:
    """With a closure where the gradients are changed in it."""
    step = closure_by_position if case.make().changes_gradients else backward_first
    fabric = Fabric(accelerator="cpu", devices=1)
    expected = plain_outcome(case, exclude=HEAD)
    model, optimizer = fabric.setup(own := toy(), sgd(own.parameters()))
    loop = Loop(case, lambda _: optimizer, model, backward=fabric.backward, step=step, exclude=HEAD).train(TRAIN)
    assert_same(loop.outcome(), expected)
    assert_same(values(own), expected["weights"])
    assert len(hooks_of(optimizer.optimizer)) == 2


# --- float64 twins ---


def run_plain(module: WithOptimizer, method: Method, by_hand: ByHand) -> Constraint:
    """In both loops the tensor without gradient is apart from its anchor: it is to stay where it is."""
    with torch.no_grad():
        module.get_parameter("unmoved").add_(1)
        by_hand.weights["unmoved"].add_(1)
    optimizer = module.configure_optimizers()
    constraint = constrain(module, method, [optimizer], pretrained=by_hand.anchors)
    for x in by_hand.train:
        optimizer.zero_grad()
        module.training_step((x[None],), 0).backward()
        optimizer.step()
    return constraint


@pytest.mark.parametrize("radius_lr", [0.02, "auto"])
@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_tpgm_float64_loop(norm: str, radius_lr: float | str) -> None:
    module = Tensors(scale=1.0, lr=0.05, seed=1)
    anchors = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    train, held_out = (torch.randn(n, 64, generator=generator, dtype=torch.float64) for n in (STEPS, 4))
    reference = ReferenceTPGM(anchors, norm, radius_lr=radius_lr, radius_steps=2, every_n_steps=2)
    radii, weights = reference_run(module, reference, train, cycle(held_out))

    drawn, optimizer = cycle(held_out), module.configure_optimizers()
    method = TPGM(radius_lr, "mars" if norm == "mars" else "l2", radius_steps=2, every_n_steps=2)
    constraint = constrain(
        module, method, optimizer, held_out_loss=lambda: module.training_step((next(drawn)[None],), 0)
    )
    for x, expected in zip(train, radii, strict=True):
        optimizer.zero_grad()
        module.training_step((x[None],), 0).backward()
        optimizer.step()
        assert constraint.radii == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    torch.testing.assert_close(parameters(module), weights, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("optimizer", FLOAT64_OPTIMIZERS)
def test_ftp_float64_loop(optimizer: str, norm: str) -> None:
    module, by_hand, _ = start(optimizer, seed=3)
    reference = ReferenceFTP(by_hand.anchors, k=0.5, radius_lr=0.02, norm=norm)
    constraint = run_plain(module, FTP(0.5, 0.02, "mars" if norm == "mars" else "l2"), by_hand)
    for x in by_hand.train:
        by_hand.backward(x)
        by_hand.optimizer.step()
        by_hand.write(reference.after_step(by_hand.values(), by_hand.grads))
    assert_close_to_loop(module, by_hand)
    used = {name: radius for name, radius in constraint.radii.items() if name != "unmoved"}
    assert used == pytest.approx({name: reference.radii[name] for name in used}, rel=1e-9)


@pytest.mark.parametrize("optimizer", FLOAT64_OPTIMIZERS)
def test_spd_float64_loop(optimizer: str) -> None:
    module, by_hand, _ = start(optimizer, seed=7)
    reference = ReferenceSPD(by_hand.anchors, 0.9)
    run_plain(module, SPD(0.9), by_hand)
    for x in by_hand.train:
        by_hand.backward(x)
        before = by_hand.values()
        by_hand.optimizer.step()
        by_hand.write(reference.after_step(before, by_hand.values(), by_hand.grads))
    assert_close_to_loop(module, by_hand)


@pytest.mark.parametrize("optimizer", FLOAT64_OPTIMIZERS)
def test_l2sp_float64_loop(optimizer: str) -> None:
    module, by_hand, _ = start(optimizer, seed=9)
    reference = ReferenceL2SP(by_hand.anchors, 0.5)
    run_plain(module, L2SP(0.5), by_hand)
    for x in by_hand.train:
        by_hand.backward(x)
        by_hand.write_grads(reference.change_gradients(by_hand.values(), by_hand.grads))
        by_hand.optimizer.step()
    assert_close_to_loop(module, by_hand)


def test_digrap_float64_loop() -> None:
    module, by_hand, _ = start("sgd", seed=11)
    used = {name: anchor for name, anchor in by_hand.anchors.items() if name != "unmoved"}
    reference = ReferenceDiGraP(used, 0.3)
    constraint = run_plain(module, DiGraP(0.3), by_hand)
    for x in by_hand.train:
        by_hand.backward(x)
        grads = {name: grad for name, grad in by_hand.grads.items() if grad is not None}
        by_hand.write_grads(dict(reference.change_gradients(by_hand.values(), grads, lr=0.05)))
        by_hand.optimizer.step()
    assert_close_to_loop(module, by_hand)
    omegas = {row["name"]: row["omega"] for row in constraint.report() if row["name"] != "unmoved"}
    assert omegas == pytest.approx(reference.omegas, rel=1e-9)
    assert max(omegas.values()) > 0, "the data should call for a projection sometimes"


class ReferenceAnchorDecay:
    """Decoupled L2-SP: W0 + (1 - lr lambda) D after a step, for each tensor that the step had a gradient of."""

    def __init__(self, anchors: Values, decay: float) -> None:
        self.anchors = {name: anchor.detach().double().clone() for name, anchor in anchors.items()}
        self.decay = decay

    def after_step(self, weights: Values, grads: dict[str, Tensor | None], lrs: dict[str, float]) -> Values:
        """The decayed weights, given those after the step, and the gradients and learning rates that it used."""
        decayed = {}
        for name, anchor in self.anchors.items():
            weight = weights[name].detach().double()
            kept = min(max(1 - lrs[name] * self.decay, 0.0), 1.0)
            decayed[name] = weight if grads[name] is None else anchor + kept * (weight - anchor)
        return decayed


def two_rates(make: Callable[..., Optimizer], params: list[Tensor]) -> Optimizer:
    return make([{"params": params[:2], "lr": 0.05}, {"params": params[2:], "lr": 0.2}])


ANCHOR_DECAY_OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "sgd": partial(two_rates, partial(torch.optim.SGD, momentum=0.9)),
    "adamw": partial(two_rates, partial(torch.optim.AdamW, weight_decay=0.0)),
}


@pytest.mark.parametrize("strength", [0.01, 2.0, 10.0], ids=["weak", "strong", "to the anchor"])
@pytest.mark.parametrize("optimizer", ANCHOR_DECAY_OPTIMIZERS)
def test_anchor_decay_float64_loop(optimizer: str, strength: float) -> None:
    """Two groups of parameters with rates of their own; a rate times strength above 1 stops at the anchor."""
    module = WithOptimizer(ANCHOR_DECAY_OPTIMIZERS[optimizer], seed=13)
    train = torch.randn(STEPS, 64, generator=torch.Generator().manual_seed(14), dtype=torch.float64)
    by_hand = ByHand(module, train)
    reference = ReferenceAnchorDecay(by_hand.anchors, strength)
    run_plain(module, AnchorDecay(strength), by_hand)
    lrs = {name: 0.05 if i < 2 else 0.2 for i, name in enumerate(by_hand.anchors)}
    for x in train:
        by_hand.backward(x)
        by_hand.optimizer.step()
        by_hand.write(reference.after_step(by_hand.values(), by_hand.grads, lrs))
    assert_close_to_loop(module, by_hand)
    moved = [not torch.equal(weight, by_hand.anchors[name]) for name, weight in by_hand.values().items()]
    assert sum(moved) == (3 if strength == 10.0 else len(moved))


def test_anchor_decay_follows_a_schedule() -> None:
    """The rate is the one that the step used."""
    module = WithOptimizer(ANCHOR_DECAY_OPTIMIZERS["sgd"], seed=15)
    train = torch.randn(STEPS, 64, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    by_hand = ByHand(module, train)
    reference = ReferenceAnchorDecay(by_hand.anchors, 2.0)
    optimizer = module.configure_optimizers()
    constrain(module, AnchorDecay(2.0), optimizer)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (optimizer, by_hand.optimizer)]
    for i, x in enumerate(train):
        optimizer.zero_grad()
        module.training_step((x[None],), 0).backward()
        optimizer.step()
        by_hand.backward(x)
        by_hand.optimizer.step()
        lrs = {name: (0.05 if j < 2 else 0.2) * 0.5**i for j, name in enumerate(by_hand.anchors)}
        by_hand.write(reference.after_step(by_hand.values(), by_hand.grads, lrs))
        for schedule in schedules:
            schedule.step()
    assert_close_to_loop(module, by_hand)


def test_errors_of_what_is_passed() -> None:
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    with pytest.raises(
        TypeError, match=r"^`method` should be an object of lightning_tpgm.methods, TPGM\(\) for instance"
    ):
        constrain(linear, FTP, optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^`exclude` should be a sequence of patterns, found 'bias'. Write \['bias'\]"):
        constrain(linear, FTP(), optimizer, exclude="bias")
    elsewhere = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    for others, count in (((), 0), (elsewhere, 1)):
        with pytest.raises(
            ValueError, match=rf"^FTP acts in the steps of `optimizers`, found {count} of them, which step"
        ):
            constrain(linear, FTP(), others)
    constraint = constrain(linear, FTP(), [optimizer, optimizer])
    assert len(constraint.steps.optimizers) == 1
    state = constraint.state_dict()
    del (older := dict(state))["of"]
    with pytest.raises(ValueError, match=r"^The state is not one of DiGraP: it lacks 'omegas'"):
        constrain(linear, DiGraP(), optimizer).load_state_dict(older)
    constraint.load_state_dict(older)
    constraint.load_state_dict(state)
    constraint.remove()
    with pytest.raises(ValueError, match=r"^FTP is attached to no model. Call load_state_dict before remove"):
        constraint.load_state_dict(state)


@pytest.mark.parametrize("make", [SPD, FTP, TPGM])
@pytest.mark.parametrize("removed", [True, False])
def test_a_method_object_is_of_one_model(make: type[Method], removed: bool) -> None:
    """Also after `remove`: what was learned can still be asked for."""
    first, second = nn.Linear(2, 2), nn.Linear(3, 3)
    method = make()
    losses = [partial(mse, model, HELD_OUT[0]) if make is TPGM else None for model in (first, second)]
    constraint = constrain(first, method, torch.optim.SGD(first.parameters(), lr=0.1), held_out_loss=losses[0])
    if removed:
        constraint.remove()
    before, held_out = constraint.state_dict(), getattr(method, "held_out", None)
    optimizer = torch.optim.SGD(second.parameters(), lr=0.1)
    refused = rf"^`method` has been given to a model before, .* Pass a new {make.__name__} for each model\.$"
    with pytest.raises(ValueError, match=refused):
        constrain(second, method, optimizer, held_out_loss=losses[1])
    assert hooks_of(optimizer) == []
    assert_same(constraint.state_dict(), before)
    assert getattr(method, "held_out", None) is held_out


class Own(FTP):
    """A method of somebody else's."""


@pytest.mark.parametrize("make", [SPD, TPGM, lambda: FTP(norm="l2"), Own], ids=["SPD", "TPGM", "l2", "Own"])
def test_a_state_of_another_method_is_refused_before_anything_is_touched(make: Callable[[], Method]) -> None:
    def trained(method: Method) -> Constraint:
        linear = nn.Linear(2, 2)
        optimizer, x = torch.optim.SGD(linear.parameters(), lr=0.1), torch.randn(4, 2)
        held_out = (lambda: linear(x).square().mean()) if isinstance(method, TPGM) else None
        constraint = constrain(linear, method, optimizer, held_out_loss=held_out)
        for _ in range(3):
            optimizer.zero_grad()
            linear(x).square().mean().backward()
            optimizer.step()
        return constraint

    one, other = trained(FTP()), trained(make())
    for constraint, found in ((one, other), (other, one)):
        before = constraint.state_dict()
        kinds = [
            f"{type(of.method).__name__} with norm {of.method.norm!r}".replace("'", ".") for of in (constraint, found)
        ]
        refused = f"^The state should be one of {kinds[0]}, found one of {kinds[1]}. Go on with the method and the norm"
        with pytest.raises(ValueError, match=refused):
            constraint.load_state_dict(found.state_dict())
        assert_same(constraint.state_dict(), before)
    fresh = trained(make())
    fresh.load_state_dict(other.state_dict())
    assert_same(fresh.state_dict()["method"], other.state_dict()["method"])


@pytest.mark.parametrize("take", ["load_state_dict", "load", "recall"])
def test_a_state_of_another_norm_is_refused_by_whatever_takes_it(take: str) -> None:
    """In mid-fit a tuner puts one back, and a copy has one of no model."""
    linear = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    mars, l2 = (constrain(linear, FTP(norm=norm), optimizer) for norm in ("mars", "l2"))
    with pytest.raises(ValueError, match=r"^The state should be one of FTP with norm 'mars', found one of FTP with"):
        getattr(mars, take)(l2.state_dict())
