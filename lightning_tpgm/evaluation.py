"""The module's own loss on a held-out batch, and its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tpgm.framework import MisconfigurationException, is_param_in_hook_signature, pl, same_package, to_device
from lightning_tpgm.heldout import HeldOutBatch
from lightning_tpgm.isolation import isolated_generators, without_subclass
from lightning_tpgm.sharding import is_fsdp2

Loss = Literal["validation_step"] | Callable[[pl.LightningModule, Any], Any] | None  # Any: need not be annotated


class HeldOutLoss:
    """The loss of a module on a held-out batch and its gradient, in the trainer's precision; call it inside `no_trace`.

    Args:
        loss: None for the module's ``training_step``, ``"validation_step"``, or a callable (pl_module, batch) ->
            Tensor.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self._by_backward = False
        self._worked = False

    def __call__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        drawn: HeldOutBatch,
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Evaluate.

        Returns:
            The loss (a scalar tensor without graph) and dLoss/dW of each parameter, None where the loss does not depend
            on it. If ``training_step`` returned None ("skip this batch"), all of them are None.

        Raises:
            MisconfigurationException: If what came back is no scalar loss, or has no gradient.
        """
        if not self._by_backward and not any(is_fsdp2(module) for module in pl_module.modules()):
            try:
                with isolated_generators():  # a second attempt draws the same random numbers
                    return self._evaluate(trainer, pl_module, drawn, parameters, by_backward=False)
            except _ReentrantCheckpointingError:
                self._by_backward = True
        return self._evaluate(trainer, pl_module, drawn, parameters, by_backward=True)

    def _evaluate(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        drawn: HeldOutBatch,
        parameters: Sequence[Tensor],
        by_backward: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        aside = _grads_put_aside(pl_module) if by_backward else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), _fresh_casts(), _trainable(parameters), aside:
            loss = self._value(trainer, pl_module, drawn)
            if loss is None:
                return None, [None for _ in parameters]
            scale = _loss_scale(trainer, loss)
            scaled = loss if scale is None else loss * scale
            grads: Sequence[Tensor | None]
            if by_backward:
                torch.autograd.backward(scaled)
                grads = [parameter.grad for parameter in parameters]
            else:
                grads = _autograd_grad(scaled, parameters)
            if scale is not None:
                grads = [None if grad is None else grad.detach() / scale for grad in grads]
        return loss.detach(), list(grads)

    def _value(self, trainer: pl.Trainer, pl_module: pl.LightningModule, drawn: HeldOutBatch) -> Tensor | None:
        with _validating(trainer):
            drawn = drawn._replace(batch=to_device(trainer, pl_module, drawn.batch, drawn.dataloader_idx))
        with trainer.precision_plugin.train_step_context():
            if self.loss is None:
                source, output = "training_step", self._training_step(pl_module, drawn)
            elif self.loss == "validation_step":
                source, output = "validation_step", _run_step(pl_module.validation_step, drawn)
            else:
                source, output = "loss callable", self.loss(pl_module, drawn.batch)
        if output is None and self.loss is None:
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MisconfigurationException(
                f"The {source} should return the loss to learn the radii from (a scalar tensor, or a dict with one"
                f" under 'loss'), found {_describe(output)}. Return it there, or pass another `loss`: None for the"
                " training_step, 'validation_step', or a callable (pl_module, batch) -> Tensor."
            )
        if not loss.requires_grad:
            raise MisconfigurationException(
                f"The held-out loss of the {source} has no gradient: it is detached, computed under torch.no_grad(), or"
                " depends on no trainable parameter. Mend that, or pass another `loss`."
            )
        return without_subclass(loss).reshape(())

    def _training_step(self, pl_module: pl.LightningModule, drawn: HeldOutBatch) -> Any:
        try:
            output = _run_step(pl_module.training_step, drawn)
        except (TypeError, LookupError) as error:
            if self._worked:
                raise
            raise MisconfigurationException(
                f"The training_step failed on its first held-out batch, a {type(drawn.batch).__name__}: {error!r}."
                " If training batches look different, pass `loss`: 'validation_step' or a callable (pl_module, batch)"
                " -> Tensor; or a `dataloader` (or tpgm_dataloader()) whose batches look like them."
            ) from error
        self._worked = True
        return output


class _ReentrantCheckpointingError(RuntimeError):
    """Reentrant activation checkpointing refuses autograd.grad."""


def _autograd_grad(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" in str(error) and ".grad()" in str(error):
            raise _ReentrantCheckpointingError from error
        raise


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    """Data hooks see a validation batch: held-out data get no training augmentation."""
    stage = trainer.state.stage
    trainer.state.stage = same_package(trainer, "trainer.states:RunningStage").VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def _loss_scale(trainer: pl.Trainer, loss: Tensor) -> Tensor | None:
    """What the trainer's gradient scaler multiplies a loss with, without waiting for the device; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones_like(loss, requires_grad=False))


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
def _trainable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """All parameters require a gradient, also those that a toggled optimizer has switched off."""
    switched_off = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in switched_off:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in switched_off:
            parameter.requires_grad_(False)


@contextmanager
def _grads_put_aside(module: nn.Module) -> Iterator[None]:
    """Every ``.grad`` of the module is None inside and put back on exit.

    To be entered before the forward: after it, FSDP2 may show gathered parameters in place of the sharded ones.
    """
    kept = [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


def _run_step(step: Callable[..., Any], drawn: HeldOutBatch) -> Any:
    """Call a step with the arguments that its signature asks for, by Lightning's own rule.

    A third argument is the loader's index if it is named so or has no default; else it is an affair of the module's.
    """
    if not is_param_in_hook_signature(step, "batch_idx", min_args=2):
        return step(drawn.batch)
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    third = [p for p in inspect.signature(step).parameters.values() if p.kind in by_position][2:3]
    if any(p.name == "dataloader_idx" or p.default is p.empty for p in third):
        return step(drawn.batch, drawn.batch_idx, drawn.dataloader_idx)
    return step(drawn.batch, drawn.batch_idx)


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dict with the keys {list(output)}"
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else repr(type(output).__name__)
