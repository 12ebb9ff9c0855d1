"""The gradient of a loss for chosen parameters, however autograd allows it, without touching ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_tpgm.sharding import full, is_fsdp2, mean_over_processes


class LossGradient:
    """A loss and its gradient by ``autograd.grad``; by ``backward`` where that cannot be.

    Args:
        attempt: Entered around a first attempt, which may be followed by a second one.
    """

    def __init__(self, attempt: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._attempt = attempt
        self._by_backward = False

    def __call__(
        self,
        model: nn.Module,
        loss: Callable[[], Tensor | None],
        parameters: Sequence[Tensor],
        scale: Callable[[Tensor], Tensor | None] = lambda loss: None,
        backward: Callable[[Tensor], object] | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Evaluate.

        Args:
            model: Its parameters' ``.grad`` are left alone.
            loss: Gives a scalar tensor with a graph; or None, for no loss this time.
            parameters: What the gradient is for.
            scale: What the loss is multiplied by while its gradient is taken, as a gradient scaler does. None: nothing.
            backward: The only way to the gradient of this model's loss: it adds to ``.grad``. None: torch's own.

        Returns:
            The loss without graph, and dLoss/dW of each parameter, None where the loss does not depend on it.
        """
        if backward is None and not self._by_backward and not any(is_fsdp2(module) for module in model.modules()):
            try:
                with self._attempt():
                    return _evaluate(model, loss, parameters, scale, backward=None)
            except _ReentrantCheckpointingError:
                self._by_backward = True
        return _evaluate(model, loss, parameters, scale, backward or torch.autograd.backward)


class PlainHeldOut:
    """Held-out gradients of a user's own loss, for a plain loop.

    Args:
        model: The model whose parameters are constrained.
        loss: Returns a scalar loss on the next held-out batch, at the model's present weights.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], Tensor]) -> None:
        self._model: nn.Module | None = model
        self._loss: Callable[[], Tensor] | None = loss
        self._gradient = LossGradient()

    @property
    def processes(self) -> int:
        """All that torch.distributed knows of."""
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def __call__(self, parameters: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """The loss and its gradient.

        Raises:
            ValueError: If what came back is no scalar tensor with a graph.
        """
        if self._model is None or self._loss is None:
            raise ValueError("The constraint was removed.")
        return self._gradient(self._model, partial(_value, self._loss), parameters)

    def mean(self, vector: Tensor) -> Tensor:
        """The mean over all processes."""
        return mean_over_processes(vector) if self.processes > 1 else vector

    def close(self) -> None:
        """Let go of both."""
        self._model = self._loss = None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: batches are the user's affair."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing, see `state_dict`."""


def _value(held_out_loss: Callable[[], Any]) -> Tensor:
    loss = held_out_loss()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
        raise ValueError(
            f"`held_out_loss` should return a scalar tensor with a graph to the weights, found {found}. Compute it"
            " at the model's present weights, without torch.no_grad() and without detach()."
        )
    return loss.reshape(())


def _evaluate(
    model: nn.Module,
    loss_of: Callable[[], Tensor | None],
    parameters: Sequence[Tensor],
    scale_of: Callable[[Tensor], Tensor | None],
    backward: Callable[[Tensor], object] | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    aside = nullcontext() if backward is None else _grads_put_aside(model)
    with torch.inference_mode(False), torch.enable_grad(), _fresh_casts(), aside:
        loss = loss_of()
        if loss is None:
            return None, [None for _ in parameters]
        scale = scale_of(loss)
        scaled = loss if scale is None else loss * scale
        grads: Sequence[Tensor | None]
        if backward is None:
            grads = _autograd_grad(scaled, parameters)
        else:
            backward(scaled)
            grads = [parameter.grad for parameter in parameters]
        if scale is not None:
            grads = [None if grad is None else grad.detach() / scale for grad in grads]
    return full(loss.detach()), list(grads)  # the loss of tensors that are split may be a DTensor itself


class _ReentrantCheckpointingError(RuntimeError):
    """Reentrant activation checkpointing refuses autograd.grad."""


def _autograd_grad(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    try:
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        found = iter(torch.autograd.grad(loss, trainable, allow_unused=True))
        return [next(found) if parameter.requires_grad else None for parameter in parameters]
    except RuntimeError as error:
        # torch's own: the text of a user's class may fail
        if type(error) is RuntimeError and "heckpoint" in str(error) and ".grad()" in str(error):
            raise _ReentrantCheckpointingError from error
        raise


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Autocast neither uses nor keeps casts of weights.

    In manual optimization the optimizer steps within the autocast region of the training step, whose casts are those of
    the weights before the step.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def _grads_put_aside(model: nn.Module) -> Iterator[None]:
    """Every ``.grad`` of the model is None inside and put back on exit.

    To be entered before the forward: after it, FSDP2 may show gathered parameters in place of the sharded ones.
    """
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad
