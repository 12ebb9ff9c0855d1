"""The constrained tensors as matrices of rows, so that few and cache-sized operations do the work of all of them.

Tensor by tensor, each of the ten operations of a projection passes over memory once, and thousands of small tensors
cost thousands of calls each. Here small tensors share a matrix. Large ones are worked on in blocks that stay in the
processor's cache, or by an operation of torch that needs no other memory. So memory is read and written about once.

The functions of `lightning_tpgm.norms` and `lightning_tpgm.projection` say what is computed, for one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_tpgm import blocks
from lightning_tpgm.groups import Group, grouped
from lightning_tpgm.norms import Norm

Matrices = list[Tensor]
"""One matrix of rows for each group of a `Layout`, shape (R, L) each."""


def _never(*_: Tensor) -> bool:
    return False


class Layout:
    """Arranges tensors as matrices of rows, by groups, see `lightning_tpgm.groups`.

    The rows of all groups, one after the other, have one long vector of distances, ratios and so on, shape (rows,).

    Args:
        tensors: What will be arranged; later calls pass tensors of the same shapes in the same order.
        norm: Says what a row is.

    Attributes:
        dtype: Of what is computed: float64 if any tensor is, else float32.
        tensor_of_row: The index of the tensor that each row belongs to, shape (rows,).
        roundoff: Half the eps of each row's own dtype, 0 for those of 16 bits, shape (rows,); see `safe_ratio`.
    """

    def __init__(self, tensors: Sequence[Tensor], norm: Norm) -> None:
        self._norm = norm
        self._count = len(tensors)
        self._groups = grouped(tensors, norm)
        dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self._device = tensors[0].device if tensors else torch.device("cpu")
        pairs = [pair for group in self._groups for pair in zip(group.indices, group.counts, strict=True)]
        owners = [index for index, count in pairs for _ in range(count)]
        self.tensor_of_row = self.on_device(owners, torch.long)
        order = [index for index, _ in pairs]
        places = sorted(range(len(order)), key=order.__getitem__)
        self._places = self.on_device(places, torch.long)
        self._sizes = [group.rows for group in self._groups]
        self.roundoff = self.on_device([g.roundoff for g in self._groups for _ in range(g.rows)], self.dtype)

    def rows_of(self, indices: Sequence[int]) -> Tensor:
        """Where the rows of these tensors are in the long vector, in the order of the indices."""
        first, start = {}, 0
        for group in self._groups:
            for index, count in zip(group.indices, group.counts, strict=True):
                first[index] = range(start, start + count)
                start += count
        return self.on_device([row for index in indices for row in first[index]], torch.long)

    # ---- arranging

    def arrange(self, tensors: Sequence[Tensor | None]) -> Matrices:
        """The tensors as matrices: views of large ones, wherever they are, copies of small ones, zeros for None."""
        return [group.arrange(tensors) for group in self._groups]

    def spare(self) -> list[Tensor | None]:
        """Memory for a copy of each matrix of weights, None if `arrange` makes one already."""
        return [group.empty() if group.is_view else None for group in self._groups]

    # ---- rows

    def sums(self, weights: Matrices, anchors: Matrices) -> Tensor:
        """What adds up to n of every row, see `lightning_tpgm.blocks.sums`."""
        return self._of_rows(partial(blocks.sums, norm=self._norm), weights, anchors, at_once=blocks.is_one_call)

    def dots(self, gradients: Matrices, weights: Matrices, anchors: Matrices) -> Tensor:
        """<G_row, D_row> of every row."""
        return self._of_rows(blocks.dots, gradients, weights, anchors)

    def change_sums(self, weights: Matrices, anchors: Matrices, before: Matrices, gradients: Matrices) -> Tensor:
        """What a change of the weights asks of every row, see `lightning_tpgm.blocks.change_sums`, shape (3, rows)."""
        return self._of_rows(partial(blocks.change_sums, norm=self._norm), weights, anchors, before, gradients)

    def step_sums(
        self,
        weights: Matrices,
        anchors: Matrices,
        before: Matrices,
        gradients: Matrices,
        kept: Sequence[Tensor | None],
        more: bool,
    ) -> Tensor:
        """What a step asks of every row, see `lightning_tpgm.blocks.step_sums`, shape (2 or 5, rows).

        D is written into what is kept, one for each tensor; None is left alone.
        """
        targets = [None if group.is_missing(kept) else group.to_write(kept, reads=False) for group in self._groups]
        function = partial(blocks.step_sums, norm=self._norm, more=more)
        found = self._of_rows(function, weights, anchors, before, gradients, written=targets)
        for group, target in zip(self._groups, targets, strict=True):
            if target is not None:
                group.write(target, kept)
        return found

    def project(
        self, tensors: Sequence[Tensor | None], weights: Matrices, anchors: Matrices, ratios: Tensor, inside: bool
    ) -> None:
        """Write the projections of the weights into the tensors, see `lightning_tpgm.projection.project`.

        Args:
            tensors: Where to; a weight with None is not projected.
            weights: W; may be views of the same tensors.
            anchors: W0.
            ratios: r of every row.
            inside: Whether rounding to 16 bits must not lengthen a row, see `lightning_tpgm.projection.project_inside`.
        """
        write = partial(blocks.write_inside, norm=self._norm) if inside else blocks.write_projection
        self._rewrite(write, tensors, ratios, weights, anchors, reads=False, at_once=blocks.are_alike)

    def add_deviations(
        self, gradients: Sequence[Tensor | None], weights: Matrices, anchors: Matrices, factors: Tensor
    ) -> None:
        """G := G + factor D, in place; None is left alone.

        Args:
            gradients: G of every tensor.
            weights: W.
            anchors: W0.
            factors: One of every row.
        """
        self._rewrite(blocks.add_deviation, gradients, factors, weights, anchors, reads=True)

    def add_multiples(self, gradients: Sequence[Tensor | None], deviations: Matrices, factors: Tensor) -> None:
        """G := G + factor D, in place, from D itself; None is left alone."""
        self._rewrite(blocks.add_multiple, gradients, factors, deviations, reads=True, at_once=blocks.are_alike)

    def _rewrite(
        self,
        change: Callable[..., None],
        tensors: Sequence[Tensor | None],
        values: Tensor,
        *operands: Matrices,
        reads: bool,
        at_once: Callable[..., bool] = _never,
    ) -> None:
        """Change the tensors in place, block by block, given the values of the rows and matrices; None is left alone.

        ``reads`` says whether what the tensors hold enters the change, ``at_once`` whether blocks are not needed.
        """
        groups = zip(self._groups, torch.split(values.unsqueeze(1), self._sizes), *operands, strict=True)
        for group, value, *matrices in groups:
            if group.is_missing(tensors):
                continue
            matrix = group.to_write(tensors, reads)
            for *given, target in self._blocks(group, at_once, [value.expand_as(matrix), *matrices], [matrix]):
                change(target, *given)
            group.write(matrix, tensors)

    def _of_rows(
        self,
        function: Callable[..., Tensor],
        *operands: Matrices,
        written: Sequence[Tensor | None] = (),
        at_once: Callable[..., bool] = _never,
    ) -> Tensor:
        """Sums over every row, block by block, shape (..., rows); what is written is the last argument, if any is."""
        found = []
        written = written or [None] * len(operands[0])
        for group, target, *matrices in zip(self._groups, written, *operands, strict=True):
            targets = [] if target is None else [target]
            parts = [function(*block) for block in self._blocks(group, at_once, matrices, targets)]
            rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            found.append((rows.sum(dim=-1, keepdim=True) if group.one_row and len(parts) > 1 else rows).to(self.dtype))
        return torch.cat(found, dim=-1) if found else torch.empty(0, dtype=self.dtype, device=self._device)

    def _blocks(
        self, group: Group, at_once: Callable[..., bool], operands: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> Iterable[Sequence[Tensor]]:
        """The blocks of what is read and of what is written; all is one block where ``at_once`` says so.

        A block of an anchor that is kept elsewhere comes to the tensors' device for as long as it is used.
        """
        if at_once(*operands, *targets):
            return [[*operands, *targets]]
        parts, count = group.blocks(*operands, *targets), len(operands)
        if all(operand.device == self._device for operand in operands):
            return parts
        return ([*(m.to(self._device, non_blocking=True) for m in part[:count]), *part[count:]] for part in parts)

    # ---- from rows to tensors and back

    def largest(self, rows: Tensor) -> Tensor:
        """The largest value among each tensor's rows, 0 without rows, shape (T,); values are not negative."""
        return rows.new_zeros(self._count).scatter_reduce(0, self.tensor_of_row, rows, "amax")

    def smallest(self, rows: Tensor) -> Tensor:
        """The smallest value among each tensor's rows, infinity without rows, shape (T,)."""
        return rows.new_full((self._count,), torch.inf).scatter_reduce(0, self.tensor_of_row, rows, "amin")

    def total(self, rows: Tensor) -> Tensor:
        """The sum over each tensor's rows, shape (..., T) from (..., rows)."""
        # not by `index_add`: on a GPU its order changes, and processes would differ in the last digits
        parts = zip(self._groups, rows.split(self._sizes, dim=-1), strict=True)  # type: ignore[no-untyped-call]
        sums = torch.cat([group.total(part) for group, part in parts], dim=-1)
        return sums.index_select(-1, self._places)

    def scalar(self) -> Tensor:
        """A scalar of the device and dtype of what is computed."""
        return torch.zeros((), dtype=self.dtype, device=self._device)

    def of_rows(self, values: Tensor) -> Tensor:
        """One value of each tensor, shape (T,), for all its rows, shape (rows,)."""
        return values[self.tensor_of_row]

    def on_device(self, values: Sequence[float], dtype: torch.dtype = torch.bool) -> Tensor:
        """Python's values as a tensor where the tensors are, without waiting for the device."""
        return torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)

    def numbers(self, values: Sequence[float | Tensor]) -> Tensor:
        """Numbers as a vector of what is computed. One that is a scalar tensor is not read: the host would wait."""
        if any(isinstance(value, Tensor) for value in values):
            return torch.stack([torch.as_tensor(value, dtype=self.dtype, device=self._device) for value in values])
        return self.on_device(values, self.dtype)  # type: ignore[arg-type]


class Spares:
    """What `Layout.spare` gives, kept for the next step, for some tensors at a time: there is one of each tensor."""

    def __init__(self) -> None:
        self._kept: dict[frozenset[str], list[Tensor | None]] = {}

    def of(self, names: Sequence[str], layout: Layout) -> list[Tensor | None]:
        """That of these tensors, which this layout arranges; others that share one with these make way."""
        key = frozenset(names)
        if key not in self._kept:
            self._kept = {others: spare for others, spare in self._kept.items() if others.isdisjoint(key)}
            self._kept[key] = layout.spare()
        return self._kept[key]
