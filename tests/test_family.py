"""Invariant 2, "Exact method", for the methods beside TPGM: against the recording and independent float64 loops."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import DiGraPCallback, FTPCallback, L2SPCallback, SPDCallback, constrain
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.layout import Layout
from lightning_tpgm.methods import FTP, SPD, DiGraP, Step
from parity_model import BATCH_SIZE, load_recording
from properties import assert_same as assert_nested_same
from reference import ReferenceDiGraP, ReferenceFTP, ReferenceL2SP, ReferenceSPD
from test_exact_method import LitParity, Recorder, Tensors, assert_final, fit, loss_of
from toys import Toy, quiet_trainer, toy, train_loader, val_loader

STEPS = 12
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}


class WithOptimizer(Tensors):
    def __init__(self, optimizer: Optimizer, seed: int) -> None:
        super().__init__(scale=1.0, lr=0.0, seed=seed)
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(list(self.parameters()))


class ByHand:
    """The same module, batches and torch optimizer in a plain loop."""

    def __init__(self, module: WithOptimizer, train: Tensor) -> None:
        self.train = train
        self.weights = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
        self.anchors = {n: w.detach().clone() for n, w in self.weights.items()}
        self.optimizer = module.optimizer(list(self.weights.values()))

    @property
    def grads(self) -> dict[str, Tensor | None]:
        return {n: None if w.grad is None else w.grad.clone() for n, w in self.weights.items()}

    def values(self) -> dict[str, Tensor]:
        return {n: w.detach().clone() for n, w in self.weights.items()}

    def backward(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        loss_of(self.weights, x).backward()

    def write(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self.weights[name].copy_(value)

    def write_grads(self, grads: dict[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            self.weights[name].grad = grad


def start(optimizer: str, seed: int) -> tuple[WithOptimizer, ByHand, DataLoader]:
    module = WithOptimizer(OPTIMIZERS[optimizer], seed)
    train = torch.randn(STEPS, 64, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return module, ByHand(module, train), DataLoader(TensorDataset(train))


def assert_same(module: pl.LightningModule, by_hand: ByHand) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), by_hand.weights[name].detach(), rtol=1e-9, atol=1e-12)


# --- FTP ---


def test_ftp_recorded_trajectory() -> None:
    recording = load_recording("ftp_sgd_k1.npz")
    module = LitParity(recording)
    module.configure_optimizers = lambda: OPTIMIZERS["sgd"](list(module.parameters()))  # type: ignore[method-assign]
    callback = FTPCallback(k=1.0, radius_lr=1e-2, norm="mars", exclude=["*.head.*"])
    recorder = Recorder(callback)

    fit(module, [callback, recorder], DataLoader(TensorDataset(recording.train_x, recording.train_y), BATCH_SIZE))

    assert len(recorder.radii) == recording.steps == 30
    radii = torch.tensor([list(step.values()) for step in recorder.radii])
    torch.testing.assert_close(radii, recording.radii.float(), rtol=1e-5, atol=1e-6)
    assert_final(module.model, recording)


@pytest.mark.parametrize("k", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("radius_lr", [0.02, "auto"])
def test_ftp_float64_loop(radius_lr: float | str, optimizer: str, norm: str, k: float) -> None:
    module, by_hand, data = start(optimizer, seed=3)
    reference = ReferenceFTP(by_hand.anchors, k=k, radius_lr=radius_lr, norm=norm)
    callback = FTPCallback(k=k, radius_lr=radius_lr, norm=norm)
    recorder = Recorder(callback)
    fit(module, [callback, recorder], data, precision="64-true")
    for x, radii in zip(by_hand.train, recorder.radii, strict=True):
        by_hand.backward(x)
        grads = by_hand.grads
        by_hand.optimizer.step()
        by_hand.write(reference.after_step(by_hand.values(), grads))
        used = [name for name in radii if name != "unmoved"]  # no gradient: its radius stays where it started
        assert [radii[name] for name in used] == pytest.approx([reference.radii[name] for name in used], rel=1e-9)
    assert_same(module, by_hand)


def test_ftp_first_step_snaps_back_to_the_anchor() -> None:
    module, by_hand, data = start("sgd", seed=5)
    fit(module, [FTPCallback()], data, precision="64-true", max_steps=1)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), by_hand.anchors[name], rtol=0, atol=1e-8)


def test_ftp_goes_on_from_each_tensors_own_last_step() -> None:
    """Steps leave tensors out, and the distances of the last step are known without being measured again."""
    torch.manual_seed(0)
    module = torch.nn.ParameterDict({"a": torch.randn(3, 4), "b": torch.randn(5)}).double()
    reference = ReferenceFTP(dict(module.named_parameters()), radius_lr=0.02)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    constraint = constrain(module, FTP(radius_lr=0.02), optimizer)
    for step in range(9):
        # much the same way at every step, so that radii grow
        grads = {name: 1 + 0.3 * torch.randn_like(weight) for name, weight in module.named_parameters()}
        taken: dict[str, Tensor | None] = {**grads, "b": None} if step in (2, 3, 6) else {**grads}
        moved = {}
        for name, weight in module.named_parameters():
            weight.grad = grad = taken[name]
            moved[name] = weight.detach().clone() if grad is None else weight.detach() - 0.1 * grad
        optimizer.step()
        for name, expected in reference.after_step(moved, taken).items():
            torch.testing.assert_close(module[name].detach(), expected, rtol=1e-9, atol=1e-12)
        assert constraint.radii == pytest.approx(reference.radii, rel=1e-9)


def test_ftp_begins_with_the_first_step_that_has_a_gradient() -> None:
    """Until then a tensor has no radius, and its Adam has counted no step."""
    module = torch.nn.ParameterDict({"a": torch.zeros(4), "b": torch.zeros(5)})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    method = FTP()
    constraint = constrain(module, method, optimizer)
    for step in range(4):
        for name, weight in module.items():
            weight.grad = None if name == "b" and step < 2 else torch.ones_like(weight)
        optimizer.step()
        assert method.radii.step.tolist() == [step + 1, max(0, step - 1)]
        assert (constraint.radii["b"] == constraint.radii["b"]) == (step >= 2)


def test_ftp_averages_over_each_tensors_own_steps() -> None:
    module = torch.nn.ParameterDict({"a": torch.zeros(4), "b": torch.zeros(5)})
    optimizer, method, seen = torch.optim.SGD(module.parameters(), lr=0.1), FTP(), []
    constrain(module, method, optimizer)
    for step in range(5):
        for name, weight in module.items():
            weight.grad = None if name == "b" and step % 2 == 0 else torch.full_like(weight, 1.0 + step)
        optimizer.step()
        seen += [method.radii.reach[1]] if step % 2 else []
    assert float(method.radii.wanted[1]) == pytest.approx(float(sum(seen)) / 2)


class SomeSteps:
    """Two tensors under a method, and steps of SGD with gradients of one's own, much the same way each time."""

    def __init__(self, method: Any, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.method = method
        self.module = torch.nn.ParameterDict({"a": torch.randn(3, 4), "b": torch.randn(5).to(dtype)})
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1)
        self.constraint = constrain(self.module, method, self.optimizer)

    def take(self, count: int, seed: int, scale: float = 1.0, frozen: Sequence[str] = ()) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for name, weight in self.module.items():
                grad = scale * (1 + 0.3 * torch.randn(weight.shape, generator=generator))
                weight.requires_grad_(name not in frozen)
                weight.grad = None if name in frozen else grad.to(weight.dtype)
            self.optimizer.step()


@pytest.mark.parametrize("method", [FTP, DiGraP])
def test_a_state_is_put_back_in_the_middle(method: Any) -> None:
    """As a tuner does that tries some steps: nothing of these is left."""
    found = []
    for tries in (0, 3):
        run = SomeSteps(method())
        run.take(4, seed=1)
        state, weights = deepcopy((run.constraint.state_dict(), run.module.state_dict()))
        run.take(tries, seed=2, scale=100.0)
        run.module.load_state_dict(weights)
        run.constraint.load(state)
        run.take(3, seed=3)
        found.append(run.constraint.state_dict()["method"])
    assert_nested_same(*found)


def test_ftp_knows_no_distances_of_rounded_deviations() -> None:
    """A tensor of 16 bits is stepped every second time; what was known of the other one is not known any more."""
    radii = []
    for forgets in (False, True):
        run = SomeSteps(FTP(radius_lr=0.02), torch.bfloat16)
        for step in range(6):
            run.take(1, seed=step, scale=1.0 + step, frozen=["b"] if step % 2 else [])
            if forgets:
                run.method._last_rows = None
        radii.append(run.constraint.radii["a"])
    assert radii[0] == radii[1]


def test_ftp_measures_rounded_deviations_anew() -> None:
    """As after a resume: the deviations of 16 bits that it remembers are a little other ones."""
    radii = []
    for forgets in (False, True):
        run = SomeSteps(FTP(radius_lr=0.02), torch.bfloat16)
        for step in range(4):
            run.take(1, seed=step, scale=1.0 + step)
            if forgets:
                run.method._last_rows = None
        radii.append(run.constraint.radii)
    assert radii[0] == radii[1]


@pytest.mark.parametrize("method", [FTP, DiGraP])
def test_an_older_checkpoint_goes_on_after_a_step_that_learns_nothing(method: Any) -> None:
    run, name = SomeSteps(method()), {FTP: "unprojected", DiGraP: "unstepped"}[method]
    run.take(5, seed=1)
    state = run.constraint.state_dict()
    learned = "radii" if method is FTP else "omegas"
    before = state["method"][learned]
    state["method"]["previous"] = state["method"].pop(name)
    run.constraint.load_state_dict(state)
    run.take(1, seed=2)
    after = run.constraint.state_dict()["method"][learned]
    assert torch.equal(after["exp_avg"], before["exp_avg"])
    assert torch.equal(after["step"], before["step"] + (method is FTP))
    run.take(1, seed=3)
    assert not torch.equal(run.constraint.state_dict()["method"][learned]["exp_avg"], before["exp_avg"])


# --- SPD, L2-SP, DiGraP ---


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_spd_float64_loop(optimizer: str, strength: float) -> None:
    module, by_hand, data = start(optimizer, seed=7)
    reference = ReferenceSPD(by_hand.anchors, strength)
    fit(module, [SPDCallback(strength)], data, precision="64-true")
    decayed = 0
    for x in by_hand.train:
        by_hand.backward(x)
        before, grads = by_hand.values(), by_hand.grads
        by_hand.optimizer.step()
        after = reference.after_step(before, by_hand.values(), grads)
        decayed += sum(not torch.equal(after[name], weight) for name, weight in by_hand.values().items())
        by_hand.write(after)
    assert 0 < decayed < STEPS * len(by_hand.weights), "the data should call for decay sometimes"
    assert_same(module, by_hand)


@pytest.mark.parametrize("callback", [SPDCallback, DiGraPCallback])
def test_devices_agree_on_what_is_left_alone(callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU what does not change is not written; on other devices the host would wait to know, and all is."""
    found, left = [], []
    look = Constrained.may_be_some
    for waits in (False, True):

        def some(tensors: Constrained, amounts: Tensor, waits: bool = waits) -> list[bool]:
            left.append(look(tensors, amounts).count(False))
            return [True] * len(tensors.names) if waits else look(tensors, amounts)

        monkeypatch.setattr(Constrained, "may_be_some", some)
        module, _, data = start("sgd", seed=7)
        fit(module, [callback()], data, precision="64-true")
        found.append([parameter.tolist() for parameter in module.parameters()])
    assert found[0] == found[1]
    assert sum(left) > 0


@pytest.mark.parametrize("points_back", [True, False])
def test_on_a_cpu_spd_writes_what_decays(points_back: bool) -> None:
    weight = nn.Parameter(torch.ones(2))
    tensors = Constrained({"weight": weight}, {"weight": torch.zeros(2)}, "l2")
    method, step = SPD(), Step(torch.optim.SGD([weight]), 0)
    with torch.no_grad():
        method.before(tensors, step)
        weight.mul_(3)  # whatever the gradient says
        weight.grad = torch.ones(2) if points_back else -torch.ones(2)
        version = weight._version
        method.after(tensors, step)
    assert weight.tolist() == pytest.approx([1, 1] if points_back else [3, 3])
    assert (weight._version > version) is points_back


@pytest.mark.parametrize("strength", [0.01, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_l2sp_float64_loop(optimizer: str, strength: float) -> None:
    module, by_hand, data = start(optimizer, seed=9)
    reference = ReferenceL2SP(by_hand.anchors, strength)
    fit(module, [L2SPCallback(strength)], data, precision="64-true")
    for x in by_hand.train:
        by_hand.backward(x)
        by_hand.write_grads(reference.change_gradients(by_hand.values(), by_hand.grads))
        by_hand.optimizer.step()
    assert_same(module, by_hand)


def test_l2sp_is_added_before_clipping() -> None:
    module, by_hand, data = start("sgd", seed=9)
    reference = ReferenceL2SP(by_hand.anchors, 5.0)
    fit(module, [L2SPCallback(5.0)], data, precision="64-true", gradient_clip_val=0.1)
    for x in by_hand.train:
        by_hand.backward(x)
        by_hand.write_grads(reference.change_gradients(by_hand.values(), by_hand.grads))
        torch.nn.utils.clip_grad_norm_(list(by_hand.weights.values()), 0.1)
        by_hand.optimizer.step()
    assert_same(module, by_hand)


@pytest.mark.parametrize("omega_lr", [0.01, 0.3])
def test_digrap_float64_loop(omega_lr: float) -> None:
    module, by_hand, data = start("sgd", seed=11)
    reference = ReferenceDiGraP(by_hand.anchors, omega_lr)
    callback = DiGraPCallback(omega_lr)
    fit(module, [callback], data, precision="64-true")
    used = {name: anchor for name, anchor in by_hand.anchors.items() if name != "unmoved"}
    reference.anchors = used
    for x in by_hand.train:
        by_hand.backward(x)
        grads = {name: by_hand.grads[name] for name in used}
        by_hand.write_grads(reference.change_gradients(by_hand.values(), grads, lr=0.05))
        by_hand.optimizer.step()
    omegas = {name: value for name, value in callback.omegas.items() if name != "unmoved"}
    assert omegas == pytest.approx({name: reference.omegas[name] for name in used}, rel=1e-5, abs=1e-7)
    assert max(omegas.values()) > 0, "the data should call for a projection sometimes"
    for name, parameter in module.named_parameters():  # omega is float32
        torch.testing.assert_close(parameter.detach(), by_hand.weights[name].detach(), rtol=1e-5, atol=1e-7)


def test_spd_never_keeps_two_copies_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may begin twice, before and after its closure: what the one kept is gone when the other keeps."""
    made: list[weakref.ref[Tensor]] = []
    spare = Layout.spare

    def counted(self: Layout) -> list[Tensor | None]:
        assert not any(copy() is not None for copy in made)
        found = spare(self)
        made.extend(weakref.ref(copy) for copy in found if copy is not None)
        return found

    monkeypatch.setattr(Layout, "spare", counted)
    module = toy()
    module.large = nn.Linear(200, 200)
    module.loss = lambda batch: Toy.loss(module, batch) + module.large(torch.ones(200)).square().mean()
    quiet_trainer(SPDCallback(), max_epochs=1).fit(module, train_loader(), val_loader())
    assert len(made) > 1  # of the first step's two beginnings


def test_spd_copies_the_weights_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in the first one of a fit: its closure comes between the anchors of before and those that count."""
    kept: list[int] = []
    keep = Constrained.keep
    monkeypatch.setattr(Constrained, "keep", lambda self: kept.append(len(self.names)) or keep(self))
    quiet_trainer(SPDCallback(), max_epochs=1).fit(toy(), train_loader(6), val_loader())
    assert len(kept) == 6 + 1
