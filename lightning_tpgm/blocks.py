"""What a layout does with a block of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tpgm.norms import Norm, deviation
from lightning_tpgm.projection import is_coarse, project, project_inside


def sums(weight: Tensor, anchor: Tensor, copy: Tensor | None = None, *, norm: Norm) -> Tensor:
    """What adds up to n of every row: the sum of its ``|d|`` (``"mars"``) or ``d^2`` (``"l2"``).

    Args:
        weight: W, shape (R, L).
        anchor: W0, same shape.
        copy: W is written into it on the way, while it is in the cache.
        norm: ``"mars"`` or ``"l2"``.

    Returns:
        Shape (R,), float32 at least. Those of a row's parts can be added. Then `lightning_tpgm.norms.from_sums` makes
        n of them.
    """
    if copy is not None:
        copy.copy_(weight)
    d = deviation(weight, anchor)
    return _sums(d, norm, memory=d)


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
    return torch.stack([(d * gradient).sum(dim=1), sums(weight, anchor, norm=norm), _sums(d, norm, memory=d)])


def dots(gradient: Tensor, weight: Tensor, anchor: Tensor) -> Tensor:
    """<G_row, D_row> of every row, shape (R,), from matrices of shape (R, L)."""
    return deviation(weight, anchor).mul_(gradient).sum(dim=1)


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
