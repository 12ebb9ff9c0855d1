"""Optimizers in wrappers, and those that cannot be followed, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def is_optimizer(found: object) -> bool:
    """Whether it steps groups of parameters, derived from torch's class or not."""
    return hasattr(found, "param_groups") and callable(getattr(found, "step", None))


def has_hooks(optimizer: object) -> bool:
    """Whether it has hooks of its own, as the constructor of torch's class makes them."""
    return "_optimizer_step_pre_hooks" in _attributes(optimizer)


def unwrapped(optimizer: Any, around: Sequence[object] = ()) -> Any:
    """What has hooks on its steps: the optimizer itself, or the one that it wraps; the optimizer if nothing has.

    Args:
        optimizer: A wrapper or not.
        around: The wrappers around it, which it may know.
    """
    if any(base.__name__ in ("LightningOptimizer", "_FabricOptimizer") for base in type(optimizer).__mro__):
        return unwrapped(optimizer.optimizer)
    around = [optimizer, *around]
    held = [one for one in _held_by(optimizer) if not any(one is outer for outer in around)]
    outermost = [one for one in held if not any(one is inner for other in held for inner in _nest(other)[1:])]
    return optimizer if has_hooks(optimizer) or len(outermost) != 1 else unwrapped(outermost[0], around)


def _nest(optimizer: object) -> list[Any]:
    """An optimizer and all that are held by it, however deep."""
    found = [optimizer]
    for one in found:  # which grows meanwhile
        found += [held for held in _held_by(one) if not any(held is other for other in found)]
    return found


def _held_by(optimizer: object) -> list[Any]:
    """The optimizers among its attributes, and in their collections."""
    values = [value for name, value in _attributes(optimizer).items() if name not in ("param_groups", "state")]
    lists = [[*v.values()] if isinstance(v, Mapping) else v if isinstance(v, list | tuple) else [v] for v in values]
    found = {id(value): value for values in lists for value in values if is_optimizer(value)}
    return [*found.values()]


def _attributes(found: object) -> dict[str, Any]:
    return getattr(found, "__dict__", {})


def with_gradient(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that its step may move, frozen or not: torch's optimizers ask for a gradient alone."""
    return {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}


def learning_rate(optimizer: Optimizer, group: Mapping[str, Any]) -> float | Tensor:
    """The rate of a parameter group; a tensor, on any device, if the optimizer has it as one.

    Raises:
        ValueError: If the group has none, as of optimizers that choose their own.
    """
    rate = group.get("lr")
    if rate is None:
        name = type(optimizer).__name__
        raise ValueError(
            f"`lr` should be a number in every parameter group of {name}, found {rate}. The method goes by the rate"
            f" that each tensor is stepped with. Pass one to {name} (Adafactor: with relative_step=False)."
        )
    return rate.detach().reshape(()) if isinstance(rate, Tensor) else float(rate)


def needs_unscaled_gradients(title: str, optimizer: Optimizer) -> str:
    """Why a fused optimizer under a gradient scaler is refused."""
    return (
        f"{title} needs unscaled gradients, but {type(optimizer).__name__} unscales them"
        " inside its step (it is fused, and the precision is 16-mixed). Pass fused=False to the optimizer,"
        " or precision='bf16-mixed' to the Trainer."
    )


def goes_up(title: str, optimizer: Any, tensors: Iterable[Tensor]) -> str | None:
    """Why methods that go by its loss refuse an optimizer that raises a value by these tensors; None: it does not."""
    up = {id(p) for group in unwrapped(optimizer).param_groups if group.get("maximize") for p in group["params"]}
    if up.isdisjoint(map(id, tensors)):
        return None
    return (
        f"{title} goes by a loss that is lowered, and {type(optimizer).__name__} has maximize=True. Leave that out, and"
        " return the negative value as the loss."
    )


def weights_for_evaluation(title: str, optimizer: object) -> str | None:
    """Why methods that change the weights after its steps refuse it; None: they do not.

    A mode for training and one for evaluation tell, as of schedule-free optimizers. A wrapper may hide them.
    """
    for one in _nest(optimizer):
        if callable(getattr(one, "eval", None)) and callable(getattr(one, "train", None)):
            return (
                f"{title} keeps the weights that an optimizer steps near the pretrained ones, and {type(one).__name__}"
                " evaluates others: its eval() swaps them. Use an optimizer that does not, or act after the fit:"
                " wise_ft_sweep or project_checkpoint."
            )
    return None
