"""A method at work on a model, in the steps of its optimizers, and what users see of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, suppress

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.anchors import AnchorDevice
from lightning_tpgm.attached import Attached, Say, log_info
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods.method import Method, Step
from lightning_tpgm.observing.reporter import Quantities
from lightning_tpgm.optimizers import goes_up, needs_unscaled_gradients, weights_for_evaluation, with_gradient
from lightning_tpgm.selection import check_dense
from lightning_tpgm.sharding import split_gradients
from lightning_tpgm.steps import Steps


class Constraint(Attached):
    """What `lightning_tpgm.constrain` returns: the constrained tensors of a model, their anchors, and a method.

    Args:
        method: What acts on the tensors.
        anchor_device: See `constrain`.
        save_anchor: See `constrain`.
        title: What the method is called in messages. None: its class.
        warn: Is told what users should know.
        tell: Is told what they may want to know.
    """

    def __init__(
        self,
        method: Method,
        anchor_device: AnchorDevice = None,
        save_anchor: bool = True,
        title: str | None = None,
        warn: Say = warnings.warn,
        tell: Say = log_info,
    ) -> None:
        super().__init__(method, anchor_device, save_anchor, title or type(method).__name__, warn, tell)
        self.steps = Steps(self.before, self._gradients, self.after)
        self.record_every = 1  # steps, where quantities have to be measured
        self._looks = False  # in this step, as soon as nobody else writes to weights
        self._stepping: Constrained | None = None  # those that the step which is under way moves
        self.is_settled = False  # which these are

    # ---- the steps of optimizers

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Act in the steps of these optimizers, and of no others any more.

        Raises:
            TypeError: If an optimizer has no hooks, or evaluates other weights than it steps.
            ValueError: If it raises what the method takes for a loss.
        """
        optimizers = list(optimizers)
        if self.steps.follows(optimizers):
            return
        self.find_tensors()
        changes_weights = not self.method.changes_gradients and not self.method.acts_at_end
        for optimizer in optimizers:
            if changes_weights and (why := weights_for_evaluation(self.title, optimizer)):
                self.steps.stop()
                raise TypeError(why)
            takes_for_loss = self.method.reads_gradients or self.method.lowers_loss
            if takes_for_loss and (why := goes_up(self.title, optimizer, self._candidates.values())):
                self.steps.stop()
                raise ValueError(why)
        self.steps.follow(optimizers)

    @torch.no_grad()
    def before(self, step: Step, look_now: bool = True) -> None:
        """An optimizer is about to step. Its closure may freeze tensors, and thaw others.

        Args:
            step: That of the optimizer.
            look_now: Whether nobody but the step itself writes to weights before they move. It may call its closure at
                others.
        """
        self.join()
        tensors = self.tensors if self.at_hand else None
        self._looks = tensors is not None and self.reporter.leaving.is_due(step.index, tensors)
        if self.method.reads_gradients and getattr(step.optimizer, "found_inf", None) is not None:
            raise ValueError(needs_unscaled_gradients(self.title, step.optimizer))
        self._stepping, self.is_settled = None, False
        self._begin(step)
        if look_now:
            self._look(step)

    @torch.no_grad()
    def settle(self, step: Step, join: Callable[[Collection[int]], object] | None = None) -> None:
        """Its gradients are there for the first time: what it moves is settled. A closure may be called again.

        Args:
            step: That of an optimizer.
            join: Instead of this object's.
        """
        if not self.is_settled:
            self.is_settled = True
            (join or self.join)(self.stepped(step))
            self._begin(step)

    def stepped(self, step: Step) -> Collection[int]:
        """The ids of the parameters with a gradient, if any waits to join."""
        return with_gradient(step.optimizer) if self.anchors.waiting else ()

    def _begin(self, step: Step) -> None:
        tensors = self._stepped_by(step)
        has_begun, self._stepping = tensors is self._stepping, tensors  # others are let go, with their memory
        if tensors is not None and not has_begun:
            self.method.before(tensors, step)

    def _gradients(self, step: Step) -> None:
        self.settle(step)
        self.change_gradients(step)

    @torch.no_grad()
    def change_gradients(self, step: Step) -> None:
        """Its gradients are there, and not used yet."""
        self._look(step)
        if self.method.changes_gradients and (tensors := self._stepped_by(step)) is not None:
            check_dense(self.title, dict(zip(tensors.names, tensors.parameters, strict=True)))
            split_gradients(tensors.parameters)
            self.method.change_gradients(tensors, step)

    def _look(self, step: Step) -> None:
        looks, self._looks = self._looks, False  # a closure that is called again may be at other weights
        if looks and (tensors := self._stepped_by(step)) is not None:
            self.reporter.leaving.look(tensors, self.quantities())

    @torch.no_grad()
    def after(self, step: Step) -> None:
        """It has stepped."""
        self.anchors.settled = True
        tensors, self._stepping, self.is_settled = self._stepping, None, False
        if tensors is not None:
            self.method.after(tensors, step)
        if self.tensors is not None and self.tensors.names:
            self.reporter.record(self.quantities, 1 if self.at_hand else self.record_every)
            if self.at_hand:
                self.reporter.leaving.stepped(self.tensors)

    def _stepped_by(self, step: Step) -> Constrained | None:
        if self.tensors is None or self.method.acts_at_end:
            return None
        tensors = self.tensors.stepped_by(step.optimizer)
        return tensors if tensors.names else None

    @torch.no_grad()
    def finish(self) -> None:
        """No step follows: methods that act at the end do so now, on all that is not frozen."""
        if self.tensors is not None:
            self.fetch()
            self.find_tensors()
            self.method.finish(self.tensors.not_frozen())

    def remove(self) -> None:
        """Leave the model and its optimizers alone from now on. What was learned and seen can still be asked for.

        Collective where parameters are split over processes.
        """
        self.steps.stop()
        self.reporter.conclude(self.quantities())
        for text in self.outside():
            self._warn(text)
        self.release()

    def release(self) -> None:
        """Let go of the model and of device memory; what `state_dict` needs stays, on the CPU."""
        with suppress(RuntimeError):  # after an error there may be no memory to measure them
            self.reporter.conclude(self.seen())
        self.tensors, self._stepping, self._model = None, None, None
        self._gathering, self._candidates = [], {}
        with ExitStack() as at_last:  # also with a device that is broken
            at_last.callback(self.anchors.release)
            at_last.callback(self.method.release)
            self.reporter.leave_device()

    # ---- what is seen of it

    @property
    def at_hand(self) -> bool:
        """Whether the quantities need not be measured."""
        return self.method.has_radii and not self.method.acts_at_end

    @override
    def quantities(self) -> Quantities:
        """What users see, by name, vectors of shape (T,); empty where nothing is constrained now.

        Collective where parameters are split over processes, if they are not `at_hand`.
        """
        if self.tensors is None or not self.tensors.names or self.anchors.in_file:
            return {}
        self.find_buffers()
        with torch.no_grad():
            return self.method.quantities(self.tensors)

    def seen(self) -> Quantities:
        """The quantities, or the last known ones where to ask for them would be collective."""
        alone = self.at_hand or (self.tensors is not None and not self.tensors.are_split)
        return (alone and self.quantities()) or self.reporter.last

    def troubles(self, quantities: Quantities) -> Iterator[str]:
        """What goes wrong silently, each once; waits for the device."""
        if self.tensors is not None:
            yield from self.reporter.troubles(quantities, self.tensors.size)
            yield from self.reporter.outside(self.tensors.names)

    @torch.no_grad()
    def outside(self) -> Iterator[str]:
        """Which tensors are outside of their balls now that no step follows; once.

        Collective where parameters are split over processes.
        """
        if self.tensors is not None and self.method.has_radii:
            with suppress(RuntimeError):  # somebody has moved the weights to another device
                self.reporter.leaving.look(self.tensors, self.quantities())
            yield from self.reporter.outside(self.tensors.names)
