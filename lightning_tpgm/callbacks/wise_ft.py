"""WiSE-FT: interpolation between the pretrained and the fine-tuned weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained, capture, match_pretrained, read_pretrained
from lightning_tpgm.callbacks.base import AnchoredCallback, check, configuration_errors, is_number
from lightning_tpgm.callbacks.observed import Log
from lightning_tpgm.framework import MisconfigurationException, pl, rank_zero_info
from lightning_tpgm.plotting import axes_for
from lightning_tpgm.projection import project
from lightning_tpgm.selection import constrainable
from lightning_tpgm.sharding import local, reshard

ALPHAS = tuple(i / 10 for i in range(11))


class WiSEFTCallback(AnchoredCallback):
    """Replaces the weights at the end of the fit by W0 + alpha (W - W0), one alpha for all tensors.

    Floating-point buffers (the running statistics of BatchNorm) are interpolated with the same alpha, integer buffers
    keep their fine-tuned value. alpha = 0 gives the pretrained, alpha = 1 the fine-tuned tensors, to the bit.
    Parameters without a pretrained value (a new head) keep their fine-tuned one. Checkpoints that were written during
    the fit hold the fine-tuned weights; ``trainer.save_checkpoint`` after it saves the interpolated ones.

    Args:
        alpha: In [0, 1]. None: the fit changes nothing; afterwards `wise_ft_sweep` with `WiSEFTCallback.anchor` chooses
            alpha by a validation metric.
        exclude: fnmatch patterns over parameter and buffer names; those keep their fine-tuned value.
        pretrained: Where the anchors come from, as in `TPGMCallback`; None: the weights at the start of the fit.
        log: What goes to the trainer's loggers: ``"summary"``, ``"all"`` (also each tensor's values) or ``"none"``, as
            in `TPGMCallback`.
        summary: Whether the fit ends with a printed table, as in `TPGMCallback`.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory, as in `TPGMCallback`.

    Raises:
        MisconfigurationException: For an argument out of its range; when the fit starts, with nothing to interpolate.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv 2109.01903.

    >>> WiSEFTCallback(alpha=0.5)
    WiSEFTCallback(alpha=0.5, exclude=())
    """

    _KEY = "wise_ft"
    _SHOWN = ("alpha", "exclude")
    _constrains_buffers = True

    def __init__(
        self,
        alpha: float | None = 0.5,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
    ) -> None:
        check(alpha is None or (is_number(alpha) and 0 <= alpha <= 1), "alpha", "a number in [0, 1] or None", alpha)
        super().__init__(exclude, pretrained, log, summary, anchor_device)
        self.alpha = alpha

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also warns of callbacks that would undo the interpolation."""
        super().on_train_start(trainer, pl_module)
        if self.alpha is not None:
            self._check_has_the_last_word(trainer)

    @override
    def at_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Interpolates."""
        if self.alpha is not None:
            interpolate(pl_module, self._parameters, self._anchor, self._parameters, self.alpha)


def interpolate(
    module: nn.Module,
    targets: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    alpha: float,
) -> None:
    """Write W0 + alpha (W - W0) into each target that has an anchor, in place.

    Args:
        module: The module that the targets belong to.
        targets: Parameters and buffers by name.
        anchor: W0 by name, of the targets' shapes, on any device.
        weights: W by name, on any device; may be the targets themselves.
        alpha: In [0, 1].
    """
    reshard(module)
    with torch.no_grad():
        for name, value in anchor.items():
            target = local(targets[name])
            weight, start = (local(end).to(target.device) for end in (weights[name], value))
            ratio = torch.full_like(weight, alpha, dtype=torch.promote_types(weight.dtype, torch.float32))
            target.copy_(project(weight, start, ratio))


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
    check(usable, "alphas", "numbers in [0, 1], at least one", alphas)
    check(mode in ("max", "min"), "mode", "'max' or 'min'", mode)
    with configuration_errors():
        targets = constrainable(model, exclude, buffers=True)
        found = match_pretrained(read_pretrained(pretrained), targets, rank_zero_info)
    targets = {name: targets[name] for name in found}
    anchor = {name: capture(value, targets[name]) for name, value in found.items()}
    finetuned = {name: capture(target, target) for name, target in targets.items()}

    def set_alpha(alpha: float) -> None:
        interpolate(model, targets, anchor, finetuned, alpha)

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
