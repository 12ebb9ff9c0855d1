"""WiSE-FT: interpolation between the pretrained and the fine-tuned weights, in a Lightning `Trainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_tpgm.callbacks.framework import (
    MisconfigurationException,
    is_overridden,
    isolate_rng,
    pl,
    rank_zero_info,
    validate_aside,
    validation_source,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.callbacks.shared import Shared, configuration_errors
from lightning_tpgm.callbacks.sweep import ALPHAS, Search, Tolerance, alpha_setter, not_logged
from lightning_tpgm.callbacks.sweep_result import Mode, WiSEFTSweep
from lightning_tpgm.methods import WiSEFT
from lightning_tpgm.methods.method import check, is_number


class WiSEFTCallback(MethodCallback):
    """Replaces the weights at the end of the fit by W0 + alpha (W - W0), one alpha for all tensors.

    Floating-point buffers (the running statistics of BatchNorm) are interpolated with the same alpha. Other
    buffers, and those whose shape has changed, keep their fine-tuned value. At alpha = 0 the tensors are the pretrained
    ones, at alpha = 1 the fine-tuned, to the bit.
    Parameters without a pretrained value (a new head) keep their fine-tuned one. Checkpoints that were written during
    the fit hold the fine-tuned weights. ``trainer.save_checkpoint`` after it saves the interpolated ones.

    ``alpha="sweep"`` chooses alpha when the training ends, as `wise_ft_sweep` does after it: the validation runs once
    for each of ``alphas``. Listed after a `TPGMCallback`, it interpolates what that one has projected. Nothing of these
    validations goes to the loggers but ``wise_ft/alpha``, and checkpoints and early stopping do not see them. After the
    fit ``sweep`` holds what was measured, a `WiSEFTSweep`.

    Args:
        alpha: In [0, 1], or ``"sweep"``. None: the fit changes nothing. Afterwards `wise_ft_sweep` with
            `WiSEFTCallback.anchor` chooses alpha by a validation metric.
        monitor: With ``"sweep"``: a metric that the module's validation logs.
        mode: With ``"sweep"``, as in `wise_ft_sweep`.
        tolerance: With ``"sweep"``, as in `wise_ft_sweep`.
        alphas: With ``"sweep"``: what to try, each in [0, 1].
        shared: The arguments of all callbacks, by keyword.

    Raises:
        MisconfigurationException: For an argument out of its range. When the fit starts, with nothing to interpolate or
            no validation. After the first validation, if that does not log the metric.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903.

    >>> from lightning.pytorch import Trainer
    >>> callback = WiSEFTCallback(alpha=0.5)
    >>> trainer = Trainer(
    ...     callbacks=[callback],
    ...     accelerator="cpu",
    ... )
    >>> callback
    WiSEFTCallback(alpha=0.5, exclude=())
    """

    _METHOD = WiSEFT
    _KEY = "wise_ft"

    def __init__(
        self,
        alpha: float | Literal["sweep"] | None = 0.5,
        *,
        monitor: str | None = None,
        mode: Mode = "max",
        tolerance: Tolerance = 0.0,
        alphas: Sequence[float] = ALPHAS,
        **shared: Unpack[Shared],
    ) -> None:
        with configuration_errors():
            known = alpha is None or alpha == "sweep" or (is_number(alpha) and 0 <= alpha <= 1)
            check(known, "alpha", "a number in [0, 1], 'sweep' or None", alpha)
            needed = "a metric that validation logs" if alpha == "sweep" else "None without `alpha` = 'sweep'"
            check(isinstance(monitor, str) if alpha == "sweep" else monitor is None, "monitor", needed, monitor)
            Search(monitor or "", alphas, mode, tolerance)
        self.alpha, self.monitor, self.mode, self.tolerance = alpha, monitor, mode, tolerance
        self.alphas = tuple(map(float, alphas))
        self.sweep: WiSEFTSweep | None = None
        if alpha == "sweep":
            self._SHOWN = ("alpha", "monitor", "tolerance", "exclude")
        super().__init__(**shared)

    @override
    def make_method(self) -> WiSEFT:
        """With a sweep: the fine-tuned end, until an alpha is chosen."""
        return WiSEFT(1.0) if self.alpha == "sweep" else WiSEFT(self.alpha)

    @property
    def _search(self) -> Search | None:
        return None if self.monitor is None else Search(self.monitor, self.alphas, self.mode, self.tolerance)

    # ---- Lightning's hooks

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Also refuses a sweep without validation."""
        super().setup(trainer, pl_module, stage)
        search = self._search
        if stage != "fit" or search is None:
            return
        search.check_trainer(trainer)
        validates = is_overridden("validation_step", pl_module) and validation_source(trainer).is_defined()
        if not validates or not trainer.limit_val_batches:
            raise MisconfigurationException(
                f"{self!r} found no validation to choose alpha by. Define validation_step and val_dataloader(), and"
                " leave `limit_val_batches` above 0. Or give a number as `alpha`."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also forgets an earlier fit's sweep."""
        super().on_train_start(trainer, pl_module)
        self.sweep = None

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a metric that is not logged, before the whole training is spent."""
        during_fit = trainer.state.fn == "fit" and not trainer.sanity_checking
        if during_fit and self.monitor is not None and self.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(not_logged(self.monitor, trainer.callback_metrics))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Chooses alpha, if that is asked for, and interpolates."""
        if (search := self._search) is not None:
            self._stop()
            self._choose(search, trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _choose(self, search: Search, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        constraint = self._constraint
        method = cast(WiSEFT, constraint.method)

        def present() -> Mapping[str, Tensor]:
            constraint.find_buffers()
            return constraint.anchors.parameters

        def interpolate(alpha: float) -> None:
            method.alpha = alpha
            constraint.finish()

        def validate() -> dict[str, Tensor]:
            with isolate_rng():
                return validate_aside(trainer)

        set_alpha = alpha_setter(pl_module, present, interpolate, self.anchor_device)
        self.sweep = sweep = search.run(trainer, set_alpha, validate)
        set_alpha(1.0)  # what follows interpolates
        method.alpha = sweep.chosen_alpha
        rank_zero_info(
            f"{type(self).__name__}: alpha = {sweep.chosen_alpha:g} of {self.monitor!r}, best at {sweep.best_alpha:g}."
        )

    @override
    def _scalars(self) -> dict[str, Tensor]:
        return {} if self.sweep is None else {"alpha": torch.tensor(self.sweep.chosen_alpha)}
