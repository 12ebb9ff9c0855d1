"""What a layout does with a block of rows: operation by operation, or compiled into one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from typing_extensions import override

from lightning_tpgm.norms import Norm, deviation, row_norm
from lightning_tpgm.projection import project


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
    # `abs` in place: the block is still in the cache, a result of its own would push it out
    return d.abs_().sum(dim=1) if norm == "mars" else row_norm(d, (1,), norm).squeeze(1)


def copied_distances(weight: Tensor, anchor: Tensor, copy: Tensor, norm: Norm) -> Tensor:
    """Like `distances`; the weights are written into the copy on the way."""
    return distances(copy.copy_(weight), anchor, norm)


def dots(gradient: Tensor, weight: Tensor, anchor: Tensor) -> Tensor:
    """<G_row, D_row> of every row, shape (R,), from matrices of shape (R, L)."""
    return deviation(weight, anchor).mul_(gradient).sum(dim=1)


def write_projection(target: Tensor, weight: Tensor, anchor: Tensor, ratio: Tensor) -> None:
    """The projection into ``target``, which may be ``weight``, see `lightning_tpgm.projection.project`."""
    project(weight, anchor, ratio, out=target)


def _write_projection(target: Tensor, weight: Tensor, anchor: Tensor, ratio: Tensor) -> None:
    target.copy_(project(weight, anchor, ratio))  # what compilers can fuse: they do not know `lerp` with `out`


@dataclass(frozen=True)
class Blocks:
    """The functions of this module, as they are, or compiled for a type of device."""

    distances: Callable[[Tensor, Tensor, Norm], Tensor] = distances
    copied_distances: Callable[[Tensor, Tensor, Tensor, Norm], Tensor] = copied_distances
    dots: Callable[[Tensor, Tensor, Tensor], Tensor] = dots
    write_projection: Callable[[Tensor, Tensor, Tensor, Tensor], None] = write_projection
    compiled_for: str | None = None

    @override
    def __reduce__(self) -> tuple[Callable[..., Blocks], tuple[str, ...]]:
        """Compiled functions cannot be pickled: they are compiled again where they arrive."""
        return (Blocks, ()) if self.compiled_for is None else (fused_blocks, (self.compiled_for,))


PLAIN = Blocks()


def blocks_for(device: str, compile: bool) -> tuple[Blocks, str | None]:
    """The functions for a type of device, and why they are not compiled although that was asked for."""
    if not compile:
        return PLAIN, None
    try:
        return fused_blocks(device), None
    except Exception as error:  # noqa: BLE001  # whatever a compiler, or the lack of one, raises
        return PLAIN, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@cache
def fused_blocks(device: str) -> Blocks:
    """The functions compiled, each to one pass over memory.

    Args:
        device: A type of device, ``"cpu"`` or ``"cuda"``.

    Raises:
        Exception: Of whichever kind the compiler has, if it does not work here: it is tried out.
    """
    compiled = Blocks(
        torch.compile(distances, dynamic=True),
        torch.compile(copied_distances, dynamic=True),
        torch.compile(dots, dynamic=True),
        torch.compile(_write_projection, dynamic=True),
        compiled_for=device,
    )
    probe = torch.ones(4, 5, device=device)
    compiled.write_projection(probe, probe, torch.zeros_like(probe), compiled.distances(probe, probe, "mars")[:, None])
    return compiled
