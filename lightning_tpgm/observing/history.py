"""What was seen of each constrained tensor during a fit, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class History:
    """Vectors of one number per tensor, recorded at evenly spaced steps.

    When there are ``LIMIT`` records every second one is dropped. From then on only every second step that would have
    been recorded is. So a long fit is kept at a coarser grain, in the same memory. Records stay on their device.
    """

    LIMIT = 128

    def __init__(self) -> None:
        self.count = 0  # steps seen
        self.stride = 1
        self.steps: list[int] = []  # of the records: how many steps there had been
        self.values: dict[str, list[Tensor]] = {}  # by quantity; later vectors may be longer, as tensors join

    def due(self, every: int = 1) -> bool:
        """Count a step, and say whether it should be recorded; ``every`` is the finest grain."""
        self.count += 1
        return (self.count - 1) % (self.stride * every) == 0

    def add(self, vectors: Mapping[str, Tensor]) -> None:
        """Record the step that was counted last.

        Args:
            vectors: Shape (T,) each; a quantity that is new has no values at the records before.
        """
        for name, vector in vectors.items():
            if name not in self.values:
                self.values[name] = [vector.new_empty(0, dtype=torch.float32) for _ in self.steps]
            self.values[name].append(vector.detach().to(torch.float32, copy=True))
        self.steps.append(self.count)
        if len(self.steps) == self.LIMIT:
            self.stride *= 2
            del self.steps[1::2]
            for records in self.values.values():
                del records[1::2]

    def leave_device(self) -> None:
        """Move the records to the CPU."""
        self.values = {name: [record.cpu() for record in records] for name, records in self.values.items()}

    def matrices(self) -> dict[str, Tensor]:
        """All records of each quantity, shape (R, T), on the CPU; nan before a tensor joined."""
        return {
            name: pad_sequence([record.cpu() for record in records], batch_first=True, padding_value=torch.nan)
            for name, records in self.values.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors on the CPU, numbers and lists of them."""
        counts = {"count": self.count, "stride": self.stride, "steps": list(self.steps)}
        return {**counts, "values": self.matrices()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.count, self.stride, self.steps = state["count"], state["stride"], list(state["steps"])
        self.values = {name: list(matrix.unbind()) for name, matrix in state["values"].items()}

    def with_present(self, quantity: str, present: Tensor) -> tuple[list[int], Tensor]:
        """Steps and matrix of one quantity, ended by its present values if the last step was not recorded."""
        records = {name: list(matrix.unbind()) for name, matrix in self.matrices().items()}.get(quantity, [])
        steps = list(self.steps) if records else []
        if not steps or steps[-1] != self.count:
            steps.append(self.count)
        records = [*records, present.cpu().to(torch.float32)]  # as wide as all, also if it is of no new step
        return steps, pad_sequence(records, batch_first=True, padding_value=torch.nan)[: len(steps)]
