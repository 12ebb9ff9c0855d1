"""The held-out gradient of a module in a trainer: data, loss and isolation in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_tpgm.callbacks.evaluation import HeldOutLoss, Loss
from lightning_tpgm.callbacks.framework import pl
from lightning_tpgm.callbacks.heldout import HeldOutBatches, held_out_batches
from lightning_tpgm.callbacks.isolation import no_trace
from lightning_tpgm.callbacks.loaders import Source
from lightning_tpgm.callbacks.overlap import warn_of_shared_examples
from lightning_tpgm.sharding import mean_over_processes


class HeldOutGradient:
    """Draws the next held-out batch and evaluates the module's loss on it without leaving a trace.

    Args:
        source: Where the batches come from.
        loss: What is evaluated.
    """

    def __init__(self, source: Source, loss: Loss) -> None:
        self._source = source
        self._loss = HeldOutLoss(loss)
        self._fit: tuple[pl.Trainer, pl.LightningModule] | None = None
        self._batches: HeldOutBatches | None = None
        self._state: dict[str, int] = {}  # where the batches are, or will begin

    def attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit begins. In a fresh one the order of the data is settled now; its loader is made when it is needed."""
        self._fit = trainer, pl_module
        if not self._state:
            seed = trainer.strategy.broadcast(torch.initial_seed() % 2**62)
            self._state = {"seed": seed, "drawn": 0, "passes": 0, "position": 0}

    def close(self) -> None:
        """End the loader's workers, and let go of trainer and module; the position stays."""
        self._state, self._batches, self._fit = self.state_dict(), None, None

    @property
    def processes(self) -> int:
        """Those of the trainer."""
        return 1 if self._fit is None else self._fit[0].world_size

    def __call__(self, parameters: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """See `lightning_tpgm.methods.held_out.HeldOut`."""
        if self._fit is None:
            raise RuntimeError("The held-out loss can be evaluated during a fit only.")
        trainer, pl_module = self._fit
        with no_trace(trainer, pl_module):
            if self._batches is None:
                self._batches = held_out_batches(trainer, pl_module, self._source, self._state)
                warn_of_shared_examples(trainer, self._batches.loaders)
            return self._loss(trainer, pl_module, self._batches.draw(), parameters)

    def mean(self, vector: Tensor) -> Tensor:
        """See `lightning_tpgm.methods.held_out.HeldOut`."""
        return mean_over_processes(vector) if self.processes > 1 else vector

    def state_dict(self) -> dict[str, int]:
        """Seed and position."""
        return dict(self._state) if self._batches is None else self._batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position."""
        self._state, self._batches = dict(state), None
