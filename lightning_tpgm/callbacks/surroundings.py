"""What a callback finds around itself in a trainer, and what it refuses or warns of there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from lightning_tpgm.callbacks.framework import (
    MisconfigurationException,
    callbacks_of,
    classes,
    pl,
    rank_zero_info,
    rank_zero_warn,
    starts_functions,
)
from lightning_tpgm.callbacks.freeze_batch_norm import FreezeBatchNorm, has_statistics
from lightning_tpgm.freshness import fresh_layers
from lightning_tpgm.initialisation import never_trained
from lightning_tpgm.optimizers import needs_unscaled_gradients, unwrapped

if TYPE_CHECKING:
    from lightning_tpgm.callbacks.method import MethodCallback


def steps_of(trainer: pl.Trainer) -> float:
    """How many optimizer steps the fit will have; infinite if nobody can know."""
    steps = float(trainer.estimated_stepping_batches)
    return math.inf if steps < 0 else steps  # data without length


def check_strategy(trainer: pl.Trainer, title: str) -> None:
    """Refuse strategies that hide parameters; say what those that start functions keep to themselves."""
    if isinstance(trainer.strategy, classes("strategies:FSDPStrategy") + classes("strategies:DeepSpeedStrategy")):
        raise MisconfigurationException(
            f"{title} does not support {type(trainer.strategy).__name__}, which hides the parameters"
            " in flat buffers. Use DDPStrategy, or ModelParallelStrategy (FSDP2, tensor parallel)."
        )
    if starts_functions(trainer):
        rank_zero_warn(
            f"What {title} learns in this fit stays in the processes that ddp_spawn or ddp_notebook starts, and in the"
            " checkpoints that they write. The weights come back. The callback's attributes and a later"
            " trainer.save_checkpoint know nothing of the fit. With strategy='ddp' they do."
        )


def check_unscaled_gradients(trainer: pl.Trainer, callback: MethodCallback) -> None:
    """Refuse optimizers that undo a gradient scaler's scaling inside their step: ``.grad`` is scaled before it."""
    if not callback._constraint.method.reads_gradients or getattr(trainer.precision_plugin, "scaler", None) is None:
        return
    for optimizer in trainer.optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise MisconfigurationException(needs_unscaled_gradients(type(callback).__name__, optimizer))


def check_step_was_seen(optimizer: Optimizer, announced: Optimizer | None, title: str) -> None:
    """Refuse a step that Lightning did not see: its gradients were not changed."""
    if announced is None or unwrapped(announced) is not optimizer:
        raise MisconfigurationException(
            f"{title} changes gradients in Lightning's on_before_optimizer_step, and {optimizer!r}"
            " stepped without it. Step the optimizer that self.optimizers() returns, with use_pl_optimizer=True."
        )


def unfreezes(trainer: pl.Trainer) -> bool:
    """Whether a finetuning callback may unfreeze parameters later."""
    unfreezing = classes("callbacks:BaseFinetuning")
    return any(isinstance(callback, unfreezing) for callback in callbacks_of(trainer))


def warn_of_random_anchors(pl_module: pl.LightningModule, title: str) -> None:
    """Warn if the module holds its random initialisation."""
    evidence = never_trained(pl_module)
    if evidence:
        rank_zero_warn(
            f"{title}: the anchors look like a random initialisation, since {evidence}. Fine-tuning is kept"
            " near them. Load the pretrained weights before the fit, or pass them as `pretrained`."
        )


def warn_of_fresh_layers(pl_module: pl.LightningModule, callback: MethodCallback) -> None:
    """Warn of constrained layers that nobody has trained, in a module that somebody has."""
    fresh = fresh_layers(pl_module, callback._constraint.anchors.parameters)
    if fresh is not None:
        rank_zero_warn(fresh.text(type(callback).__name__, callback.exclude))


def tell_of_moving_statistics(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: MethodCallback) -> None:
    """Say after the first batch that BatchNorm's statistics move; no warning, since this may be meant.

    By then a module or a callback that freezes them has done so.
    """
    kept = callback._constraint.method.constrains_buffers
    if kept or any(isinstance(other, FreezeBatchNorm) for other in callbacks_of(trainer)):
        return
    layers = ((name, part) for name, part in pl_module.named_modules() if has_statistics(part))
    moving = [name for name, part in layers if part.training and part.track_running_stats]
    if moving:
        rank_zero_info(
            f"{type(callback).__name__}: the running statistics of {len(moving)} BatchNorm layers move with the new"
            f" data, of {moving[0]!r} for instance. No bound on the weights reaches them. To keep those of the"
            " pretraining, add lightning_tpgm.FreezeBatchNorm() to the callbacks."
        )


def no_state(ckpt_path: object, title: str, state_key: str) -> str:
    """Why a run cannot be resumed."""
    return (
        f"The checkpoint {str(ckpt_path)!r} has no state of this {title} (key {state_key!r}). So the pretrained"
        " weights are not known any more. Pass them as `pretrained`, for instance the checkpoint that the first run"
        " started from."
    )


def check_something_to_do(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: MethodCallback) -> None:
    """Refuse a fit in which nothing is constrained, now or later; say what spoils one in which something is."""
    anchors = callback._constraint.anchors
    if not anchors.joined and not (anchors.waiting and unfreezes(trainer)):
        raise MisconfigurationException(
            f"{type(callback).__name__} has nothing to constrain. Of {len(list(pl_module.parameters()))} parameters,"
            f" {len(anchors.waiting)} remain after `exclude` = {list(callback.exclude)}, and none of them is trainable."
            " Exclude less, or unfreeze some (a `BaseFinetuning` callback may do so later)."
        )
    if anchors.origin == "fresh" and trainer.fit_loop.total_batch_idx < 0:
        warn_of_fresh_layers(pl_module, callback)


def warn_of_no_steps(title: str) -> None:
    """Warn of an epoch in which no optimizer was seen to step."""
    rank_zero_warn(
        f"{title} saw no step of the module's optimizers in this epoch: nothing was constrained."
        " It acts after each `step` of the optimizers that configure_optimizers returns: train with those."
    )
