"""TPGM: the Trainable Projected Gradient Method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained
from lightning_tpgm.callbacks.base import check
from lightning_tpgm.callbacks.observed import Log
from lightning_tpgm.callbacks.radius import RadiusCallback
from lightning_tpgm.evaluation import HeldOutLoss, Loss
from lightning_tpgm.framework import (
    MisconfigurationException,
    is_overridden,
    logs_are_due,
    pl,
    rank_zero_warn,
    with_progress_bar,
)
from lightning_tpgm.heldout import HeldOutBatches, has_default_loaders, held_out_batches, warn_of_shared_examples
from lightning_tpgm.isolation import no_trace
from lightning_tpgm.layout import Matrices
from lightning_tpgm.norms import Norm
from lightning_tpgm.projection import radius_slope
from lightning_tpgm.sharding import local_gradient


class TPGMCallback(RadiusCallback):
    """Learns for each weight tensor how far it may move from its pretrained value, while the module trains.

    After every optimizer step each constrained tensor is projected onto a ball around its anchor W0, the pretrained
    value: ``W := W0 + r (W - W0)`` with ``r = clip(gamma / (n + 1e-8), 0, 1)``, n the distance and gamma the radius.
    The radii are learned by Adam on the module's own loss on held-out batches, at the projected weights.

    Args:
        dataloader: Held-out data: a DataLoader (or any iterable of batches), a function that returns one, or an import
            path of either, ``"my_project.data:held_out"``, resolved when the first batch is needed. None: a shuffled
            loader of the callback's own over the ``tpgm_dataloader()`` of the datamodule or module if one is defined,
            else over the validation data.
        radius_lr: Adam learning rate of the radii.
        norm: ``"mars"`` (maximum absolute row sum; each row has its distance, all rows of a tensor share the radius) or
            ``"l2"`` (Frobenius norm of the tensor).
        radius_steps: Radius updates each time they are due.
        every_n_steps: The radii are updated on every n-th optimizer step, the first included; weights are projected
            after every one. Several optimizers are counted one by one, and each step acts on that optimizer's tensors.
        exclude: fnmatch patterns over parameter names, for instance ``["head.*"]``; those are not constrained.
        pretrained: Where the anchors come from: the path of a Lightning checkpoint or of a state dict (also
            ``.safetensors``), a mapping, or a module. None: the weights at the start of the fit. Parameters that it
            lacks, or has in another shape, are not constrained, and this is reported.
        loss: None for the module's ``training_step`` (evaluated without leaving a trace), ``"validation_step"``, or a
            callable (pl_module, batch) -> Tensor.
        when: ``"training"``: after every optimizer step. ``"fit_end"``: the fit is plain fine-tuning, and at its end
            the radii are learned in ``radius_steps`` updates at once and the weights projected (the authors' recipe for
            CLIP on ImageNet: ``norm="l2", radius_steps=200``). Checkpoints that were written during the fit hold the
            fine-tuned weights; ``trainer.save_checkpoint`` after it saves the projected ones, and
            `lightning_tpgm.project_checkpoint` projects one that exists.
        log: What goes to the trainer's loggers at its ``log_every_n_steps``. ``"summary"``: ``tpgm/heldout_loss``,
            ``tpgm/mean_ratio`` and ``tpgm/min_ratio`` (what the projection left of the deviation of a tensor's farthest
            row; 1: inside the ball), ``tpgm/binding`` (the share of tensors whose constraint binds) and
            ``tpgm/distance`` (of all tensors: the root of the sum of squares). ``"all"``: also
            ``tpgm_radius/NAME`` and ``tpgm_distance/NAME`` of each tensor. ``"none"``: nothing.
        summary: Whether the fit ends with a printed table of the tensors that moved most and least; needs rich.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory, pinned, and come to the GPU block by block
            when they are needed: twice a step, and twice more for each radius update. None: on the parameters' device.
        compile: Whether distances, projections and radius gradients are fused by ``torch.compile``, each to one pass
            over memory; needs what that needs (on a CPU a C++ compiler), and takes some ten seconds once. Where it does
            not work a warning says so.

    Raises:
        MisconfigurationException: For an argument out of its range, in the constructor; when the fit is set up, for
            manual optimization without ``loss``, without any held-out data, with nothing left to constrain, or with a
            file that cannot be read.

    Source: Tian et al., "Trainable Projected Gradient Method for Robust Fine-tuning", CVPR 2023, arXiv 2303.10720.

    >>> from lightning.pytorch import Trainer
    >>> callback = TPGMCallback(radius_lr=1e-2, exclude=["head.*"])
    >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
    >>> callback
    TPGMCallback(radius_lr=0.01, norm='mars', radius_steps=1, every_n_steps=1, exclude=('head.*',))
    """

    _SHOWN = ("radius_lr", "norm", "radius_steps", "every_n_steps", "exclude")
    _KEY = "tpgm"
    _IN_BAR = ("heldout_loss", "mean_ratio")
    _held_out: HeldOutBatches | None
    _held_out_state: dict[str, int]
    _held_out_loss: Tensor | None
    _kept: Matrices
    _warned: bool

    def __init__(
        self,
        dataloader: DataLoader | Callable[[], Any] | Iterable[Any] | str | None = None,  # type: ignore[type-arg]
        *,
        radius_lr: float = 1e-2,
        norm: Norm = "mars",
        radius_steps: int = 1,
        every_n_steps: int = 1,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        loss: Loss = None,
        when: Literal["training", "fit_end"] = "training",
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
        compile: bool = False,
    ) -> None:
        super().__init__(radius_lr, norm, exclude, pretrained, log, summary, anchor_device, compile)
        given: object = dataloader
        usable = given is None or isinstance(given, Iterable) or callable(given)
        check(usable, "dataloader", "a loader, a function that returns one, an import path or None", dataloader)
        if isinstance(dataloader, str):
            names = dataloader.replace(":", ".", 1).split(".")
            path = len(names) > 1 and all(name.isidentifier() for name in names)
            check(path, "dataloader", "an import path like 'my_project.data:held_out'", dataloader)
        counts: dict[str, object] = {"radius_steps": radius_steps, "every_n_steps": every_n_steps}
        for name, value in counts.items():
            positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
            check(positive, name, "a positive integer", value)
        check(
            loss is None or loss == "validation_step" or callable(loss),
            "loss",
            "None, 'validation_step' or a callable (pl_module, batch) -> Tensor",
            loss,
        )
        check(when in ("training", "fit_end"), "when", "'training' or 'fit_end'", when)
        if when == "fit_end" and every_n_steps != 1:
            raise MisconfigurationException(
                f"`every_n_steps` = {every_n_steps} has no effect with `when` = 'fit_end': no optimizer"
                " steps follow. Leave it out; `radius_steps` is the number of updates."
            )
        self.dataloader = dataloader
        self.radius_steps = radius_steps
        self.every_n_steps = every_n_steps
        self.loss = loss
        self.when = when
        self._evaluate = HeldOutLoss(loss)

    @override
    def acts_after_steps(self) -> bool:
        """Not with ``when="fit_end"``."""
        return self.when == "training"

    # ---- Lightning's hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses what cannot work with this module and these data."""
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
                f"{type(self).__name__} found no held-out data to learn the radii from. Pass `dataloader`, or define"
                " tpgm_dataloader() or val_dataloader() in the datamodule or the module."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also warns of callbacks that would undo what is done at the end of the fit."""
        super().on_train_start(trainer, pl_module)
        if not self.acts_after_steps():
            self._check_has_the_last_word(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Also shows the held-out loss in the progress bar; warns of skipped updates."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._skipped.device.type != "cpu" and not logs_are_due(trainer):
            return  # to read a value would make the host wait for the device
        shown = {}
        if self._held_out_loss is not None:
            shown["heldout_loss"], self._held_out_loss = self._held_out_loss, None
        if self.acts_after_steps() and self._parameters:
            shown["mean_ratio"] = self.quantities()["ratio"].mean()
        # on the CPU, because Lightning reads what is in the bar again after every batch
        self._log_dict(trainer, pl_module, {name: value.cpu() for name, value in shown.items()}, prog_bar=True)
        self._warn_of_skipped()

    @override
    def at_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learns the radii now, if that was asked for."""
        if not self.acts_after_steps() and self._parameters:
            self.constrain_now(trainer, pl_module)
        self._warn_of_skipped()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ends the held-out loader's workers."""
        super().on_exception(trainer, pl_module, exception)
        self._close_held_out()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ends the held-out loader's workers, and lets go of memory that only a fit needs."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit":
            self._close_held_out()
            self._kept = []

    # ---- the method

    @override
    def growth(self) -> float:
        """Counts the updates of a step."""
        return super().growth() * self.radius_steps / self.every_n_steps

    @override
    def scalars(self) -> dict[str, Tensor]:
        """The held-out loss of the last update, if it was not logged yet."""
        return {} if self._held_out_loss is None else {"heldout_loss": self._held_out_loss}

    @override
    def reset_method(self) -> None:
        """Forgets the radii and the position in the held-out data."""
        super().reset_method()
        self._steps: dict[int, int] = {}  # seen of each optimizer, by its index
        self._held_out = None
        self._held_out_state = {}
        self._held_out_loss = None  # of the last update, until it is logged
        self._kept = []  # memory for the weights before the projection
        self._skipped = torch.zeros((), dtype=torch.long)  # updates that were not finite
        self._warned = False

    @override
    def method_state(self) -> dict[str, Any]:
        """Radii, their Adam state, the step count and the position in the held-out data."""
        held_out = self._held_out_state if self._held_out is None else self._held_out.state_dict()
        return {**super().method_state(), "steps": dict(self._steps), "held_out": held_out}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        """Takes over what `method_state` gave."""
        super().load_method_state(state)
        self._steps, self._held_out_state, self._held_out = state["steps"], state["held_out"], None

    @override
    def after_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Updates the radii of this optimizer's tensors if that is due, and projects these."""
        if self.acts_after_steps():
            index = trainer.optimizers.index(optimizer)
            steps = self._steps.get(index, 0)
            self._steps[index] = steps + 1
            due = steps % self.every_n_steps == 0
            self._constrain(trainer, pl_module, range(self.radius_steps if due else 0), optimizer)

    def constrain_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make all radius updates at once, with a progress bar, and project the weights."""
        updates = with_progress_bar(trainer, range(self.radius_steps), "Learning radii")
        with torch.no_grad():
            self._constrain(trainer, pl_module, updates)

    def _constrain(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        updates: Sequence[int],
        optimizer: Optimizer | None = None,
    ) -> None:
        """Update the radii and project the weights after a step of an optimizer, or at the end of the fit."""
        owned = [True for _ in self._parameters]
        if optimizer is not None and len(trainer.optimizers) > 1:  # the weights of the others have not moved
            owned = self._owned(optimizer)
        if not any(owned):
            return
        moved = self._moved(owned, optimizer)
        weights = self._layout.arrange(self._weights)
        if updates:  # the parameters will hold projections
            self._kept = self._kept or [torch.empty_like(matrix) for matrix in weights]
            distances, largest = self._measure(weights, copies=self._kept)
            weights = self._kept
        else:
            distances, largest = self._measure(weights)
        self._radii.start(self._sharding.smallest(self._layout.smallest(distances)) / 2, where=moved)
        try:
            for _ in updates:
                self._radii.clamp(largest, where=moved)
                self._project(pl_module, weights, distances, owned)
                self._update_radii(trainer, pl_module, weights, distances, moved)
        finally:  # whatever happens, the weights are left inside the ball
            self._radii.clamp(largest, where=moved)
            self._project(pl_module, weights, distances, owned)
            self._projected(largest, moved)

    def _moved(self, owned: Sequence[bool], optimizer: Optimizer | None) -> Tensor:
        """Which tensors the step moved, shape (T,): all that the optimizer owns, or none."""
        moved = self._layout.on_device(owned)
        # While a fused optimizer steps under a gradient scaler it holds this flag and may skip the step; to read it
        # here would make a GPU wait.
        skipped = getattr(optimizer, "found_inf", None)
        return moved if skipped is None else moved & (skipped == 0)

    def _update_radii(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        weights: Matrices,
        distances: Tensor,
        moved: Tensor,
    ) -> None:
        """One Adam step on the radii of the moved tensors; the parameters hold the projections of ``weights``."""
        parameters = list(self._parameters.values())
        with no_trace(trainer, pl_module):
            if self._held_out is None:
                self._held_out = held_out_batches(trainer, pl_module, self.dataloader, self._held_out_state)
                warn_of_shared_examples(trainer, self._held_out)
            loss, grads = self._evaluate(trainer, pl_module, self._held_out.draw(), parameters)
        if loss is None and trainer.world_size == 1:
            return  # "skip this batch"; several processes must go on together: not a number skips it on all of them
        layout, radii = self._layout, self._radii.value
        parts = [None if g is None else local_gradient(g, p) for g, p in zip(grads, parameters, strict=True)]
        dots = layout.dots(layout.arrange(parts), weights, self._anchors)
        slopes = layout.total(radius_slope(dots, distances, layout.of_rows(radii)))
        value = radii.new_full((1,), torch.nan) if loss is None else loss.to(radii).reshape(1)
        used = layout.on_device([grad is not None for grad in grads]).to(radii)
        summary = torch.cat([value, self._sharding.total(slopes), used])
        summary = trainer.strategy.reduce(summary, reduce_op="mean")
        slope, used = summary[1:].chunk(2)
        finite = summary.isfinite().all()
        self._radii.adam(slope, where=finite & (used > 0) & moved)
        self._held_out_loss = summary[0]
        self._skipped = self._skipped + ~finite

    def _warn_of_skipped(self) -> None:
        if not self._warned and bool(self._skipped):
            self._warned = True
            rank_zero_warn(
                "The held-out loss, or its gradient, is not finite: that radius update was skipped, training goes on."
                " Further ones are skipped without a warning."
            )

    @override
    def _arrange(self) -> None:
        super()._arrange()
        self._kept = []

    @override
    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._begin(trainer, pl_module)
        self._skipped = self._skipped.to(self._layout.scalar().device)
        if not self._held_out_state:  # a fresh run: from now on the order of the held-out data is settled
            seed = trainer.strategy.broadcast(torch.initial_seed() % 2**62)
            self._held_out_state = {"seed": seed, "drawn": 0, "passes": 0, "position": 0}

    def _close_held_out(self) -> None:
        if self._held_out is not None:
            self._held_out_state, self._held_out = self._held_out.state_dict(), None
