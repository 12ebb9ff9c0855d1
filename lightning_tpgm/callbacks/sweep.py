"""WiSE-FT with alpha chosen by the module's own validation metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_tpgm.anchors import Anchors, capture
from lightning_tpgm.callbacks.framework import MisconfigurationException, pl, rank_zero_info
from lightning_tpgm.callbacks.shared import configuration_errors
from lightning_tpgm.constrained import Constrained, gathering
from lightning_tpgm.methods import WiSEFT
from lightning_tpgm.methods.method import check, is_number
from lightning_tpgm.observing.plotting import axes_for
from lightning_tpgm.pretrained import Pretrained, read_pretrained
from lightning_tpgm.selection import constrainable
from lightning_tpgm.sharding import local, reshard

ALPHAS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True)
class WiSEFTSweep:
    """What `wise_ft_sweep` measured.

    Attributes:
        monitor: Name of the metric.
        mode: ``"max"`` or ``"min"``: which values are better.
        alphas: The alphas tried, in order.
        values: The metric at each of them.
    """

    monitor: str
    mode: Literal["max", "min"]
    alphas: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def best_alpha(self) -> float:
        """The alpha with the best value; among equals the smallest, nearest to the pretrained weights.

        A value that is not a number is worse than any other.
        """
        sign = 1 if self.mode == "max" else -1

        def rank(pair: tuple[float, float]) -> tuple[bool, float, float]:
            alpha, value = pair
            return (False, 0.0, -alpha) if math.isnan(value) else (True, sign * value, -alpha)

        return max(zip(self.alphas, self.values, strict=True), key=rank)[0]

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the metric over alpha.

        Args:
            ax: Matplotlib axes to draw into; None: a new figure.

        Returns:
            The matplotlib figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        figure, axes = axes_for(ax)
        axes.plot(self.alphas, self.values, marker="o")
        axes.axvline(self.best_alpha, linestyle=":", color="grey")
        axes.set(xlabel="alpha (0: pretrained, 1: fine-tuned)", ylabel=self.monitor)
        return figure, axes


def wise_ft_sweep(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    pretrained: Pretrained,
    monitor: str,
    *,
    alphas: Sequence[float] = ALPHAS,
    mode: Literal["max", "min"] = "max",
    exclude: Sequence[str] = (),
    dataloaders: Any = None,
    datamodule: pl.LightningDataModule | None = None,
) -> WiSEFTSweep:
    """Validate the module at each alpha and leave it at the best one.

    The fine-tuned end is what the module holds now. The data should be held out and in distribution: choosing alpha on
    shifted test data would be looking at the answer.

    Args:
        trainer: Its ``validate`` measures.
        model: The fine-tuned module.
        pretrained: The other end, as in `TPGMCallback`, or `WiSEFTCallback.anchor` after a fit.
        monitor: A metric that the module's validation logs.
        alphas: What to try, each in [0, 1].
        mode: Whether the metric should be large or small.
        exclude: fnmatch patterns over parameter and buffer names; those keep their fine-tuned value.
        dataloaders: As in ``trainer.validate``.
        datamodule: As in ``trainer.validate``.

    Returns:
        The metric at each alpha, with `WiSEFTSweep.best_alpha` and `WiSEFTSweep.plot`.

    Raises:
        MisconfigurationException: For an argument out of its range, a metric that validation does not log, or
            pretrained weights that do not fit.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, section 3.
    """
    usable = len(alphas) > 0 and all(is_number(alpha) and 0 <= alpha <= 1 for alpha in alphas)
    with configuration_errors():
        check(usable, "alphas", "numbers in [0, 1], at least one", alphas)
        check(mode in ("max", "min"), "mode", "'max' or 'min'", mode)
        candidates = constrainable(model, exclude, buffers=True)
        anchors = Anchors()
        anchors.begin_from(read_pretrained(pretrained), candidates, rank_zero_info)
    anchors.join(frozen=True)
    finetuned = {name: capture(target, target) for name, target in anchors.parameters.items()}

    @torch.no_grad()
    def set_alpha(alpha: float) -> None:
        reshard(model)
        for name, target in anchors.parameters.items():  # validation may have left the module on another device
            local(target).copy_(local(finetuned[name]))
        WiSEFT(alpha).finish(Constrained(anchors.parameters, anchors.joined, WiSEFT.norm, gathering(model)))

    values = []
    try:
        for alpha in alphas:
            set_alpha(alpha)
            trainer.validate(model, dataloaders=dataloaders, datamodule=datamodule, verbose=False)
            if monitor not in trainer.callback_metrics:
                raise MisconfigurationException(
                    f"`monitor` should be a metric that validation logs, found {monitor!r}; logged are"
                    f" {sorted(trainer.callback_metrics)}."
                )
            values.append(float(trainer.callback_metrics[monitor]))
    except BaseException:
        set_alpha(1.0)
        raise
    sweep = WiSEFTSweep(monitor, mode, tuple(alphas), tuple(values))
    set_alpha(sweep.best_alpha)
    return sweep
