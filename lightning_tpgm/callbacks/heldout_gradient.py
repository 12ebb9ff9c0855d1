"""The held-out gradient of a module in a trainer: data, loss and isolation in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tpgm.callbacks.evaluation import HeldOutLoss, Loss
from lightning_tpgm.callbacks.framework import CombinedLoader, pl, validation_loader
from lightning_tpgm.callbacks.generators import generators_put_back
from lightning_tpgm.callbacks.heldout import HeldOutBatches, held_out_batches
from lightning_tpgm.callbacks.isolation import Isolation
from lightning_tpgm.callbacks.overlap import look_at_examples
from lightning_tpgm.callbacks.source import Source
from lightning_tpgm.callbacks.step_errors import described
from lightning_tpgm.sharding import mean_over_processes


class HeldOutGradient:
    """Draws the next held-out batch and evaluates the module's loss on it without leaving a trace.

    Args:
        source: Where the batches come from.
        loss: What is evaluated.
        eval_mode: Whether in eval mode; else every module is in the mode that it is in already.
    """

    def __init__(self, source: Source, loss: Loss, eval_mode: bool = True) -> None:
        self._source = source
        self._loss = HeldOutLoss(loss, eval_mode)
        self._splits_itself = loss == "validation_step"  # forecasters hold the last values of each series out there
        self._fit: tuple[pl.Trainer, pl.LightningModule] | None = None
        self._batches: HeldOutBatches | None = None
        self._isolation = Isolation()
        # of the last batches: the trainer's loader, or how often it would have reloaded if it has none
        self._origin: CombinedLoader | int | None = None
        self._recurrent: list[Any] = []  # parts of the module
        self._announced = False  # in this fit, which data they are
        self._state: dict[str, int] = {}  # where the batches are, or will begin

    def attach(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A fit begins. In a fresh one the order of the data is settled now; its loader is made when it is needed."""
        self._fit, self._announced = (trainer, pl_module), False
        self._recurrent = [module for module in pl_module.modules() if _needs_train_mode(module)]
        if not self._state:
            seed = trainer.strategy.broadcast(torch.initial_seed() % 2**62)
            self._state = {"seed": seed, "drawn": 0, "passes": 0, "position": 0}

    def close(self) -> None:
        """End the loader's workers, and let go of trainer and module; the position stays."""
        self._state, self._batches, self._fit, self._origin = self.state_dict(), None, None, None
        self._recurrent = []
        self._isolation = Isolation()

    def saw(self, batch: Any) -> None:
        """Remember what a training batch looks like, for errors to compare with."""
        self._loss.trained_on = described(batch)

    @property
    def processes(self) -> int:
        """Those of the trainer."""
        return 1 if self._fit is None else self._fit[0].world_size

    def __call__(self, parameters: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """See `lightning_tpgm.methods.held_out.HeldOut`."""
        if self._fit is None:
            raise RuntimeError("The held-out loss can be evaluated during a fit only.")
        trainer, pl_module = self._fit
        eval_mode = self._loss.eval_mode
        transfers = generators_put_back([getattr(trainer, "datamodule", None)])  # its hooks may draw
        with transfers, self._isolation.no_trace(trainer, pl_module, parameters, eval_mode):
            for recurrent in self._recurrent if eval_mode else ():
                if not recurrent.training:
                    recurrent.training, recurrent.dropout = True, 0.0  # the same values; cuDNN can go back through it
            self._follow_reloaded(trainer)
            if self._batches is None:
                first, self._announced = not self._announced, True
                self._batches = held_out_batches(trainer, pl_module, self._source, self._state, first)
                if first:
                    look_at_examples(trainer, self._batches.loaders, may_overlap=self._splits_itself)
            return self._loss(trainer, pl_module, self._batches.draw(), parameters)

    def _follow_reloaded(self, trainer: pl.Trainer) -> None:
        """Where the trainer reloads its loaders every n epochs, a pass over the new ones begins as soon as it has.

        With validation switched off it reloads none: then they are asked for anew every n epochs.
        """
        every: int = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        if not every or self._source is not None:
            return
        loader = validation_loader(trainer)  # not its truth, which is a length that it may not have
        origin = trainer.current_epoch // every if loader is None else loader
        before = self._state.get("reloads") if self._batches is None else self._origin
        if before is not None and origin != before:
            state = self.state_dict()
            self._state, self._batches = {**state, "passes": state["passes"] + 1, "position": 0}, None
        self._origin = origin

    def mean(self, vector: Tensor) -> Tensor:
        """See `lightning_tpgm.methods.held_out.HeldOut`."""
        return mean_over_processes(vector) if self.processes > 1 else vector

    def state_dict(self) -> dict[str, int]:
        """Seed and position; also how often the loaders were reloaded, if nobody else knows."""
        if self._batches is None:
            return dict(self._state)
        return self._batches.state_dict() | ({"reloads": self._origin} if isinstance(self._origin, int) else {})

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position."""
        self._state, self._batches = dict(state), None


def _needs_train_mode(module: nn.Module) -> bool:
    """Whether cuDNN would refuse to go back through it in eval mode. Subclasses may drop out by themselves."""
    usual = type(module) in (nn.RNN, nn.LSTM, nn.GRU)
    return usual or (isinstance(module, nn.RNNBase) and any(weight.is_cuda for weight in module.parameters()))
