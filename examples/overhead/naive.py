"""The peer: the paper's algorithm written down as it reads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_tpgm.norms import Norm
from lightning_tpgm.projection import legal_radius, ratio


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
            dims = tuple(range(1 if self.norm == "mars" and d.ndim > 1 else 0, d.ndim))
            n = torch.linalg.vector_norm(d, ord=1 if self.norm == "mars" else 2, dim=dims, keepdim=True)
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
