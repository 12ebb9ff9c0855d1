"""Ideas for TPGM that are not in the package, to be tried: other radii, another start, other data, other losses.

`benchmark.py` runs them where protocol.md says so, as ``settings`` of a method with the name ``lead``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_tpgm import TPGMCallback
from lightning_tpgm.callbacks.heldout import HeldOutBatch, HeldOutBatches
from lightning_tpgm.callbacks.heldout_gradient import HeldOutGradient
from lightning_tpgm.methods.radii import Radii


class Pressed(Radii):
    """The held-out loss plus a tenth of the mean square of all ratios: a gentle pressure towards the anchor."""

    PRESSURE = 0.1

    def slope(self, tensors: Any, gradients: Any, weights: Any, rows: Tensor) -> Tensor:
        """The derivative of that, too."""
        largest = tensors.largest(rows)
        pressure = torch.where(largest > 0, self.pressure(largest) / len(largest), 0)
        return super().slope(tensors, gradients, weights, rows) + self.PRESSURE * pressure

    def pressure(self, largest: Tensor) -> Tensor:
        """The derivative of what is averaged, from the distances."""
        return 2 * self.value / largest.square()


class PressedByMean(Pressed):
    """The held-out loss plus a tenth of the mean of all ratios."""

    def pressure(self, largest: Tensor) -> Tensor:
        """The derivative of what is averaged, from the distances."""
        return largest.reciprocal()


class Averaged(Radii):
    """Slopes are averaged over about fifty updates instead of ten before they are followed."""

    BETAS = (0.98, 0.999)


class PerBlock(Radii):
    """One direction a block, a convolution and its normalisation for instance: the slopes of its ratios are added."""

    def slope(self, tensors: Any, gradients: Any, weights: Any, rows: Tensor) -> Tensor:
        """The block's slope, in the unit of each tensor's radius."""
        largest, at = tensors.largest(rows), self.blocks()
        of_ratios = (super().slope(tensors, gradients, weights, rows) * largest).nan_to_num()
        shared = torch.zeros_like(of_ratios).index_add(0, at, of_ratios)[at]
        return torch.where(largest > 0, shared / largest, 0)

    def blocks(self) -> Tensor:
        """The index of each tensor's block, shape (T,). A layer of the network itself is a block of its own."""
        first = {name.partition(".")[0] for name in self.names}
        levels = [(name.rpartition(".")[0], name.rsplit(".", 2)[0]) for name in self.names]
        blocks = [layer if {parent} == first else parent for layer, parent in levels]
        return torch.tensor([sorted(set(blocks)).index(block) for block in blocks])


class OneRatio(PerBlock):
    """One ratio a block, not only one direction: the mean of what its tensors would have."""

    def clamp(self, largest: Tensor, where: Tensor) -> None:
        """Legal radii, of which those of a block are one share of their tensors' distances."""
        super().clamp(largest, where)
        has_ratio = where & (largest > 0) & ~self.value.isnan()
        ratios, at = torch.where(has_ratio, self.value / largest, 0), self.blocks()
        total, count = (torch.zeros_like(ratios).index_add(0, at, each) for each in (ratios, has_ratio.to(ratios)))
        self.value = torch.where(has_ratio, (total / count)[at] * largest, self.value)


class Certain(Radii):
    """A radius moves only where the mean of its slopes is larger than its standard error."""

    def adam(self, grad: Tensor, where: Tensor, lr: Tensor | None = None) -> None:
        """A step of those radii alone; the moments go on."""
        before, (beta1, beta2) = self.value, self.BETAS
        super().adam(grad, where, lr)
        mean_square = self.exp_avg_sq / (1 - beta2**self.step)
        weights = (1 - beta1) / (1 + beta1) * (1 - beta1 ** (2 * self.step))  # the sum of their squares
        error = (mean_square * weights).sqrt()
        self.value = torch.where(self.exp_avg.abs() > error, self.value, before)


LEADS: dict[str, type[Radii]] = {"pressure": Pressed, "averaged slopes": Averaged, "a direction per block": PerBlock}
LATER: dict[str, type[Radii]] = {"pressure by the mean ratio": PressedByMean, "one ratio per block": OneRatio}
FROM_SWEEP, ONE_BY_ONE = "from where the sweep ends", "one by one from there"
"""After the fact, radii start at the sweep's alpha, at most at 0.99, instead of a half. At 1 they would have no slope.
The second: each moves only where it is certain."""
ROTATING = "rotating folds"
"""Each epoch holds out other examples."""


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
HALF, IN_TURN = "half training data", "training batches in turn"
MIXES = {HALF: 0.5, "training data alone": 1.0}
"""Which share of the examples that radii are learned from is drawn from the training data."""


class Lead(TPGMCallback):
    """TPGM with the radii of an idea.

    Args:
        lead: A key of `LEADS` or `LATER`.
        **options: Of `TPGMCallback`.
    """

    def __init__(self, lead: str, **options: Any) -> None:
        self.lead = lead
        super().__init__(**options)

    def make_method(self) -> Any:
        """The method, with other radii."""
        method = super().make_method()
        method.radii = (LEADS | LATER)[self.lead](self.radius_lr)
        return method


class InTurn(TPGMCallback):
    """Every second radius update learns from the batch that was just trained on."""

    def make_method(self) -> Any:
        """The method, with another gradient."""
        method = super().make_method()
        method.held_out = HeldOutInTurn(self.dataloader, self.loss, self.eval_mode)
        return method

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Also keeps the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._held_out.training = HeldOutBatch(batch, batch_idx, 0)


class HeldOutInTurn(HeldOutGradient):
    """On every second call the batch is the one that was just trained on."""

    training: HeldOutBatch
    calls = 0

    def __call__(self, parameters: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor | None]]:
        """The loss and its gradient."""
        self.calls += 1
        with ExitStack() as patches:
            if self.calls % 2 == 0:
                patches.enter_context(patch.object(HeldOutBatches, "draw", lambda batches: self.training))
            return super().__call__(parameters)


def lead_or_tpgm(lead: str | None = None, **options: Any) -> TPGMCallback:
    """TPGM, as it comes or with an idea. Those of `MIXES` and `ROTATING` are about its data."""
    if lead in LEADS | LATER:
        return Lead(lead, **options)
    if lead == IN_TURN:
        return InTurn(**options)
    return TPGMCallback(**options, **({"loss": LOSSES[lead]} if lead in LOSSES else {}))


@contextmanager
def after_the_fact(lead: object, alpha: float) -> Iterator[None]:
    """TPGM after the fact, with the idea if it is one of it: `FROM_SWEEP` or `ONE_BY_ONE`, from this alpha."""
    at_half: Callable[..., None] = Radii.start

    def at_alpha(self: Radii, value: Tensor, where: Tensor) -> None:
        at_half(self, 2 * min(alpha, 0.99) * value, where)

    with ExitStack() as patches:
        if lead in (FROM_SWEEP, ONE_BY_ONE):
            patches.enter_context(patch.object(Radii, "start", at_alpha))
        if lead == ONE_BY_ONE:
            patches.enter_context(patch("lightning_tpgm.methods.tpgm.Radii", Certain))
        yield
