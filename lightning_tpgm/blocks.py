"""What a layout does with a block of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tpgm.norms import Norm, deviation
from lightning_tpgm.projection import is_coarse, project, project_inside


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
    return _sums(deviation(weight, anchor), norm)


def _sums(d: Tensor, norm: Norm) -> Tensor:
    """The same of deviations, which it overwrites."""
    # in place: the block is still in the cache, a result of its own would push it out. Not by `vector_norm`: on a CPU
    # it takes three times as long for `mars`. For `l2` it adds one after the other and loses 2e-4 of the norm of 2^18
    # elements that moved alike, as in Adam's first step.
    return (d.abs_() if norm == "mars" else d.square_()).sum(dim=1)


def step_sums(
    weight: Tensor,
    previous: Tensor,
    anchor: Tensor,
    gradient: Tensor,
    norm: Norm,
    old_distance: bool,
    directions: bool,
) -> Tensor:
    """What a step asks of every row. What enters is read from memory once, then it is in the cache.

    Args:
        weight: W, shape (R, L).
        previous: The weights at the step before, W0 + D_prev, same shape.
        anchor: W0, same shape.
        gradient: G, same shape.
        norm: ``"mars"`` or ``"l2"``.
        old_distance: Whether what adds up to n of D_prev is asked for, too.
        directions: Whether <G_row, D_row> and <G_row, G_row> are asked for, too.

    Returns:
        <G_row, D_prev_row>, what adds up to n of D, and what else is asked for, in this order. Shape (2 to 5, R).
    """
    if old_distance:
        d = deviation(previous, anchor)
        found, more = [(d * gradient).sum(dim=1)], [_sums(d, norm)]
    else:
        found, more = [dots(gradient, previous, anchor)], []
    d = deviation(weight, anchor)
    if directions:
        more += [(d * gradient).sum(dim=1), gradient.to(d.dtype).square().sum(dim=1)]
    return torch.stack([*found, _sums(d, norm), *more])


def dots(gradient: Tensor, weight: Tensor, anchor: Tensor) -> Tensor:
    """<G_row, D_row> of every row, shape (R,), from matrices of shape (R, L)."""
    return deviation(weight, anchor).mul_(gradient).sum(dim=1)


def write_projection(target: Tensor, weight: Tensor, anchor: Tensor, ratio: Tensor) -> None:
    """The projection into ``target``, which may be ``weight``, see `lightning_tpgm.projection.project`."""
    project(weight, anchor, ratio, out=target)


def write_inside(target: Tensor, weight: Tensor, anchor: Tensor, ratio: Tensor, norm: Norm) -> None:
    """Like `write_projection`, but rounding to 16 bits lengthens no row."""
    if is_coarse(target.dtype):
        project_inside(weight, anchor, ratio, norm, out=target)
    else:
        project(weight, anchor, ratio, out=target)


def add_deviation(gradient: Tensor, weight: Tensor, anchor: Tensor, factor: Tensor) -> None:
    """G := G + factor D, in place."""
    gradient.add_(deviation(weight, anchor).mul_(factor))
