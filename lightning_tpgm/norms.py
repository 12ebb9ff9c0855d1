"""Distances of a weight from its anchor, one per row of the tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

Norm = Literal["mars", "l2"]
NORMS: tuple[str, ...] = get_args(Norm)


def row_dims(ndim: int, norm: Norm) -> tuple[int, ...]:
    """Dimensions that a distance sums over: all but the first for ``mars``, all for ``l2``.

    A tensor of one or zero dimensions is one row in either norm.

    Args:
        ndim: Number of dimensions of the tensor.
        norm: ``"mars"`` or ``"l2"``.

    >>> row_dims(4, "mars"), row_dims(4, "l2"), row_dims(1, "mars")
    ((1, 2, 3), (0, 1, 2, 3), (0,))
    """
    return tuple(range(1 if norm == "mars" and ndim > 1 else 0, ndim))


def matrix_shape(shape: Sequence[int], norm: Norm) -> tuple[int, int]:
    """How many rows a tensor of this shape has, and their length.

    >>> matrix_shape((64, 3, 7, 7), "mars"), matrix_shape((64, 3, 7, 7), "l2")
    ((64, 147), (1, 9408))
    """
    dims = row_dims(len(shape), norm)
    return (shape[0] if 0 not in dims and shape else 1, prod(shape[dim] for dim in dims))


def deviation(weight: Tensor, anchor: Tensor) -> Tensor:
    """D = W - W0, in float32 at least.

    Args:
        weight: W, any shape and floating dtype.
        anchor: W0, same shape and dtype.

    Returns:
        D, same shape; float64 for float64 weights, else float32.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) - anchor.to(dtype)


def from_sums(sums: Tensor, norm: Norm) -> Tensor:
    """The L1 norms (``mars``) or Euclidean norms (``l2``) from the sums of `lightning_tpgm.blocks.sums`."""
    return sums if norm == "mars" else sums.sqrt()
