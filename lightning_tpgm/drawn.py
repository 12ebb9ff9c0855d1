"""Is a tensor, to the last bit, what torch's random generator gives? After a single step of training it is not."""

from __future__ import annotations

from collections.abc import Iterator
from math import pi, prod, sqrt

import torch
from torch import Tensor

_CHUNK = 16_384  # entries at a time, whole blocks of 16
_ENOUGH = 20  # entries on the grid: each is there by chance with a probability of less than a half
_TURN = float(torch.tensor(2 * pi))  # of single precision
_STEPS = 2**24  # of the grid: a number in single precision is drawn with 24 random bits


def uniform_bounds(shape: torch.Size) -> list[tuple[float, str]]:
    """Where the usual uniform initialisations of a weight end, and what they are called; torch's default first."""
    fan_in, fan_out = prod(shape[1:]), shape[0] * prod(shape[2:])
    return [
        (1 / sqrt(fan_in), "uniform in +-1/sqrt(fan_in)"),
        (1 / sqrt(fan_out), "uniform in +-1/sqrt(fan_out)"),
        (sqrt(6 / (fan_in + fan_out)), "Xavier uniform"),
        (sqrt(6 / fan_in), "Kaiming uniform"),
        (sqrt(6 / fan_out), "Kaiming uniform"),
    ]


def drawn(values: Tensor, shape: torch.Size) -> str | None:
    """How a weight was drawn, if torch drew it on a CPU in single precision and nothing has changed it since.

    What torch draws lies on a grid. A uniform number is one of 2^24 in its interval. Normal numbers come in pairs, as
    radius times cosine and sine of an angle (Box and Muller). The angle is one of 2^24 in the circle. In a block of 16
    entries the first has its partner in the ninth, and so on. Rounding blurs the grid for large numbers and angles, so
    only small ones are looked at. Should torch draw otherwise one day, nothing is found any more.

    Args:
        values: The weight, or the part of it that is here.
        shape: That of the whole weight.
    """
    if values.dtype != torch.float32:
        return None
    flat = values.flatten()
    chunks = torch.split(flat, _CHUNK)
    for bound, how in uniform_bounds(shape):
        if _on_grid(_uniform(chunk, bound) for chunk in chunks):
            return how
    blocks = len(flat) // 16 * 16
    if blocks < len(flat):
        blocks = max(0, blocks - 16)  # the rest is drawn anew together with a part of the last block
    if _on_grid(_normal(chunk) for chunk in torch.split(flat[:blocks], _CHUNK)):
        return f"normal with standard deviation {float(values.std()):.1g}"
    return None


def _on_grid(chunks: Iterator[tuple[Tensor, Tensor]]) -> bool:
    """Whether numbers are multiples of a step, given them and how far off they may be, both in steps.

    Half of what is drawn are odd multiples, and hardly two are equal. Of weights that came from half precision, or that
    were quantised, neither is true.
    """
    found = torch.zeros(0, dtype=torch.float64)
    for steps, rounding in chunks:
        multiples = steps.round()
        if bool(((steps - multiples).abs() > rounding).any()):
            return False
        found = torch.cat([found, multiples])[:_CHUNK]
    odd = torch.unique(found[found % 2 == 1])
    return len(found) >= _ENOUGH and len(odd) >= len(found) / 4


def _uniform(values: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The numbers that gave these values, where they are in the interval's inner three quarters, or outside of it."""
    z = values.cpu().double() / float(torch.tensor(bound))  # of single precision
    inner, outer = z[z.abs() < 0.75], z[z.abs() > 1]
    return torch.cat([(inner + 1) / 2 * _STEPS, outer]), torch.cat([0.55 * inner.abs(), -outer.abs()])


def _normal(values: Tensor) -> tuple[Tensor, Tensor]:
    """The angles that gave these values, up to half a radian."""
    cosine, sine = values.cpu().double().view(-1, 2, 8).unbind(1)
    angle = torch.atan2(sine, cosine)
    angle = angle[(angle > 0) & (angle < 0.5)]
    return angle / _TURN * _STEPS, 0.9 * angle
