"""Where the gradients come from that radii are learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class HeldOut(Protocol):
    """Held-out data and a loss on them."""

    @property
    def processes(self) -> int:
        """How many draw batches of their own and learn together."""

    def __call__(self, parameters: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """The loss on the next batch at the present weights, and its gradient for each parameter.

        Returns:
            A scalar tensor without graph, None for "skip this batch". And a gradient of each parameter, None where
            the loss does not depend on it.
        """

    def mean(self, vector: Tensor) -> Tensor:
        """The mean of a vector over the processes."""

    def close(self) -> None:
        """Let go of the model and of what draws the batches; the position stays."""

    def state_dict(self) -> dict[str, Any]:
        """The position in the data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
