"""Which tensors of a `lightning_tpgm.layout.Layout` make a matrix together, and how they get into it and out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_tpgm.norms import Norm, matrix_shape
from lightning_tpgm.projection import is_coarse

SHARED = 2**14
"""Tensors with fewer elements share a matrix: calling an operation costs more than carrying it out."""
BLOCK = {"cpu": 2**19}
"""Elements that are worked on at a time, by type of device: two megabytes in float32 stay in the cache."""
LARGE_BLOCK = 2**24
"""On other devices the bound only keeps memory small."""


def grouped(tensors: Sequence[Tensor], norm: Norm) -> list[Group]:
    """The groups of tensors: a large one, small ones of one shape, or of several shapes if few are of each.

    A matrix of small tensors is no larger than a block. One that is filled up with zeros has fewer than `SHARED`
    elements.
    """
    large, full = [], []
    small: dict[tuple[str, int, torch.Size], list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel() >= SHARED:
            large.append([index])
            continue
        key = (str(tensor.dtype), matrix_shape(tensor.size(), norm)[1], tensor.size())
        small.setdefault(key, []).append(index)
        if len(small[key]) * tensor.numel() >= _block(tensor):
            full.append(small.pop(key))
    mixed: list[list[int]] = []
    for _, indices in sorted(small.items()):  # rows of about the same length share a matrix
        if mixed and _fit([tensors[index] for index in mixed[-1] + indices], norm):
            mixed[-1] += indices
        else:
            mixed.append(indices)
    groups = []
    for indices in large + full + mixed:
        one_shape = len({tensors[index].size() for index in indices}) == 1
        groups.append((Group if one_shape else MixedGroup)(indices, tensors, norm))
    return groups


def _fit(tensors: Sequence[Tensor], norm: Norm) -> bool:
    """Whether the matrix of all their rows is small, and so is the one in which `MixedGroup.total` adds them."""
    counts, lengths = zip(*(matrix_shape(tensor.size(), norm) for tensor in tensors), strict=True)
    largest = max(sum(counts) * max(lengths), len(counts) * max(counts))
    return largest < SHARED and len({tensor.dtype for tensor in tensors}) == 1


def _block(tensor: Tensor) -> int:
    return BLOCK.get(tensor.device.type, LARGE_BLOCK)


class Group:
    """Tensors that make one matrix: a large one, or small ones of one shape.

    Args:
        indices: Of them among the tensors.
        tensors: All that are arranged.
        norm: Says what a row is.

    Attributes:
        indices: See above.
        counts: How many rows each has.
        rows: How many all have.
        one_row: Whether that is one.
        roundoff: Half the eps of their dtype, 0 if it has 16 bits.
        is_view: Whether the matrix is a view of a large tensor, not a copy.
    """

    def __init__(self, indices: list[int], tensors: Sequence[Tensor], norm: Norm) -> None:
        first = tensors[indices[0]]
        shapes = [matrix_shape(tensors[index].size(), norm) for index in indices]
        self.indices = indices
        self.counts = [rows for rows, _ in shapes]
        self.rows, self._length = sum(self.counts), max(length for _, length in shapes)
        self.one_row = self.rows == 1
        self.roundoff = 0.0 if is_coarse(first.dtype) else torch.finfo(first.dtype).eps / 2
        self._size, self._stride = first.size(), first.stride()
        self.is_view = first.numel() >= SHARED and _row_by_row(first, self.rows, self._length)
        self._zero = first.new_zeros(())
        self._block = _block(first) if self.one_row else max(1, _block(first) // max(1, self._length))
        self._is_block = (self._length if self.one_row else self.rows) <= self._block

    def blocks(self, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The parts of matrices that are worked on at a time: rows, or pieces of the only one."""
        if self._is_block:
            return iter([matrices])
        return zip(*(torch.split(m, self._block, dim=1 if self.one_row else 0) for m in matrices), strict=True)

    def total(self, rows: Tensor) -> Tensor:
        """The sum over each tensor's rows, shape (..., tensors) from (..., rows)."""
        each = len(self.indices), self.counts[0]
        return rows if self.counts[0] == 1 else rows.unflatten(-1, each).sum(dim=-1)  # type: ignore[no-untyped-call]

    def is_missing(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether all of them are None."""
        return all(tensors[index] is None for index in self.indices)

    def arrange(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The matrix: a view of a large tensor, wherever it is, a copy of small ones, zeros for None."""
        if self.is_missing(tensors):
            return self._zero.expand(self.rows, self._length)
        mine = [tensors[index] for index in self.indices]
        if not self.is_view:
            return self._gather(mine)
        tensor = cast(Tensor, mine[0])
        if tensor.stride() != self._stride:  # the elements of all matrices are in the same order
            tensor = tensor.new_empty_strided(self._size, self._stride).copy_(tensor)
        return tensor.as_strided((self.rows, self._length), (self._length, 1))

    def to_write(self, tensors: Sequence[Tensor | None], reads: bool) -> Tensor:
        """A matrix for new values of the tensors, which `write` brings there; with the present ones if these count."""
        return self.arrange(tensors) if reads or self.is_view else self.empty()

    def empty(self) -> Tensor:
        """Memory for a matrix."""
        return self._zero.new_empty(self.rows, self._length)

    def write(self, matrix: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Bring the matrix into the tensors; None is left alone."""
        mine = [tensors[index] for index in self.indices]
        if self.is_view:
            (tensor,) = mine
            if tensor is not None and tensor.data_ptr() != matrix.data_ptr():
                tensor.copy_(matrix.as_strided(self._size, self._stride))
            return
        pairs = [(tensor, part) for tensor, part in zip(mine, self._parts(matrix), strict=True) if tensor is not None]
        torch._foreach_copy_([tensor for tensor, _ in pairs], [part for _, part in pairs])

    def _gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        present = [self._zero.expand(self._size) if tensor is None else tensor for tensor in tensors]
        matrix = torch.stack(present).reshape(self.rows, self._length)  # stacked in the memory order of the parts
        return matrix.to(self._zero.device)

    def _parts(self, matrix: Tensor) -> Sequence[Tensor]:
        return matrix.view(len(self.indices), *self._size).unbind()


class MixedGroup(Group):
    """Small tensors of several shapes: the shorter rows of their matrix end in zeros, which add nothing to any sum."""

    def __init__(self, indices: list[int], tensors: Sequence[Tensor], norm: Norm) -> None:
        super().__init__(indices, tensors, norm)
        self._sizes = [tensors[index].size() for index in indices]
        self._numels = [size.numel() for size in self._sizes]
        counts, lengths = torch.tensor([matrix_shape(size, norm) for size in self._sizes]).unbind(1)
        used = torch.arange(self._length) < lengths.repeat_interleave(counts).unsqueeze(1)
        device = self._zero.device
        self._sources = _sources(used).flatten().to(device)
        self._places = used.flatten().nonzero().squeeze(1).to(device)
        self._is_even = len(set(self.counts)) == 1
        self._rows_of = _sources(torch.arange(max(self.counts)) < counts.unsqueeze(1)).to(device)

    @override
    def total(self, rows: Tensor) -> Tensor:
        if self._is_even:
            return super().total(rows)
        return pad(rows, (0, 1))[..., self._rows_of].sum(dim=-1)

    @override
    def _gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        pairs = zip(tensors, self._sizes, strict=True)
        present = [(self._zero.expand(size) if tensor is None else tensor).flatten() for tensor, size in pairs]
        flat = torch.cat([*present, present[0].new_zeros(1)]).view(sum(self._numels) + 1)  # an error for another size
        # not by `take`, which Apple's GPUs lack
        return flat.to(self._zero.device).index_select(0, self._sources).view(self.rows, self._length)

    @override
    def _parts(self, matrix: Tensor) -> Sequence[Tensor]:
        flat = matrix.flatten().index_select(0, self._places).split(self._numels)  # type: ignore[no-untyped-call]
        return [part if len(size) == 1 else part.view(size) for part, size in zip(flat, self._sizes, strict=True)]


def _sources(used: Tensor) -> Tensor:
    """Which of N elements come into the used places of a matrix, shape (R, L); N for the other places."""
    return torch.where(used, used.flatten().cumsum(0).view_as(used) - 1, used.sum())


def _row_by_row(tensor: Tensor, rows: int, length: int) -> bool:
    """Whether the tensor's memory has no gaps and holds one row after the other."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return rows == 1 or tensor.stride(0) == length
