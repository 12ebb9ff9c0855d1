"""Ideas for TPGM that are not in the package, to be tried: other radii, another start, other held-out losses.

`benchmark.py` runs them where protocol.md says so, as ``settings`` of a method with the name ``lead``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_tpgm import TPGMCallback
from lightning_tpgm.methods.radii import Radii


class Pressed(Radii):
    """The held-out loss plus a tenth of the mean square of all ratios: a gentle pressure towards the anchor."""

    PRESSURE = 0.1

    def slope(self, tensors: Any, gradients: Any, weights: Any, rows: Tensor) -> Tensor:
        """The derivative of that, too."""
        largest = tensors.largest(rows)
        pressure = torch.where(largest > 0, 2 * self.value / largest.square() / len(largest), 0)
        return super().slope(tensors, gradients, weights, rows) + self.PRESSURE * pressure


class Averaged(Radii):
    """Slopes are averaged over about fifty updates instead of ten before they are followed."""

    BETAS = (0.98, 0.999)


class PerBlock(Radii):
    """One direction a block, a convolution and its normalisation for instance: the slopes of its ratios are added."""

    def slope(self, tensors: Any, gradients: Any, weights: Any, rows: Tensor) -> Tensor:
        """The block's slope, in the unit of each tensor's radius."""
        largest = tensors.largest(rows)
        blocks = [name.rsplit(".", 2)[0] for name in self.names]
        at = torch.tensor([sorted(set(blocks)).index(block) for block in blocks])
        of_ratios = (super().slope(tensors, gradients, weights, rows) * largest).nan_to_num()
        shared = torch.zeros_like(of_ratios).index_add(0, at, of_ratios)[at]
        return torch.where(largest > 0, shared / largest, 0)


LEADS: dict[str, type[Radii]] = {"pressure": Pressed, "averaged slopes": Averaged, "a direction per block": PerBlock}
FROM_SWEEP = "from where the sweep ends"
"""After the fact, radii start at the sweep's alpha instead of a half."""


def at_best_temperature(model: LightningModule, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross entropy of the logits over the temperature that is best for this batch: sure or unsure, no matter."""
    inputs, labels = batch
    logits = model(inputs)
    temperatures = torch.logspace(-1, 1, 65).tolist()
    best = min(temperatures, key=lambda t: F.cross_entropy(logits.detach() / t, labels).item())
    return F.cross_entropy(logits / best, labels)


def missing_probability(model: LightningModule, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One less the probability of the right class: no example counts more than one, however wrong it is."""
    inputs, labels = batch
    return 1 - model(inputs).softmax(dim=1).gather(1, labels.unsqueeze(1)).mean()


LOSSES = {"at the best temperature": at_best_temperature, "missing probability": missing_probability}
"""What radii are learned from, instead of the module's own loss; for classifiers."""


IDEAS = (*LEADS, *LOSSES)
"""All that TPGM is tried with while training."""
MIXES = {"half training data": 0.5, "training data alone": 1.0}
"""Which share of the examples that radii are learned from is drawn from the training data."""


class Lead(TPGMCallback):
    """TPGM with the radii of an idea.

    Args:
        lead: A key of `LEADS`.
        **options: Of `TPGMCallback`.
    """

    def __init__(self, lead: str, **options: Any) -> None:
        self.lead = lead
        super().__init__(**options)

    def make_method(self) -> Any:
        """The method, with other radii."""
        method = super().make_method()
        method.radii = LEADS[self.lead](self.radius_lr)
        return method


def lead_or_tpgm(lead: str | None = None, **options: Any) -> TPGMCallback:
    """TPGM, as it comes or with an idea. That of `MIXES` is about its data."""
    if lead in LEADS:
        return Lead(lead, **options)
    return TPGMCallback(**options, **({"loss": LOSSES[lead]} if lead in LOSSES else {}))


@contextmanager
def started_at(alpha: float) -> Iterator[None]:
    """Radii start at this share of the smallest distance instead of a half."""
    start: Callable[..., None] = Radii.start
    with patch.object(Radii, "start", lambda self, value, where: start(self, 2 * alpha * value, where)):
        yield
