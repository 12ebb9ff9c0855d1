"""Optimizers that cannot be followed, and why."""

from __future__ import annotations

from torch.optim import Optimizer


def needs_unscaled_gradients(title: str, optimizer: Optimizer) -> str:
    """Why a fused optimizer under a gradient scaler is refused."""
    return (
        f"{title} needs unscaled gradients, but {type(optimizer).__name__} unscales them"
        " inside its step (it is fused, and the precision is 16-mixed). Pass fused=False to the optimizer,"
        " or precision='bf16-mixed' to the Trainer."
    )


def evaluates_other_weights(optimizer: Optimizer) -> bool:
    """Whether it has a mode for training and one for evaluation, as schedule-free optimizers do."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def weights_for_evaluation(title: str, optimizer: Optimizer) -> str:
    """Why such an optimizer is refused by methods that change the weights after its steps."""
    return (
        f"{title} keeps the weights that an optimizer steps near the pretrained ones, and {type(optimizer).__name__}"
        " evaluates others: its eval() swaps them. Use an optimizer that does not, or act after the fit:"
        " wise_ft_sweep or project_checkpoint."
    )
