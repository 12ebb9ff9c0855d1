"""The module's own loss on a held-out batch, and its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tpgm.callbacks.framework import (
    MisconfigurationException,
    is_overridden,
    is_param_in_hook_signature,
    pl,
    same_package,
    to_device,
)
from lightning_tpgm.callbacks.heldout import HeldOutBatch
from lightning_tpgm.callbacks.isolation import isolated_generators
from lightning_tpgm.callbacks.source import name_of
from lightning_tpgm.callbacks.step_errors import Description, Evaluation, StepName, explained
from lightning_tpgm.callbacks.weights import without_subclass
from lightning_tpgm.gradients import LossGradient
from lightning_tpgm.methods.method import check

Loss = Literal["validation_step"] | Callable[[pl.LightningModule, Any], Any] | None  # Any: need not be annotated

_ARGUMENTS = "(pl_module, batch) -> Tensor"


class HeldOutLoss:
    """The loss of a module on a held-out batch and its gradient, in the trainer's precision; call it inside `no_trace`.

    Args:
        loss: None for the module's ``training_step``, ``"validation_step"``, or a callable (pl_module, batch) ->
            Tensor.
        eval_mode: Whether the module is in eval mode meanwhile; what errors say.

    Attributes:
        trained_on: What the last training batch was like, if that is known; what errors compare with.
    """

    def __init__(self, loss: Loss, eval_mode: bool = True) -> None:
        self.loss, self.eval_mode = loss, eval_mode
        self.trained_on: Description | None = None
        self._step: StepName = (
            "training_step" if loss is None else "validation_step" if loss == "validation_step" else "loss callable"
        )
        self._gradient = LossGradient(attempt=isolated_generators)  # a second attempt draws the same random numbers

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
            MisconfigurationException: If what came back is no scalar loss, or has no gradient; or in place of whatever
                the module raised, which is its cause.
        """
        with explained(self._evaluation(drawn), gradient=True):
            return self._gradient(
                pl_module,
                lambda: self._value(trainer, pl_module, drawn),
                parameters,
                lambda loss: _loss_scale(trainer, loss),
                # the module's own may enter what its loss needs, as torch's loss_parallel()
                pl_module.backward if is_overridden("backward", pl_module) else None,
            )

    def _evaluation(self, drawn: HeldOutBatch) -> Evaluation:
        return Evaluation(self._step, self.eval_mode, drawn.batch, self.trained_on)

    def _value(self, trainer: pl.Trainer, pl_module: pl.LightningModule, drawn: HeldOutBatch) -> Tensor | None:
        with explained(self._evaluation(drawn)), _validating(trainer):
            drawn = drawn._replace(batch=_copied(to_device(trainer, pl_module, drawn.batch, drawn.dataloader_idx)))
        with explained(self._evaluation(drawn)), trainer.precision_plugin.train_step_context():
            if self.loss is None:
                output: Any = _run_step(pl_module.training_step, drawn)
            elif self.loss == "validation_step":
                output = _run_step(pl_module.validation_step, drawn)
            else:
                output = self.loss(pl_module, drawn.batch)
        if output is None and self.loss is None:
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MisconfigurationException(
                f"The {self._step} should return the loss to learn the radii from (a scalar tensor, or a dict with one"
                f" under 'loss'), found {_describe(output)}. Return it there, or pass another `loss`: None for the"
                " training_step, 'validation_step', or a callable (pl_module, batch) -> Tensor."
            )
        if not loss.requires_grad:
            raise MisconfigurationException(
                f"The held-out loss of the {self._step} has no gradient: it is detached, computed under"
                " torch.no_grad(), or depends on no trainable parameter. Mend that, or pass another `loss`."
            )
        return without_subclass(loss).reshape(())


def check_loss(loss: object) -> None:
    """Raise a ValueError or a TypeError about a `loss` that no fit could use."""
    expected = f"None, 'validation_step' or a callable {_ARGUMENTS}"
    check(loss is None or loss == "validation_step" or callable(loss), "loss", expected, loss)
    if callable(loss):
        with suppress(ValueError):  # some callables have no signature
            signature = inspect.signature(loss)
            try:
                signature.bind("pl_module", "batch")
            except TypeError as error:
                raise TypeError(
                    f"`loss` should be a callable {_ARGUMENTS}, found {name_of(loss)} with the arguments"
                    f" {list(signature.parameters)}: {error}. Let it take the module and the batch."
                ) from error


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    """Data hooks see a validation batch: held-out data get no training augmentation."""
    stage = trainer.state.stage
    trainer.state.stage = same_package(trainer, "trainer.states:RunningStage").VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def _copied(value: Any) -> Any:
    """A batch with tensors of its own: those of the loader may be views of its data, and the step may write to them."""
    if isinstance(value, Tensor):
        # what a transfer hook has computed keeps its graph, which may lead to parameters
        return value.detach().clone().requires_grad_(value.requires_grad) if value.is_leaf else value.clone()
    if type(value) is dict:
        return {key: _copied(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value._make(map(_copied, value)) if isinstance(value, tuple) and hasattr(value, "_make") else value


def _loss_scale(trainer: pl.Trainer, loss: Tensor) -> Tensor | None:
    """What the trainer's gradient scaler multiplies a loss with, without waiting for the device; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.scale(torch.ones_like(loss, requires_grad=False))


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
