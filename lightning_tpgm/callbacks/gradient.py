"""What the methods share that change gradients."""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from typing_extensions import override

from lightning_tpgm.callbacks.base import AnchoredCallback
from lightning_tpgm.framework import MisconfigurationException, pl


class GradientCallback(AnchoredCallback):
    """Base of the methods that change the gradients which an optimizer is about to use, before they are clipped."""

    _changed = False

    def change_gradients(self, optimizer: Optimizer) -> None:
        """Change the ``.grad`` of the constrained parameters that this optimizer steps."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also refuses optimizers whose gradients cannot be read."""
        super().on_train_start(trainer, pl_module)
        self._check_gradients_can_be_read(trainer)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Changes the gradients: they are unscaled and not clipped yet."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise MisconfigurationException(
                    f"{type(self).__name__} adds to gradients, and that of {name!r} is sparse. Build the layer with"
                    f" sparse=False, or name it in `exclude`."
                )
        if self._parameters:
            with torch.no_grad():
                self.change_gradients(optimizer)
        self._changed = True

    @override
    def after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Refuses a step that Lightning did not see: its gradients were not changed."""
        if not self._changed:
            raise MisconfigurationException(
                f"{type(self).__name__} changes gradients in Lightning's on_before_optimizer_step, and {optimizer!r}"
                " stepped without it. Step the optimizer that self.optimizers() returns, with use_pl_optimizer=True."
            )
        self._changed = False
