"""The tensors under constraint with their anchors, and the work on all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_tpgm.layout import Layout, Matrices, Spares
from lightning_tpgm.norms import Norm
from lightning_tpgm.optimizers import learning_rate
from lightning_tpgm.projection import is_coarse, safe_ratio
from lightning_tpgm.sharding import Sharding, is_split, local, local_gradient


class Constrained:
    """T tensors under constraint.

    Its vectors have one entry per tensor, shape (T,), or one per row of all tensors, shape (rows,); a `Layout` says in
    which order. Matrices come from `weights`, `keep` or `arrange`. All is under ``torch.no_grad``.

    Args:
        parameters: By name; in-place changes of them reach the module.
        anchors: Of these, by the same names, in the same order.
        norm: ``"mars"`` or ``"l2"``: what a distance is.
        gathering: The modules that FSDP2 may have left with gathered weights, which would hide a change.
        at: Where these tensors are among all that are constrained, shape (T,). None: these are all.
        spares: Those of all that are constrained.

    Attributes:
        names: Of the tensors.
        parameters: Of the tensors.
        at: See above.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        anchors: Mapping[str, Tensor],
        norm: Norm,
        gathering: Sequence[nn.Module] = (),
        at: Tensor | None = None,
        spares: Spares | None = None,
    ) -> None:
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.norm = norm
        self.at = at
        self._anchors = [anchors[name] for name in parameters]
        self._gathering = gathering
        self._subsets: dict[tuple[int, ...], Constrained] = {}
        self._spares = spares or Spares()

    # ---- which tensors

    def stepped_by(self, optimizer: Optimizer) -> Constrained:
        """Those that this optimizer steps, but for what is frozen: it has no gradient either."""
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        stepped = (id(p) in owned and (p.requires_grad or p.grad is not None) for p in self.parameters)
        return self.subset([i for i, steps in enumerate(stepped) if steps])

    def not_frozen(self) -> Constrained:
        """Those that are not frozen now; the buffers of a layer are if all its parameters are."""
        layers = [name.rpartition(".")[0] for name in self.names]
        tensors = list(zip(layers, self.parameters, strict=True))
        thawed = {layer for layer, tensor in tensors if tensor.requires_grad}
        frozen = {layer for layer, tensor in tensors if isinstance(tensor, nn.Parameter)} - thawed
        kept = [t.requires_grad or not (isinstance(t, nn.Parameter) or layer in frozen) for layer, t in tensors]
        return self.subset([i for i, keep in enumerate(kept) if keep])

    def subset(self, indices: Sequence[int]) -> Constrained:
        """Some of the tensors."""
        if len(indices) == len(self.names):
            return self
        key = tuple(indices)
        if key not in self._subsets:
            if len(self._subsets) >= 8:  # who freezes other layers at every step would fill the memory
                self._subsets.clear()
            some = {self.names[i]: self.parameters[i] for i in indices}
            anchors = {self.names[i]: self._anchors[i] for i in indices}
            at = self.vector(indices, torch.long)
            self._subsets[key] = Constrained(some, anchors, self.norm, self._gathering, at, self._spares)
        return self._subsets[key]

    @property
    def are_split(self) -> bool:
        """Whether any is split over processes, so that measuring is collective."""
        return any(map(is_split, self.parameters))

    @cached_property
    def are_coarse(self) -> bool:
        """Whether any has 16 bits, so that a deviation may not fit into its dtype."""
        return any(is_coarse(parameter.dtype) for parameter in self.parameters)

    # ---- how they are arranged

    def prepare(self, for_balls: bool) -> None:
        """Do now what else the first step would do. ``for_balls`` says that it will call `project`."""
        _ = self.anchors, self._row_sizes if for_balls else None

    @cached_property
    def _layout(self) -> Layout:
        return Layout(self._local(), self.norm)

    @cached_property
    def _sharding(self) -> Sharding:
        return Sharding(self.parameters, self._layout, self.norm)

    @cached_property
    def anchors(self) -> Matrices:
        """W0: this process's parts."""
        return self._layout.arrange([local(anchor) for anchor in self._anchors])

    @property
    def _spare(self) -> list[Tensor | None]:
        return self._spares.of(self.names, self._layout)

    @cached_property
    def _row_sizes(self) -> Tensor:
        return self.sizes(self.anchors)

    def _local(self) -> list[Tensor]:
        return [local(parameter) for parameter in self.parameters]

    def weights(self) -> Matrices:
        """W, the present weights: views of large tensors, copies of small ones."""
        return self._layout.arrange(self._local())

    def keep(self) -> Matrices:
        """The present weights, in memory of their own while the parameters hold others; small ones are in some."""
        weights = self.weights()
        kept = [weight if spare is None else spare for spare, weight in zip(self._spare, weights, strict=True)]
        pairs = [(own, weight) for own, weight in zip(kept, weights, strict=True) if own is not weight]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [weight for _, weight in pairs])
        return kept

    def arrange(self, parts: Sequence[Tensor | None]) -> Matrices:
        """A list of this process's parts, one per tensor, as matrices; zeros for None."""
        return self._layout.arrange(parts)

    def gradients(self) -> list[Tensor | None]:
        """G, this process's parts of the parameters' ``.grad``: None for a tensor without."""
        return [self.part(parameter.grad, i) for i, parameter in enumerate(self.parameters)]

    def part(self, grad: Tensor | None, index: int) -> Tensor | None:
        """This process's part of a gradient of a tensor."""
        return None if grad is None else local_gradient(grad, self.parameters[index])

    def learning_rates(self, optimizer: Optimizer) -> Tensor:
        """The rate that the optimizer steps each tensor with, shape (T,); a ValueError if it keeps that to itself."""
        groups = optimizer.param_groups
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        rates = self._layout.numbers([learning_rate(optimizer, group) for group in groups])
        return rates[self.vector([group_of[id(p)] for p in self.parameters], torch.long)]

    def vector(self, values: Sequence[float], dtype: torch.dtype = torch.bool) -> Tensor:
        """Python's values as a tensor where the tensors are, without waiting for the device."""
        return self._layout.on_device(values, dtype)

    def which(self, flags: Sequence[bool]) -> Tensor:
        """A mask of the tensors, booleans of shape (T,). Not to be changed: mostly it is `every`."""
        return self.every if all(flags) else self.vector(flags)

    @cached_property
    def every(self) -> Tensor:
        """The mask of all tensors, shape (T,)."""
        return self.vector([True for _ in self.names])

    def may_be_some(self, amounts: Tensor) -> list[bool]:
        """Which of these, shape (T,), may be other than 0: all of them where the host would wait to know."""
        if amounts.device.type != "cpu":
            return [True] * len(self.names)
        return [amount != 0 for amount in amounts.tolist()]

    def scalar(self, value: float = 0.0) -> Tensor:
        """A scalar of the device and dtype of distances and all that is learned."""
        return torch.full_like(self._layout.scalar(), value)

    # ---- measuring; collective where tensors are split over processes

    def rows(self, weights: Matrices) -> Tensor:
        """n, the distance of every row, shape (rows,)."""
        return self.distances(self._layout.sums(weights, self.anchors))

    def step_sums(
        self,
        weights: Matrices,
        before: Matrices,
        gradients: Sequence[Tensor | None],
        kept: Sequence[Tensor | None],
        more: bool = False,
    ) -> Tensor:
        """What a step asks of this process's part of every row, in one pass over the memory of all that enters.

        Args:
            weights: W.
            before: D_prev, the deviations at the step before.
            gradients: G, this process's parts, one per tensor. None counts as zeros.
            kept: D is written into these parts, one per tensor; None is left alone. Those of ``before`` may be among
                them.
            more: Whether what adds up to n of D_prev, <G_row, D_row> and <G_row, G_row> are asked for, too.

        Returns:
            <G_row, D_prev_row>, what adds up to n of D, and what else is asked for, in this order. `distances`, or in
            l2 `total`, adds up. Shape (2 or 5, rows).
        """
        return self._layout.step_sums(weights, self.anchors, before, self.arrange(gradients), kept, more)

    def change_sums(self, weights: Matrices, before: Matrices, gradients: Sequence[Tensor | None]) -> Tensor:
        """<G_row, D_prev_row>, and what adds up to n of D and of D_prev, of this process's part of every row.

        Args:
            weights: W.
            before: The weights before the step, W0 + D_prev.
            gradients: G, as in `step_sums`.

        Returns:
            Shape (3, rows).
        """
        return self._layout.change_sums(weights, self.anchors, before, self.arrange(gradients))

    def sizes(self, matrices: Matrices) -> Tensor:
        """The norm of every row of these matrices themselves, shape (rows,): n, if they are deviations."""
        return self.distances(self._layout.sums(matrices, self._layout.arrange([None] * len(self.names))))

    def distances(self, sums: Tensor) -> Tensor:
        """n of every row from what adds up to it, any shape (..., rows)."""
        return self._sharding.distances(sums)

    def largest(self, rows: Tensor) -> Tensor:
        """The largest value among each tensor's rows, shape (T,)."""
        return self._sharding.largest(self._layout.largest(rows))

    def smallest(self, rows: Tensor) -> Tensor:
        """The smallest value among each tensor's rows, shape (T,)."""
        return self._sharding.smallest(self._layout.smallest(rows))

    def distance(self, weights: Matrices) -> Tensor:
        """The distance of each tensor, that of its farthest row, shape (T,)."""
        return self.largest(self.rows(weights))

    def size(self) -> Tensor:
        """The norm of each anchor, that of its largest row, shape (T,)."""
        return self.largest(self._row_sizes)

    def dots(self, gradients: Matrices, weights: Matrices) -> Tensor:
        """<G_row, D_row> of this process's part of every row, shape (rows,)."""
        return self._layout.dots(gradients, weights, self.anchors)

    def total(self, rows: Tensor) -> Tensor:
        """The sum over all rows of each whole tensor, shape (..., T) from (..., rows)."""
        return self._sharding.total(self._layout.total(rows))

    def of_rows(self, values: Tensor) -> Tensor:
        """One value of each tensor, shape (T,), for all its rows, shape (rows,)."""
        return self._layout.of_rows(values)

    # ---- changing

    def project(self, weights: Matrices, rows: Tensor, radii: Tensor, moved: Sequence[bool] | None = None) -> None:
        """Write the projections of these weights onto balls of these radii into the parameters.

        Args:
            weights: W.
            rows: Their distances, from `rows`.
            radii: gamma, shape (T,).
            moved: The parameters that are written. None: all. Others are inside their balls already, and a write would
                invalidate graphs through them that are still in use.
        """
        ratios = safe_ratio(self.of_rows(radii), rows, self._row_sizes, self._layout.roundoff)
        self._shrink(weights, ratios, moved, inside=True)

    def shrink(self, weights: Matrices, ratios: Tensor, moved: Sequence[bool] | None = None) -> None:
        """Write W0 + r (W - W0) into the parameters, one ratio per tensor, shape (T,); see `project`."""
        self._shrink(weights, self.of_rows(ratios), moved, inside=False)

    def _shrink(self, weights: Matrices, ratios: Tensor, moved: Sequence[bool] | None, inside: bool) -> None:
        for module in self._gathering:
            module.reshard()  # type: ignore[operator]  # an FSDPModule has it
        targets: list[Tensor | None] = [*self._local()]
        if moved is not None:
            targets = [target if written else None for target, written in zip(targets, moved, strict=True)]
        self._layout.project(targets, weights, self.anchors, ratios, inside)

    def add_deviations(self, gradients: Sequence[Tensor | None], weights: Matrices, factors: Tensor) -> None:
        """G := G + factor D, in place, one factor per tensor, shape (T,); None is left alone."""
        self._layout.add_deviations(gradients, weights, self.anchors, self.of_rows(factors))

    def add_multiples(self, gradients: Sequence[Tensor | None], deviations: Matrices, factors: Tensor) -> None:
        """G := G + factor D, in place, from D itself; otherwise as `add_deviations`."""
        self._layout.add_multiples(gradients, deviations, self.of_rows(factors))
