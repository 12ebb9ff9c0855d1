"""A method at work on a model: its tensors, their anchors, and what users see of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.anchors import AnchorDevice, Anchors
from lightning_tpgm.constrained import Constrained, gathering
from lightning_tpgm.methods.method import Method, Step
from lightning_tpgm.observing.leaving import too_long_for_max_norm
from lightning_tpgm.observing.reporter import Quantities, Reporter
from lightning_tpgm.observing.shown import Shown
from lightning_tpgm.optimizers import needs_unscaled_gradients, weights_for_evaluation
from lightning_tpgm.references import AnchorFile, moved, named, put_back
from lightning_tpgm.selection import check_dense
from lightning_tpgm.sharding import is_split
from lightning_tpgm.steps import Steps

Say = Callable[[str], None]
Tensors = Mapping[str, Tensor]  # by name
_logger = logging.getLogger(__name__)


class Constraint(Shown):
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
        tell: Say = _logger.info,
    ) -> None:
        self.method = method
        self.title = title or type(method).__name__
        self.anchors = Anchors(anchor_device)
        self._save_anchor = save_anchor
        self._file: AnchorFile | None = None  # what checkpoints name instead of holding anchors
        self.reporter = Reporter(self.title)
        self.tensors: Constrained | None = None  # those that are constrained now. None: no model is attached
        self.steps = Steps(self.before, self.change_gradients, self.after)
        self.record_every = 1  # steps, where quantities have to be measured
        self._warn, self._tell = warn, tell
        self._gathering: list[nn.Module] = []
        self._candidates: Tensors = {}
        self._looks = False  # when the gradients of this step are there

    # ---- attaching it to a model

    def begin(
        self, model: nn.Module, candidates: Tensors, pretrained: Tensors | None = None, path: Path | None = None
    ) -> None:
        """Take the anchors from the model's weights, or from given ones, which may come from a file."""
        if pretrained is None:
            self.anchors.begin(candidates)
        else:
            if path is not None and not self._save_anchor:
                self._file = AnchorFile.of(path, pretrained, candidates)
            self.anchors.begin_from(pretrained, candidates, self._report, self._can_wait_for(candidates))
        self._attach(model, candidates)

    def _can_wait_for(self, candidates: Tensors) -> bool:
        """Whether the anchors may stay in their file until the end. Processes that share tensors keep their parts."""
        return self._file is not None and self.method.acts_at_end and not any(map(is_split, candidates.values()))

    def restore(
        self,
        model: nn.Module,
        candidates: Tensors,
        state: Mapping[str, Any],
        pretrained: Tensors | None = None,
        path: Path | None = None,
    ) -> None:
        """Go on where `state_dict` was asked for; a state that names a file finds it here, if it has moved."""
        self._restore(candidates, state, pretrained, path)
        self._attach(model, candidates, state)

    def _restore(
        self,
        candidates: Tensors,
        state: Mapping[str, Any],
        pretrained: Tensors | None = None,
        path: Path | None = None,
    ) -> None:
        self._file = None if self._save_anchor else moved(named(state), path)
        self.anchors.restore(put_back(state, path, pretrained), candidates, self._can_wait_for(candidates))

    def go_on(self, model: nn.Module, candidates: Tensors, pretrained: Tensors | None = None) -> None:
        """Go on with the same model after `release`."""
        if self._file is not None and pretrained is not None:  # the model may have got new parameters
            self._file.check(pretrained)
            self._file = AnchorFile.of(Path(self._file.path), pretrained, candidates)
        self.anchors.in_file = self._can_wait_for(candidates)
        self.anchors.go_on(candidates, pretrained, self._report)
        self._attach(model, candidates)

    def _attach(self, model: nn.Module, candidates: Tensors, state: Mapping[str, Any] | None = None) -> None:
        self._gathering, self._candidates = gathering(model), candidates
        self._arrange()
        if state is not None:
            self.load(state)
        self.join()
        self.anchors.own()
        if self.method.has_radii and not self.anchors.in_file:
            text = too_long_for_max_norm(model, self.anchors.joined, self.anchors.parameters)
            if text:
                self._warn(f"{self.title}: {text}")

    def _report(self, text: str) -> None:
        self._tell(f"{self.title}: {text}")

    @torch.no_grad()
    def retake(self, buffers: bool = False) -> None:
        """Take fresh anchors anew, right before the first step: weights may have been loaded since `begin`."""
        if not self.anchors.settled:
            self.anchors.retake(buffers)
            self.anchors.settled = not buffers  # a closure that is called again may be at other weights
            self._arrange()

    def join(self) -> bool:
        """Constrain the parameters that have thawed; says whether there are any."""
        names = self.anchors.join()
        if names:
            tensors = self._arrange()
            self.method.joined(tensors, names)
        return bool(names)

    @torch.no_grad()
    def _arrange(self) -> Constrained:
        parameters, anchors = self.anchors.parameters, self.anchors.joined
        self.tensors = Constrained(parameters, anchors, self.method.norm, self._gathering)
        if not self.anchors.in_file:
            self.tensors.prepare(self.method.has_radii)
        self.method.place(self.tensors)
        return self.tensors

    # ---- the steps of optimizers

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Act in the steps of these optimizers, and of no others any more.

        Raises:
            TypeError: If an optimizer has no hooks, or evaluates other weights than it steps.
        """
        optimizers = list(optimizers)
        if not self.method.changes_gradients and not self.method.acts_at_end:
            for optimizer in optimizers:
                if why := weights_for_evaluation(self.title, optimizer):
                    self.steps.stop()
                    raise TypeError(why)
        self.steps.follow(optimizers)

    @torch.no_grad()
    def before(self, step: Step) -> None:
        """An optimizer is about to step."""
        self.join()
        tensors = self.tensors if self.at_hand else None
        self._looks = tensors is not None and self.reporter.leaving.is_due(step.index, tensors)
        if self.method.reads_gradients and getattr(step.optimizer, "found_inf", None) is not None:
            raise ValueError(needs_unscaled_gradients(self.title, step.optimizer))
        if type(self.method).before is not Method.before and (tensors := self._stepped_by(step)) is not None:
            self.method.before(tensors, step)

    @torch.no_grad()
    def change_gradients(self, step: Step) -> None:
        """Its gradients are there, and not used yet."""
        looks, self._looks = self._looks, False  # a closure that is called again may be at other weights
        if looks and (tensors := self._stepped_by(step)) is not None:
            self.reporter.leaving.look(tensors, self.quantities())
        if self.method.changes_gradients and (tensors := self._stepped_by(step)) is not None:
            check_dense(self.title, dict(zip(tensors.names, tensors.parameters, strict=True)))
            self.method.change_gradients(tensors, step)

    @torch.no_grad()
    def after(self, step: Step) -> None:
        """It has stepped."""
        self.anchors.settled = True
        if not self.method.acts_at_end and (tensors := self._stepped_by(step)) is not None:
            self.method.after(tensors, step)
        if self.tensors is not None and self.tensors.names:
            self.reporter.record(self.quantities, 1 if self.at_hand else self.record_every)
            if self.at_hand:
                self.reporter.leaving.stepped(self.tensors)

    def _stepped_by(self, step: Step) -> Constrained | None:
        tensors = None if self.tensors is None else self.tensors.stepped_by(step.optimizer)
        return tensors if tensors is not None and tensors.names else None

    def fetch(self) -> None:
        """Read the anchors that have stayed in their file so far."""
        if self.anchors.in_file:
            self.anchors.restore(put_back(self._kept()), self._candidates)
            self._arrange()

    @torch.no_grad()
    def finish(self) -> None:
        """No step follows: methods that act at the end do so now, on all that is not frozen."""
        if self.tensors is not None:
            self.fetch()
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
        self.tensors, self._gathering, self._candidates = None, [], {}
        try:
            self.reporter.leave_device()
            self.method.release()
        finally:  # also with a device that is broken
            self.anchors.release()

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
        with torch.no_grad():
            return self.method.quantities(self.tensors)

    def seen(self) -> Quantities:
        """The quantities, or the last known ones where to ask for them would be collective."""
        alone = self.at_hand or (self.tensors is not None and not self.tensors.are_split)
        return (alone and self.quantities()) or self.reporter.last

    def troubles(self, quantities: Quantities) -> Iterator[str]:
        """What goes wrong silently, each once; waits for the device."""
        if self.tensors is not None:
            yield from self.reporter.troubles(quantities, self.tensors.size, self.method.growth())
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

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Anchors or their file, what was learned and what was seen, on the CPU. Collective where tensors are split."""
        return {**self._kept(), "method": self.method.state(), "history": self.reporter.history.state_dict()}

    def _kept(self) -> dict[str, Any]:
        if self._file is None:
            return self.anchors.state_dict()
        return {**self.anchors.state_dict(self._file.sources), "file": self._file.state()}

    @property
    @override
    def anchor(self) -> dict[str, Tensor]:
        """The pretrained value of each constrained parameter, by name; read from their file while they are there."""
        return dict(put_back(self._kept())["anchor"] if self.anchors.in_file else self.anchors.joined)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: the anchors are the original ones, whatever the model holds now.

        Raises:
            ValueError: If the state is of another method, its anchors do not fit the model, or there is no model.
        """
        if self.tensors is None:
            raise ValueError(f"{self.title} is at work on no model. Call load_state_dict before remove.")
        self._restore(self._candidates, state)
        self._arrange()
        self.load(state)
        self.join()

    def recall(self, state: Mapping[str, Any]) -> None:
        """Know what `state_dict` gave, and be at work on no model."""
        self.anchors.load_state_dict(put_back(state))
        self._file = named(state)
        self.load(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """What was learned and seen alone."""
        try:
            self.method.load(state["method"])
        except KeyError as error:
            raise ValueError(f"The state is not one of {self.title}: it lacks {error}.") from error
        self.reporter.load(state.get("history", {}))
        if self.tensors is not None:
            self.method.place(self.tensors)
