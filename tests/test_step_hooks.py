"""`lightning_tpgm.steps.Steps`: what counts as a step of an optimizer, and when it begins and ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_tpgm.methods import Step
from lightning_tpgm.steps import Steps

ONE_STEP = ["before 0", "gradients 0", "after 0"]


class Log:
    """`Steps` that write down what they call, with the index of the optimizer."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.seen: list[str] = []
        self.by: list[Optimizer] = []  # whose steps
        self.steps = Steps(self.note("before"), self.note("gradients"), self.note("after"))
        self.steps.follow(optimizers)

    def note(self, what: str) -> Callable[[Step], None]:
        def noted(step: Step) -> None:
            self.seen.append(f"{what} {step.index}")
            self.by.append(step.optimizer)

        return noted

    def take(self) -> list[str]:
        """What was seen since it was asked for."""
        seen, self.seen = self.seen, []
        return seen


def sgd(lr: float = 0.1) -> SGD:
    """Over one weight of its own, with a gradient."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    return SGD([weight], lr=lr)


def weight_of(optimizer: Optimizer) -> Tensor:
    weight: Tensor = optimizer.param_groups[0]["params"][0]
    return weight.detach().clone()


def hooks_of(optimizer: Optimizer) -> list[Any]:
    return [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]


# --- one step ---


def test_a_step_without_closure() -> None:
    log = Log(optimizer := sgd())
    before = weight_of(optimizer)
    optimizer.step()
    assert log.take() == ONE_STEP
    assert log.by == [optimizer] * 3
    assert not torch.equal(weight_of(optimizer), before)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert log.take() == 2 * ONE_STEP


def test_when_it_is_called() -> None:
    """Before and gradients: the weights are the old ones. After: they are the new ones."""
    optimizer, seen = sgd(), list[float]()

    def look(step: Step) -> None:
        seen.append(float(weight_of(step.optimizer)[0]))

    steps = Steps(look, look, look)
    steps.follow([optimizer])
    optimizer.step()
    assert seen == pytest.approx([1.0, 1.0, 0.9])


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_step_with_closure(by_keyword: bool) -> None:
    """The gradients are there when the closure has been called; what it returns is returned."""
    log = Log(optimizer := sgd())

    def closure() -> float:
        log.seen.append("closure")
        return 3.0

    loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)  # type: ignore[call-overload]
    assert loss == 3.0
    assert log.take() == ["before 0", "closure", "gradients 0", "after 0"]


def test_a_closure_that_is_called_again_and_again() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=3)
    log = Log(optimizer)

    def closure() -> Tensor:
        log.seen.append("closure")
        optimizer.zero_grad()
        loss = weight.pow(4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    seen = log.take()
    assert seen[0] == "before 0"
    assert seen[1:-1] == ["closure", "gradients 0"] * 3
    assert seen[-1] == "after 0"


def test_two_that_follow_one_optimizer() -> None:
    """Each of them sees the step, and the gradients of a closure once per call."""
    first, second = Log(optimizer := sgd()), Log(optimizer)
    optimizer.step(lambda: 1.0)
    optimizer.step()
    assert first.take() == second.take() == 2 * ONE_STEP


# --- steps within steps ---


class Decaying(SGD):
    """Its step calls the inherited one, which is a call of a hooked `step` as well."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)
        return loss


class Around(Optimizer):
    """Wraps optimizers, has their groups, and steps all of them.

    Args:
        inner: The optimizers.
        allowed: An error that ends an inner step alone.
    """

    def __init__(self, *inner: Optimizer, allowed: type[Exception] | tuple[()] = ()) -> None:
        self.inner, self.allowed = inner, allowed
        super().__init__([group for optimizer in inner for group in optimizer.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        return [self._step(optimizer, closure) for optimizer in self.inner]

    def _step(self, optimizer: Optimizer, closure: Any) -> Any:
        try:
            return optimizer.step(closure)
        except self.allowed:
            return None


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_that_calls_the_inherited_one_is_one(with_closure: bool) -> None:
    weight, seen = nn.Parameter(torch.ones(2)), list[float]()
    weight.grad = torch.ones(2)
    log = Log(optimizer := Decaying([weight], lr=0.1))
    after = Steps(lambda step: None, lambda step: None, lambda step: seen.append(float(weight_of(step.optimizer)[0])))
    after.follow([optimizer])
    for _ in range(2):
        optimizer.step(*([lambda: 1.0] if with_closure else []))
        assert log.take() == ONE_STEP
    assert seen == pytest.approx([0.45, 0.175])  # the whole step is over


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("outer_first", [False, True])
def test_a_step_of_an_optimizer_that_wraps_another_is_one(with_closure: bool, outer_first: bool) -> None:
    """It is the outer one's, whatever the order that they are followed in."""
    inner = sgd()
    outer = Around(inner)
    log = Log(*((outer, inner) if outer_first else (inner, outer)))
    index = 0 if outer_first else 1
    for _ in range(2):
        outer.step(*([lambda: 1.0] if with_closure else []))
        assert log.take() == [f"before {index}", f"gradients {index}", f"after {index}"]
        assert {id(optimizer) for optimizer in log.by} == {id(outer)}
    inner.step()  # by itself
    assert log.take() == [f"{what} {1 - index}" for what in ("before", "gradients", "after")]


def test_a_wrapper_of_two_is_one_step() -> None:
    left, right = sgd(), sgd()
    log = Log(outer := Around(left, right), left, right)
    outer.step()
    assert log.take() == ONE_STEP
    left.step()
    right.step()
    assert log.take() == [f"{what} {index}" for index in (1, 2) for what in ("before", "gradients", "after")]


def test_the_inner_one_alone_is_followed() -> None:
    inner = sgd()
    log = Log(inner)
    Around(inner).step()
    assert log.take() == ONE_STEP


# --- steps that raise ---


class Stop(RuntimeError):
    pass


def raising(error: type[BaseException]) -> Callable[[], float]:
    def closure() -> float:
        raise error

    return closure


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("make", [sgd, lambda: Decaying(sgd().param_groups), lambda: Around(sgd())])
def test_a_step_that_raises_hides_no_later_one(make: Callable[[], Optimizer], error: type[BaseException]) -> None:
    optimizer = make()
    inner = optimizer.inner if isinstance(optimizer, Around) else ()
    log = Log(optimizer, *inner)
    for _ in range(2):
        with pytest.raises(error):
            optimizer.step(raising(error))
        assert log.take() == ["before 0"]
    for _ in range(2):
        optimizer.step()
        assert log.take() == ONE_STEP


def test_a_step_that_raises_within_another_function() -> None:
    """The one that raised was taken deeper down, or higher up, than the next."""
    log = Log(optimizer := sgd())

    def deep(depth: int, closure: Any = None) -> None:
        if depth:
            deep(depth - 1, closure)
        else:
            optimizer.step(closure)

    for depth, next_depth in ((3, 0), (0, 3)):
        with pytest.raises(Stop):
            deep(depth, raising(Stop))
        log.take()
        deep(next_depth)
        assert log.take() == ONE_STEP


def test_a_step_taken_while_the_error_of_another_is_handled() -> None:
    log = Log(optimizer := sgd())
    try:
        optimizer.step(raising(Stop))
    except Stop:
        optimizer.step()
    assert log.take() == ["before 0", *ONE_STEP]


@pytest.mark.parametrize("which", [0, 1])
def test_an_inner_step_whose_error_the_outer_one_catches(which: int) -> None:
    """The outer step goes on to its end: it is a step."""
    inner = [sgd(), sgd()]
    log = Log(outer := Around(*inner, allowed=Stop), *inner)
    losses = [1.0, 1.0]
    losses[which] = Stop  # type: ignore[call-overload]
    calls = iter(losses)

    def closure() -> float:
        loss = next(calls)
        if loss is Stop:
            raise Stop
        return loss

    outer.step(closure)
    assert [float(weight_of(optimizer)[0]) < 1 for optimizer in inner] == [which == 1, which == 0]
    assert [noted for noted in log.take() if "gradients" not in noted] == ["before 0", "after 0"]
    outer.step()
    assert log.take() == ONE_STEP


@pytest.mark.parametrize("what", ["before", "gradients", "after"])
def test_a_step_that_the_follower_refuses(what: str) -> None:
    """An error of ours reaches the user, and hides no later step."""
    optimizer, seen, refuses = sgd(), list[str](), True

    def on(moment: str) -> Callable[[Step], None]:
        def noted(step: Step) -> None:
            if refuses and moment == what:
                raise Stop
            seen.append(f"{moment} {step.index}")

        return noted

    steps = Steps(on("before"), on("gradients"), on("after"))
    steps.follow([optimizer])
    with pytest.raises(Stop):
        optimizer.step()
    refuses, seen[:] = False, []
    optimizer.step()
    assert seen == ONE_STEP


# --- which optimizers are followed ---


def test_following_the_same_ones_again_doubles_nothing() -> None:
    optimizers = [sgd(), sgd()]
    log = Log(*optimizers)
    log.steps.follow(iter(optimizers))
    log.steps.follow(LightningOptimizer(optimizer) for optimizer in optimizers)
    assert [len(hooks_of(optimizer)) for optimizer in optimizers] == [2, 2]
    optimizers[0].step()
    assert log.take() == ONE_STEP


def test_following_the_same_ones_within_a_step_does_not_interrupt_it() -> None:
    log = Log(optimizer := sgd())

    def closure() -> float:
        log.steps.follow([optimizer])
        return 1.0

    optimizer.step(closure)
    assert log.take() == ONE_STEP


def test_following_others_drops_the_old() -> None:
    old, kept, new = sgd(), sgd(), sgd()
    log = Log(old, kept)
    log.steps.follow([kept, new])
    assert [len(hooks_of(optimizer)) for optimizer in (old, kept, new)] == [0, 2, 2]
    for optimizer in (old, kept, new):
        optimizer.step()
    assert log.take() == [f"{what} {index}" for index in (0, 1) for what in ("before", "gradients", "after")]
    assert log.by == [kept] * 3 + [new] * 3


def test_another_order_gives_other_indexes() -> None:
    first, second = sgd(), sgd()
    log = Log(first, second)
    log.steps.follow([second, first])
    first.step()
    assert log.take() == ["before 1", "gradients 1", "after 1"]
    assert [len(hooks_of(optimizer)) for optimizer in (first, second)] == [2, 2]


def test_indexes() -> None:
    optimizers = [sgd(), sgd(), sgd()]
    log = Log(*optimizers)
    for index in (2, 0, 1):
        optimizers[index].step()
        assert log.take() == [f"before {index}", f"gradients {index}", f"after {index}"]
        assert log.steps.step_of(optimizers[index]) == Step(optimizers[index], index)
    assert log.steps.step_of(sgd()) is None


def lightning(optimizer: Optimizer) -> Optimizer:
    return LightningOptimizer(optimizer)


def fabric(optimizer: Optimizer) -> Optimizer:
    wrapped: Optimizer = Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)
    return wrapped


@pytest.mark.parametrize("wrap", [lightning, fabric])
def test_wrappers_stand_for_what_they_wrap(wrap: Callable[[Optimizer], Optimizer]) -> None:
    optimizer = sgd()
    log = Log(wrapped := wrap(optimizer))
    assert type(wrapped) is not SGD
    assert log.steps.optimizers == [optimizer]
    assert len(hooks_of(optimizer)) == 2
    optimizer.step()
    assert log.take() == ONE_STEP
    if wrap is fabric:
        wrapped.step()
        wrapped.step(lambda: 1.0)
        assert log.take() == 2 * ONE_STEP
    log.steps.stop()
    assert hooks_of(optimizer) == []


def test_an_optimizer_that_is_called_alike_is_none_of_these() -> None:
    """An attribute `optimizer` makes no wrapper."""
    inner = sgd()
    outer = Around(inner)
    outer.optimizer = inner  # type: ignore[attr-defined]
    log = Log(outer)
    outer.step()
    assert log.by == [outer] * 3


def test_stopped() -> None:
    """Hooks are gone but those of others, steps are not seen; it can begin anew."""
    optimizers = [sgd(), sgd()]
    others = list[str]()
    optimizers[0].register_step_post_hook(lambda *_: others.append("other"))
    log = Log(*optimizers)
    log.steps.stop()
    log.steps.stop()
    assert [len(hooks_of(optimizer)) for optimizer in optimizers] == [1, 0]
    assert log.steps.optimizers == []
    assert log.steps.step_of(optimizers[0]) is None
    optimizers[0].step()
    assert log.take() == []
    assert others == ["other"]
    log.steps.follow(optimizers)
    optimizers[0].step()
    assert log.take() == ONE_STEP


def test_stopped_after_a_step_that_raised() -> None:
    log = Log(optimizer := sgd())
    with pytest.raises(Stop):
        optimizer.step(raising(Stop))
    log.steps.stop()
    log.take()
    log.steps.follow([optimizer])
    optimizer.step()
    assert log.take() == ONE_STEP


def test_stopped_it_keeps_no_optimizer_alive() -> None:
    log = Log()

    def one_step(raises: bool) -> weakref.ref[Optimizer]:
        log.steps.follow([optimizer := sgd()])
        if raises:
            with pytest.raises(Stop):
                optimizer.step(raising(Stop))
        else:
            optimizer.step()
        log.by = []
        log.steps.stop()
        return weakref.ref(optimizer)

    optimizers = one_step(raises=False), one_step(raises=True)
    gc.collect()
    assert [optimizer() for optimizer in optimizers] == [None, None]


def test_whether_there_was_a_step() -> None:
    log = Log(optimizer := sgd())
    assert not log.steps.any_seen
    with pytest.raises(Stop):
        optimizer.step(raising(Stop))
    assert not log.steps.any_seen
    optimizer.step()
    assert log.steps.any_seen
    log.steps.any_seen = False
    log.steps.follow([optimizer])
    assert not log.steps.any_seen
    optimizer.step()
    assert log.steps.any_seen


def test_nothing_to_follow() -> None:
    log = Log()
    assert log.steps.optimizers == []
    log.steps.follow([optimizer := sgd()])
    assert len(hooks_of(optimizer)) == 2
    log.steps.follow([])
    assert hooks_of(optimizer) == []
