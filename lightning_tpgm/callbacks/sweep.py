"""WiSE-FT with alpha chosen by the module's own validation metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_tpgm.anchors import AnchorDevice, Anchors, capture
from lightning_tpgm.callbacks.averages import averages_held_still, end_averages
from lightning_tpgm.callbacks.framework import (
    MisconfigurationException,
    batch_values,
    callbacks_of,
    pl,
    rank_zero_info,
)
from lightning_tpgm.callbacks.loaders import flat
from lightning_tpgm.callbacks.shared import configuration_errors
from lightning_tpgm.callbacks.source import check_many_passes
from lightning_tpgm.callbacks.standard_error import standard_error
from lightning_tpgm.callbacks.sweep_result import Mode, WiSEFTSweep, warn_of_no_choice
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods import WiSEFT
from lightning_tpgm.methods.method import check, is_number
from lightning_tpgm.pretrained import Pretrained, read_pretrained
from lightning_tpgm.selection import buffers_of, constrainable
from lightning_tpgm.sharding import gathering, local, reshard

ALPHAS = tuple(i / 10 for i in range(11))
Tolerance = float | Literal["one_standard_error"]


@dataclass(frozen=True)
class Search:
    """Which alphas are tried, and how one of them is chosen: the arguments of `wise_ft_sweep` of these names.

    Raises:
        ValueError: For an argument out of its range.
    """

    monitor: str
    alphas: Sequence[float]
    mode: Mode
    tolerance: Tolerance

    def __post_init__(self) -> None:  # noqa: D105
        usable = len(self.alphas) > 0 and all(is_number(alpha) and 0 <= alpha <= 1 for alpha in self.alphas)
        check(usable, "alphas", "numbers in [0, 1], at least one", self.alphas)
        check(self.mode in ("max", "min"), "mode", "'max' or 'min'", self.mode)
        known = self.tolerance == "one_standard_error" or (is_number(self.tolerance) and float(self.tolerance) >= 0)
        check(known, "tolerance", "a number of at least 0 or 'one_standard_error'", self.tolerance)

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """Refuse what cannot be measured there: each process would know its own batches alone."""
        if self.tolerance == "one_standard_error" and trainer.world_size > 1:
            raise MisconfigurationException(
                f"`tolerance` = 'one_standard_error' needs all batches in one process, found {trainer.world_size}"
                " processes. Give a number in the metric's unit, or validate after the fit with Trainer(devices=1)."
            )

    @torch.no_grad()
    def run(
        self, trainer: pl.Trainer, set_alpha: Callable[[float], None], validate: Callable[[], Mapping[str, Tensor]]
    ) -> WiSEFTSweep:
        """Measure at each alpha, and leave the module at the chosen one; after an error at its fine-tuned end.

        Args:
            trainer: Its ``validate_loop`` measures.
            set_alpha: Lets the module hold the weights at an alpha.
            validate: Gives the metrics by name.
        """
        self.check_trainer(trainer)
        values, errors = [], []
        try:
            for alpha in self.alphas:
                set_alpha(alpha)
                with averages_held_still(trainer):
                    value, error = self._measure(trainer, validate)
                values.append(value)
                errors.append(error)
            sweep = WiSEFTSweep(self.monitor, self.mode, tuple(self.alphas), tuple(values))
            number = dict(zip(sweep.alphas, errors, strict=True)).get(sweep.best_alpha, errors[-1])
            sweep = replace(sweep, tolerance=number)
            warn_of_no_choice(sweep)
            set_alpha(sweep.chosen_alpha)
        except BaseException:
            set_alpha(1.0)
            raise
        return sweep

    def _measure(self, trainer: pl.Trainer, validate: Callable[[], Mapping[str, Tensor]]) -> tuple[float, float]:
        """The metric, and the tolerance if it is the best."""
        recorded: AbstractContextManager[list[tuple[Any, int]]] = nullcontext([])
        if isinstance(self.tolerance, str):
            recorded = batch_values(trainer, self.monitor)
        with recorded as batches:
            metrics = validate()
        if self.monitor not in metrics:
            raise MisconfigurationException(not_logged(self.monitor, metrics))
        # one choice for all processes, also of a metric that each of them logs for itself
        value = float(trainer.strategy.broadcast(float(metrics[self.monitor])))
        if not isinstance(self.tolerance, str):
            return value, float(self.tolerance)
        error = standard_error(value, [(math.nan if v is None else float(v), size) for v, size in batches])
        if error is None:
            raise MisconfigurationException(
                f"The standard error of {self.monitor!r} = {value:.6g} cannot be had from {len(batches)} logged values."
                " `tolerance` = 'one_standard_error' needs a mean that validation_step logs, of hits or in at least two"
                " batches. Log a torchmetrics object by its `forward`, or give a number in the metric's unit."
            )
        return value, error


def not_logged(monitor: str, metrics: Mapping[str, Tensor]) -> str:
    """Why there is no value to choose by."""
    return f"`monitor` should be a metric that validation logs, found {monitor!r}. Logged are {sorted(metrics)}."


def alpha_setter(
    model: torch.nn.Module,
    present: Callable[[], Mapping[str, Tensor]],
    interpolate: Callable[[float], None],
    device: AnchorDevice = None,
) -> Callable[[float], None]:
    """A function that lets a module, which holds its fine-tuned weights now, hold those at an alpha.

    Args:
        model: The module.
        present: Gives what is interpolated; validation may put other tensors in the place of buffers.
        interpolate: Does it, from the fine-tuned end.
        device: Where the fine-tuned values are kept, as for anchors.
    """
    finetuned = {name: capture(target, target, device) for name, target in present().items()}

    @torch.no_grad()
    def set_alpha(alpha: float) -> None:
        reshard(model)
        for name, target in present().items():  # validation may have left the module on another device
            local(target).copy_(local(finetuned[name]))
        interpolate(alpha)

    return set_alpha


def wise_ft_sweep(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    pretrained: Pretrained,
    monitor: str,
    *,
    alphas: Sequence[float] = ALPHAS,
    mode: Mode = "max",
    tolerance: Tolerance = 0.0,
    exclude: Sequence[str] = (),
    dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
) -> WiSEFTSweep:
    """Validate the module at each alpha and leave it at the chosen one.

    That is the smallest alpha whose metric is within ``tolerance`` of the best: as near to the pretrained weights as
    costs nothing. It works after any method, `TPGMCallback` first of all. The fine-tuned end is what the module holds
    now. The data should be held out and in distribution: choosing alpha on shifted test data would be looking at the
    answer. Of a trainer with a `WeightAveraging` the module's weights are measured, not the average. Where no value is
    finite a warning says so, and the fine-tuned weights stay.

    ``"one_standard_error"`` is that of the metric at the best alpha. The metric must be a mean over examples, logged in
    ``validation_step``. For a share m of hits among N examples, such as accuracy, it is sqrt(m (1 - m) / N). For other
    means, such as a loss, it comes from the scatter between batches: that takes mixed data, and is rough with few
    batches. It takes one process; on several give a number.

    Args:
        trainer: Its ``validate`` measures.
        model: The fine-tuned module.
        pretrained: The other end, as in `TPGMCallback`, or `TPGMCallback.anchor` (of any callback) after a fit.
        monitor: A metric that the module's validation logs.
        alphas: What to try, each in [0, 1].
        mode: Whether the metric should be large or small.
        tolerance: How much worse than the best the metric may be: a number in the metric's unit, or
            ``"one_standard_error"``. 0: the best alpha is chosen.
        exclude: fnmatch patterns over parameter and buffer names; those keep their fine-tuned value.
        dataloaders: As in ``trainer.validate``.
        datamodule: As in ``trainer.validate``.

    Returns:
        The metric at each alpha, with `WiSEFTSweep.chosen_alpha`, `WiSEFTSweep.best_alpha` and `WiSEFTSweep.plot`.

    Raises:
        MisconfigurationException: For an argument out of its range, or pretrained weights that do not fit. For a metric
            that validation does not log, or that has no standard error if one is asked for.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, section 3. The standard error is that
        of Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3.
    """
    with configuration_errors():
        search = Search(monitor, alphas, mode, tolerance)
        for loader in flat(dataloaders):
            check_many_passes("`dataloaders`", loader, "a list of its batches")
        candidates = constrainable(model, exclude, buffers=True)
        anchors = Anchors()
        anchors.begin_from(read_pretrained(pretrained), candidates, rank_zero_info)
    anchors.join(frozen=True)

    def present() -> Mapping[str, Tensor]:
        anchors.replace(buffers_of(model))
        return anchors.parameters

    def interpolate(alpha: float) -> None:
        WiSEFT(alpha).finish(Constrained(anchors.parameters, anchors.joined, WiSEFT.norm, gathering(model)))

    def validate() -> Mapping[str, Tensor]:
        trainer.validate(model, dataloaders=dataloaders, datamodule=datamodule, verbose=False)
        return trainer.callback_metrics

    back = end_averages(callbacks_of(trainer))
    try:
        return search.run(trainer, alpha_setter(model, present, interpolate), validate)
    except BaseException:
        back()
        raise
