"""The peers: the algorithms of the papers on TPGM, FTP, SPD and DiGraP, written down as they read."""

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


class NaiveTPGM:
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


class Peer:
    """A method around any optimizer, tensor after tensor.

    Args:
        optimizer: Its present weights are the anchor. All groups have the learning rate of the first.
    """

    LR, BETA1, BETA2, ADAM_EPS = 1e-2, 0.9, 0.999, 1e-8

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.anchors = [p.detach().clone() for p in self.parameters]
        self.m, self.v = ([p.new_zeros(()) for p in self.parameters] for _ in range(2))

    def step(self) -> None:
        """The optimizer's step, and what the method does before and after it."""
        self.before()
        self.optimizer.step()
        self.after()

    def before(self) -> None:
        """What comes before the optimizer's step."""

    def after(self) -> None:
        """What comes after it."""

    def adam(self, i: int, slope: Tensor, step: int) -> Tensor:
        """What Adam takes off the scalar of a tensor."""
        self.m[i] = self.BETA1 * self.m[i] + (1 - self.BETA1) * slope
        self.v[i] = self.BETA2 * self.v[i] + (1 - self.BETA2) * slope**2
        m = self.m[i] / (1 - self.BETA1**step)
        v = self.v[i] / (1 - self.BETA2**step)
        return self.LR * m / (v.sqrt() + self.ADAM_EPS)


class NaiveFTP(Peer):
    """FTP.

    Args:
        optimizer: See `Peer`.
        norm: ``"mars"`` or ``"l2"``.
    """

    def __init__(self, optimizer: Optimizer, norm: Norm) -> None:
        super().__init__(optimizer)
        self.norm = norm
        self.radii = [p.new_zeros(()) for p in self.parameters]
        self.directions = [torch.zeros_like(anchor) for anchor in self.anchors]  # c / n of the step before

    @torch.no_grad()
    def after(self) -> None:
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
                self.radii[i] = self.radii[i] - self.adam(i, slope, self.steps)
            self.radii[i] = legal_radius(self.radii[i], n.max())
            parameter.copy_(self.anchors[i] + (self.radii[i] / n).clamp(0, 1) * c)
            self.directions[i] = c / n


class NaiveSPD(Peer):
    """SPD with a strength of 1."""

    @torch.no_grad()
    def before(self) -> None:
        """The weights before the step."""
        self.previous = [parameter.clone() for parameter in self.parameters]

    @torch.no_grad()
    def after(self) -> None:
        """The decay, where the gradient points towards the anchor."""
        for parameter, previous, anchor in zip(self.parameters, self.previous, self.anchors, strict=True):
            if parameter.grad is None:
                continue
            d_previous = previous - anchor
            if (parameter.grad * d_previous).sum() > 0:
                d = parameter - anchor
                rho = ((d.norm() - d_previous.norm()) / d.norm()).clamp(0, 1)
                parameter.copy_(parameter - rho * d)


class NaiveDiGraP(Peer):
    """DiGraP."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.omegas = [p.new_zeros(()) for p in self.parameters]
        self.projections = [torch.zeros_like(anchor) for anchor in self.anchors]  # g_proj of the step before
        self.lr = 0.0  # of the step before

    @torch.no_grad()
    def before(self) -> None:
        """The shares from the gradients, and what they take out of these."""
        self.steps += 1
        for i, parameter in enumerate(self.parameters):
            g, projection = parameter.grad, self.projections[i]
            if g is None:
                continue
            if self.steps > 1:
                norms = g.norm() * projection.norm()
                slope = self.lr * (g * projection).sum() / norms if norms > 0 else norms
                self.omegas[i] = (self.omegas[i] - self.adam(i, slope, self.steps - 1)).clamp(0, 1)
            d = parameter - self.anchors[i]
            inner = (g * d).sum()
            self.projections[i] = inner / d.square().sum() * d if inner < 0 else torch.zeros_like(d)
            parameter.grad = g - self.omegas[i] * self.projections[i]
        self.lr = self.optimizer.param_groups[0]["lr"]
