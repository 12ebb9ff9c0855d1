"""The peers: the algorithms of the papers on TPGM and FTP, written down as they read."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tpgm.norms import Norm
from lightning_tpgm.projection import EPS, MIN_RADIUS, legal_radius, ratio


def row_norms(d: Tensor, norm: Norm) -> Tensor:
    """The norm of every row, of a shape that broadcasts against the tensor."""
    dims = tuple(range(1 if norm == "mars" and d.ndim > 1 else 0, d.ndim))
    return torch.linalg.vector_norm(d, ord=1 if norm == "mars" else 2, dim=dims, keepdim=True)


class Naive:
    """A copy of the model at each update, tensor after tensor, and autograd through the projections.

    Args:
        module: Has a ``model`` and the cross entropy as its loss; its weights are the anchor.
        norm: ``"mars"`` or ``"l2"``.
    """

    def __init__(self, module: pl.LightningModule, norm: Norm) -> None:
        self.norm = norm
        self.anchor = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        self.radii = {name: p.new_zeros(()).requires_grad_() for name, p in self.anchor.items()}
        self.is_first = True
        self.adam = torch.optim.Adam(self.radii.values(), lr=1e-2)

    def projected(self, model: nn.Module) -> dict[str, Tensor]:
        """Every parameter's projection, with the graph to its radius, which is made legal first."""
        found = {}
        for name, parameter in model.named_parameters():
            d, radius = parameter.detach() - self.anchor[name], self.radii[name]
            n = row_norms(d, self.norm)
            with torch.no_grad():
                radius.copy_(legal_radius(n.min() / 2 if self.is_first else radius, n.max()))
            found[name] = self.anchor[name] + ratio(radius, n) * d
        self.is_first = False
        return found

    def __call__(self, module: pl.LightningModule, batch: Any) -> None:
        """One update of the radii and one projection."""
        copy = deepcopy(module.model).eval()
        output = torch.func.functional_call(copy, self.projected(copy), batch[0])
        self.adam.zero_grad()
        nn.functional.cross_entropy(output, batch[1]).backward()
        self.adam.step()
        with torch.no_grad():
            for parameter, value in zip(module.model.parameters(), self.projected(module.model).values(), strict=True):
                parameter.copy_(value)


class NaiveFTP:
    """A step of FTP around any optimizer, tensor after tensor.

    Args:
        optimizer: Its present weights are the anchor.
        norm: ``"mars"`` or ``"l2"``.
    """

    LR, BETA1, BETA2, ADAM_EPS = 1e-2, 0.9, 0.999, 1e-8

    def __init__(self, optimizer: Optimizer, norm: Norm) -> None:
        self.optimizer, self.norm, self.steps = optimizer, norm, 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.anchors = [p.detach().clone() for p in self.parameters]
        self.radii, self.m, self.v = ([p.new_zeros(()) for p in self.parameters] for _ in range(3))
        self.directions = [torch.zeros_like(anchor) for anchor in self.anchors]  # c / n of the step before

    def step(self) -> None:
        """The optimizer's step, and the projection."""
        self.optimizer.step()
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        """The radii from the gradients of the step, and the projection."""
        self.steps += 1
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            c = parameter - self.anchors[i]
            n = row_norms(c, self.norm) + EPS
            if self.steps == 1:
                self.radii[i] = torch.full_like(self.radii[i], MIN_RADIUS)
            else:
                slope = (parameter.grad * self.directions[i]).sum()
                self.m[i] = self.BETA1 * self.m[i] + (1 - self.BETA1) * slope
                self.v[i] = self.BETA2 * self.v[i] + (1 - self.BETA2) * slope**2
                m = self.m[i] / (1 - self.BETA1**self.steps)
                v = self.v[i] / (1 - self.BETA2**self.steps)
                self.radii[i] = self.radii[i] - self.LR * m / (v.sqrt() + self.ADAM_EPS)
            self.radii[i] = legal_radius(self.radii[i], n.max())
            parameter.copy_(self.anchors[i] + (self.radii[i] / n).clamp(0, 1) * c)
            self.directions[i] = c / n
