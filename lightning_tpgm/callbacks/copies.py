"""Copies of callbacks, in a file, another process or this one: arguments and state, as plain data."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from lightning_tpgm.constraint import Constraint

# attributes of a running fit, and the functions that Lightning gives its callbacks
_RUNTIME = {"log", "log_dict"} | {
    "_logs",
    "_constraint",
    "_loaded",
    "_fitted",
    "_announced",
    "_saw_batch",
}


class PlainCopies:
    """What is pickled or copied knows nothing of a module, a trainer or a running fit, at any time."""

    _constraint: Constraint
    _loaded: dict[str, Any] | None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint would hold."""
        raise NotImplementedError

    def _start_anew(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, what a checkpoint would hold, and what was seen last."""
        arguments = {name: value for name, value in vars(self).items() if name not in _RUNTIME}
        state = self.state_dict()
        anchors = self._constraint.anchors
        # a checkpoint may name its anchors, a copy holds them
        if "file" in state and self._loaded is None and not anchors.in_file:
            state |= anchors.state_dict()
        return {**arguments, "_state": state, "_seen": (dict(self._constraint.seen()), self._constraint.reporter.order)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A callback that knows the same, and is in no fit."""
        # a deep copy, of tensors alone: a shallow one of the callback shares them with a fit that goes on
        known, (last, order) = deepcopy((state["_state"], state["_seen"]))
        vars(self).update({name: value for name, value in state.items() if name not in ("_state", "_seen")})
        self._start_anew()
        if known:
            self._constraint.recall(known)
            self._constraint.reporter.last, self._constraint.reporter.order = last, order
