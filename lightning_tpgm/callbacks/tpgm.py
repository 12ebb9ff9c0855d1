"""TPGM in a Lightning `Trainer`, with its held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import Unpack, override

from lightning_tpgm.callbacks.evaluation import Loss, check_loss
from lightning_tpgm.callbacks.framework import (
    MisconfigurationException,
    is_overridden,
    logs_are_due,
    pl,
    rank_zero_warn,
    with_progress_bar,
)
from lightning_tpgm.callbacks.heldout_gradient import HeldOutGradient
from lightning_tpgm.callbacks.loaders import HOW_TO_GIVE_THEM, has_default_loaders
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.radii import WithRadii
from lightning_tpgm.callbacks.shared import Shared, configuration_errors
from lightning_tpgm.callbacks.source import check_source
from lightning_tpgm.methods import TPGM
from lightning_tpgm.methods.method import check, is_flag
from lightning_tpgm.methods.radii import RadiusLr
from lightning_tpgm.methods.tpgm import CADENCE, When
from lightning_tpgm.norms import Norm


class TPGMCallback(WithRadii, MethodCallback):
    """Learns for each weight tensor how far it may move from its pretrained value, while the module trains.

    After every optimizer step each constrained tensor is projected onto a ball around its anchor W0, the pretrained
    value: ``W := W0 + r (W - W0)`` with ``r = clip(gamma / (n + 1e-8), 0, 1)``, n the distance and gamma the radius.
    The radii are learned: they descend the module's own loss on held-out batches, at the projected weights.

    Args:
        dataloader: Held-out data: a DataLoader (or any iterable of batches), or a function that returns one. Also an
            import path of either, ``"my_project.data:held_out"``, resolved when the first batch is needed. None: a
            shuffled loader of the callback's own over the ``tpgm_dataloader()`` of the datamodule or module if one is
            defined, else over the validation data.
        radius_lr: ``"auto"``: each radius keeps pace with its tensor, at any learning rate, schedule and length of run.
            A number: Adam's learning rate for all radii. The authors used
            0.01 with ``every_n_steps=1``.
        norm: ``"mars"`` (maximum absolute row sum) or ``"l2"`` (Frobenius norm of the tensor). In mars each row has its
            distance, and all rows of a tensor share the radius.
        radius_steps: Radius updates each time they are due. None: 1, and 200 with ``when="fit_end"``.
        every_n_steps: The radii are updated on every n-th optimizer step, the first included. Weights are projected
            after every one. An update costs about as much as a step of its own. Several optimizers are counted one by
            one, and each step acts on that optimizer's tensors.
        loss: None for the module's ``training_step`` (evaluated without leaving a trace), ``"validation_step"``, or a
            callable (pl_module, batch) -> Tensor.
        eval_mode: Whether the held-out loss is evaluated in eval mode. False: in the modes that the module trains in,
            for detectors, auxiliary heads and others whose ``training_step`` needs train mode. Everything is put back.
        when: ``"training"``: after every optimizer step. ``"fit_end"``: the fit is plain fine-tuning. At its end the
            radii are learned in ``radius_steps`` updates at once, and the weights projected. The authors' recipe for
            CLIP on ImageNet is ``norm="l2"`` with 200 of them. Checkpoints that were written during the fit hold the
            fine-tuned weights. ``trainer.save_checkpoint`` after it saves the projected ones, and
            `lightning_tpgm.project_checkpoint` projects one that exists.
        shared: The arguments of all callbacks, by keyword. The logs also have ``tpgm/heldout_loss``.

    Raises:
        MisconfigurationException: For an argument out of its range, in the constructor. When the fit is set up, for
            manual optimization without ``loss``, and without any held-out data. Also with nothing left to constrain, or
            with a file that cannot be read.

    Source: Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, arXiv 2303.10720.

    >>> from lightning.pytorch import Trainer
    >>> callback = TPGMCallback(exclude=["head.*"])
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ...     logger=False,
    ...     enable_checkpointing=False,
    ... )
    >>> callback
    TPGMCallback(radius_lr='auto', norm='mars', radius_steps=1, every_n_steps=4, exclude=('head.*',))
    """

    _SHOWN = ("radius_lr", "norm", "radius_steps", "every_n_steps", "exclude")
    _METHOD = TPGM
    _KEY = "tpgm"

    def __init__(
        self,
        dataloader: DataLoader | Callable[[], Any] | Iterable[Any] | str | None = None,  # type: ignore[type-arg]
        *,
        radius_lr: RadiusLr = "auto",
        norm: Norm = "mars",
        radius_steps: int | None = None,
        every_n_steps: int = CADENCE,
        loss: Loss = None,
        eval_mode: bool = True,
        when: When = "training",
        **shared: Unpack[Shared],
    ) -> None:
        with configuration_errors():
            check_source(dataloader)
            check_loss(loss)
            check(is_flag(eval_mode), "eval_mode", "True or False", eval_mode)
        self.dataloader, self.loss, self.eval_mode = dataloader, loss, eval_mode
        self.radius_lr, self.norm = radius_lr, norm
        self.radius_steps, self.every_n_steps, self.when = radius_steps, every_n_steps, when
        super().__init__(**shared)
        self.radius_steps = self._tpgm.radius_steps  # its default depends on `when`

    @override
    def make_method(self) -> TPGM:
        """TPGM that learns from this callback's held-out data."""
        tpgm: TPGM = super().make_method()
        tpgm.held_out = HeldOutGradient(self.dataloader, self.loss, self.eval_mode)
        tpgm.lowers_loss = self.loss is None
        return tpgm

    # ---- Lightning's hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Also refuses what cannot work with this module and these data."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.loss is None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__} cannot evaluate the training_step of a module with manual optimization: it"
                " would step the optimizers. Pass `loss`: 'validation_step', or a callable (pl_module, batch) ->"
                " Tensor."
            )
        if self.loss == "validation_step" and not is_overridden("validation_step", pl_module):
            raise MisconfigurationException(
                f"`loss` = 'validation_step', but {type(pl_module).__name__} defines no validation_step. Define one"
                " that returns the loss, or pass another `loss`."
            )
        if self.dataloader is None and not has_default_loaders(trainer, pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__} found no held-out data to learn the radii from. {HOW_TO_GIVE_THEM}"
            )

    @override
    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._begin(trainer, pl_module)
        self._held_out.attach(trainer, pl_module)
        self._tpgm.progress = lambda updates: with_progress_bar(trainer, updates, "Learning radii")
        self._warned = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Also sees what training batches look like."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._held_out.saw(batch)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Also logs the held-out loss, shows the mean ratio in the progress bar, and warns of skipped updates."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        tpgm = self._tpgm
        if tpgm.skipped.device.type != "cpu" and not logs_are_due(trainer):
            return  # to read a value would make the host wait for the device
        self._logs.show(trainer, pl_module, self._scalars())
        tpgm.heldout_loss = None  # it is logged
        if trainer.progress_bar_callback is not None and self._constraint.at_hand and tpgm.radii.names:
            self._logs.in_bar(trainer, pl_module, tpgm.radii.quantities()["ratio"].mean())
        self._warn_of_skipped()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also warns of skipped updates."""
        super().on_train_end(trainer, pl_module)
        self._warn_of_skipped()

    @override
    def _let_go(self) -> None:
        """Also ends the held-out loader's workers."""
        self._held_out.close()
        vars(self._tpgm).pop("progress", None)  # it knows the trainer
        super()._let_go()

    @override
    def _scalars(self) -> dict[str, Tensor]:
        """The held-out loss of the last update, if it was not logged yet."""
        loss = self._tpgm.heldout_loss
        return {} if loss is None else {"heldout_loss": loss}

    def _warn_of_skipped(self) -> None:
        if not self._warned and bool(self._tpgm.skipped):
            self._warned = True
            rank_zero_warn(
                "The held-out loss, or its gradient, is not finite: that radius update was skipped, training goes on."
                " Further ones are skipped without a warning."
            )

    @property
    def _tpgm(self) -> TPGM:
        return cast(TPGM, self._constraint.method)

    @property
    def _held_out(self) -> HeldOutGradient:
        return cast(HeldOutGradient, self._tpgm.held_out)
