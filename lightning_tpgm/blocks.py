"""What a layout does with a block of rows."""

from __future__ import annotations

from torch import Tensor

from lightning_tpgm.norms import Norm, deviation
from lightning_tpgm.projection import is_coarse, project, project_inside


def distances(weight: Tensor, anchor: Tensor, norm: Norm) -> Tensor:
    """n of every row: the L1 norm (``"mars"``) or the Euclidean norm (``"l2"``) of its deviation.

    Args:
        weight: W, shape (R, L).
        anchor: W0, same shape.
        norm: L1 (``"mars"``) or Euclidean (``"l2"``).

    Returns:
        Shape (R,), float32 at least.
    """
    d = deviation(weight, anchor)
    # as in `row_norm`, but in place: the block is still in the cache, a result of its own would push it out
    return d.abs_().sum(dim=1) if norm == "mars" else d.square_().sum(dim=1).sqrt()


def copied_distances(weight: Tensor, anchor: Tensor, copy: Tensor, norm: Norm) -> Tensor:
    """Like `distances`; the weights are written into the copy on the way."""
    return distances(copy.copy_(weight), anchor, norm)


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
    gradient.add_((factor * deviation(weight, anchor)).to(gradient.dtype))
