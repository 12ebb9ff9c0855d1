"""The steps of optimizers that somebody else takes: when they begin, when their gradients are there, when they end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_tpgm.methods.method import Step
from lightning_tpgm.optimizers import has_hooks, unwrapped

OnStep = Callable[[Step], None]


class Steps:
    """Calls functions around every step of some optimizers.

    What counts is a call of ``optimizer.step``, hooked with torch's own hooks. This is right under gradient
    accumulation, gradient scalers, several optimizers and steps by hand. A step that calls another one (of its base
    class, of an optimizer that it wraps) is one step.

    Args:
        before: Called before the step. The gradients may not be there: a closure may compute them.
        gradients: Called when they are there and not used yet: before the step, or after each call of its closure.
        after: Called after the step.

    Attributes:
        optimizers: Those that are followed.
        any_seen: Whether there was a step; set it to False to look again.
    """

    def __init__(self, before: OnStep, gradients: OnStep, after: OnStep) -> None:
        self._before, self._gradients, self._after = before, gradients, after
        self._handles: list[RemovableHandle] = []
        self._running: list[FrameType] = []  # the calls of `step` that are within each other now
        self.optimizers: list[Optimizer] = []
        self.any_seen = False

    def follows(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether these are the ones that are followed."""
        return [*map(id, _each(optimizers))] == [*map(id, self.optimizers)]

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow these optimizers, and no others any more; of wrappers without hooks of their own what they wrap."""
        found = _each(optimizers)
        self.stop()
        for optimizer in found:
            if not has_hooks(optimizer):
                raise TypeError(
                    f"{type(optimizer).__name__} has no hooks on its step, as every torch.optim.Optimizer has. Derive"
                    " it from that class and call super().__init__(params, defaults) in its constructor."
                )
        self.optimizers = found
        for index, optimizer in enumerate(found):
            if isinstance(optimizer, Optimizer):
                optimizer._patch_step_function()  # else the first `zero_grad` does, if its constructor did not
            self._handles += [
                optimizer.register_step_pre_hook(self._begins(index)),
                optimizer.register_step_post_hook(self._ends(index)),
            ]

    def stop(self) -> None:
        """Follow no optimizer any more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._running, self.optimizers = [], [], []

    def step_of(self, optimizer: Optimizer) -> Step | None:
        """A step of this optimizer, if it is followed, or what it wraps."""
        found = unwrapped(optimizer)
        return next((Step(o, index) for index, o in enumerate(self.optimizers) if o is found), None)

    def _begins(self, index: int) -> Callable[..., Any]:
        def begins(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            call = sys._getframe(1)
            # a step that raised has never come to its end: it is no call that this one is within
            self._running = [running for running in self._running if running in _callers(call)]
            self._running.append(call)
            if len(self._running) > 1:
                return None
            step = Step(optimizer, index)
            self._before(step)
            return self._with_gradients(step, args, kwargs)

        return begins

    def _with_gradients(self, step: Step, args: Any, kwargs: Any) -> Any:
        """Say when the gradients are there; if a closure computes them it is replaced by one that also says so."""
        closure = kwargs.get("closure", next(iter(args[1:]), None))  # the first is the optimizer
        if not callable(closure):
            self._gradients(step)
            return None

        def then(*closure_args: Any) -> Any:
            loss = closure(*closure_args)
            self._gradients(step)
            return loss

        return (args, {**kwargs, "closure": then}) if "closure" in kwargs else ((args[0], then, *args[2:]), kwargs)

    def _ends(self, index: int) -> Callable[..., None]:
        def ends(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            callers = [*_callers(sys._getframe(1))]  # whoever raised within this call is none
            self._running = [running for running in self._running if running in callers]
            self.any_seen = True
            if not self._running:
                self._after(Step(optimizer, index))

        return ends


def _each(optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """What is stepped in the end, each once."""
    return [*{id(found): found for found in map(unwrapped, optimizers)}.values()]


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        frame = frame.f_back
        if frame is not None:
            yield frame
