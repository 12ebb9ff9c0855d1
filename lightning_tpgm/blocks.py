"""What a layout does with a block of rows."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lightning_tpgm.norms import Norm, deviation
from lightning_tpgm.projection import is_coarse, project, project_inside

PIECE = 64
"""So many elements of a row `torch.cdist` may add up one after the other: float32 loses 1e-6 of a sum by that."""


def sums(weight: Tensor, anchor: Tensor, norm: Norm) -> Tensor:
    """What adds up to n of every row: the sum of its ``|d|`` (``"mars"``) or ``d^2`` (``"l2"``).

    Args:
        weight: W, shape (R, L).
        anchor: W0, same shape.
        norm: ``"mars"`` or ``"l2"``.

    Returns:
        Shape (R,), float32 at least. Those of a row's parts can be added. Then `lightning_tpgm.norms.from_sums` makes
        n of them.
    """
    if not is_one_call(weight, anchor):
        d = deviation(weight, anchor)
        return _sums(d, norm, memory=d)
    pieces = _pieces(weight.size())
    distances = torch.cdist(weight.view(pieces), anchor.view(pieces), p=1.0 if norm == "mars" else 2.0)
    return (distances if norm == "mars" else distances.square_()).view(weight.size(0), -1).sum(dim=1)


def is_one_call(weight: Tensor, anchor: Tensor) -> bool:
    """Whether `sums` has an operation of torch that reads both once and writes nothing, so that blocks are not needed.

    It has no 16 bits, would copy what has gaps, and is slow where pieces are short. On a GPU it has not been measured.
    """
    fits = weight.device.type == "cpu" and weight.dtype.itemsize >= 4 and are_alike(weight, anchor)
    size = weight.size()
    pieces = size.numel() > 0 and size[1] > 1 and _pieces(size)[-1] >= min(size[1], PIECE // 4)
    return fits and pieces and weight.is_contiguous() and anchor.is_contiguous()


@cache
def _pieces(size: torch.Size) -> tuple[int, int, int]:
    """The shape of the equal pieces of rows that one call adds up, (count, 1, elements)."""
    length = max((piece for piece in range(1, PIECE + 1) if size[1] % piece == 0), default=1)
    return size.numel() // length, 1, length


def _sums(d: Tensor, norm: Norm, memory: Tensor) -> Tensor:
    """The same of deviations; ``memory`` is overwritten, and may be ``d``."""
    # into memory that is in the cache: new memory would push the block out. Not by `vector_norm`: on a CPU
    # it takes three times as long for `mars`. For `l2` it adds one after the other and loses 2e-4 of the norm of 2^18
    # elements that moved alike, as in Adam's first step.
    return (torch.abs if norm == "mars" else torch.square)(d, out=memory).sum(dim=1)


def step_sums(
    weight: Tensor,
    anchor: Tensor,
    before: Tensor,
    gradient: Tensor,
    kept: Tensor | None = None,
    *,
    norm: Norm,
    more: bool,
) -> Tensor:
    """What a step asks of every row. What enters is read from memory once, then it is in the cache.

    Args:
        weight: W, shape (R, L).
        anchor: W0, same shape.
        before: D_prev, the deviation at the step before, same shape.
        gradient: G, same shape.
        kept: D is written into it, rounded to its dtype. It may be ``before``.
        norm: ``"mars"`` or ``"l2"``.
        more: Whether what adds up to n of D_prev, <G_row, D_row> and <G_row, G_row> are asked for, too.

    Returns:
        <G_row, D_prev_row>, what adds up to n of D, and what else is asked for, in this order. Shape (2 or 5, R).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    before, gradient = before.to(dtype), gradient.to(dtype)
    memory = before * gradient
    found = [memory.sum(dim=1)]
    before_distance = [_sums(before, norm, memory)] if more else []
    fits = kept is not None and kept.dtype == dtype
    d = torch.sub(weight, anchor, out=kept) if fits else deviation(weight, anchor)
    found += [_sums(d, norm, memory), *before_distance]
    if more:
        found += [torch.mul(d, gradient, out=memory).sum(dim=1), torch.square(gradient, out=memory).sum(dim=1)]
    if kept is not None and not fits:
        kept.copy_(d)
    return torch.stack(found)


def change_sums(weight: Tensor, anchor: Tensor, before: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """<G_row, D_prev_row>, and what adds up to n of D and of D_prev, shape (3, R).

    Args:
        weight: W, shape (R, L).
        anchor: W0, same shape.
        before: The weights before the step, W0 + D_prev, same shape.
        gradient: G, same shape.
        norm: ``"mars"`` or ``"l2"``.
    """
    d = deviation(before, anchor)
    return torch.stack([(d * gradient).sum(dim=1), sums(weight, anchor, norm), _sums(d, norm, memory=d)])


def dots(gradient: Tensor, weight: Tensor, anchor: Tensor) -> Tensor:
    """<G_row, D_row> of every row, shape (R,), from matrices of shape (R, L)."""
    return deviation(weight, anchor).mul_(gradient).sum(dim=1)


def are_alike(*matrices: Tensor) -> bool:
    """Whether all have one dtype and device, so that one operation of torch on all of them needs no other memory."""
    return len({(matrix.dtype, matrix.device) for matrix in matrices}) == 1


def write_projection(target: Tensor, ratio: Tensor, weight: Tensor, anchor: Tensor) -> None:
    """The projection into ``target``, which may be ``weight``, see `lightning_tpgm.projection.project`."""
    project(weight, anchor, ratio, out=target)


def write_inside(target: Tensor, ratio: Tensor, weight: Tensor, anchor: Tensor, norm: Norm) -> None:
    """Like `write_projection`, but rounding to 16 bits lengthens no row."""
    if is_coarse(target.dtype):
        project_inside(weight, anchor, ratio, norm, out=target)
    else:
        project(weight, anchor, ratio, out=target)


def add_deviation(gradient: Tensor, factor: Tensor, weight: Tensor, anchor: Tensor) -> None:
    """G := G + factor D, in place."""
    gradient.add_(deviation(weight, anchor).mul_(factor))


def add_multiple(gradient: Tensor, factor: Tensor, d: Tensor) -> None:
    """G := G + factor D, in place, from D itself."""
    gradient.addcmul_(d, factor)
