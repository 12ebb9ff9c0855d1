"""The projection onto a ball around the anchor, and how a loss changes with the ball's radius.

In the notation of the papers: anchor W0, weight W, deviation D = W - W0, distance n, radius gamma. All functions are
pure; `lightning_tpgm.blocks` applies them to blocks of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_tpgm.norms import Norm, deviation

EPS = 1e-8
"""Added to a distance that divides."""
MIN_RADIUS = 1e-8
"""The smallest legal radius of a tensor that has moved at least this far."""


def ratio(radius: Tensor, distance: Tensor) -> Tensor:
    """r = clip(gamma / (n + eps), 0, 1): what remains of each row's deviation.

    Args:
        radius: gamma, a scalar tensor.
        distance: n, shape (R, 1, ...) or (1, 1, ...).

    Returns:
        r, the shape of ``distance``. 1 means that the row is inside the ball.

    Source: Tian et al., CVPR 2023, equation 4.
    """
    return (radius / (distance + EPS)).clamp(0, 1)


def safe_ratio(radius: Tensor, distance: Tensor, size: Tensor, roundoff: Tensor) -> Tensor:
    """The ratio with which a projection is inside the ball after rounding to the weight's dtype, too.

    Storing W0 + r D moves a row by at most roundoff (size + gamma). So much is taken off the radius of each row that is
    outside the ball; a row inside keeps r = 1.

    Args:
        radius: gamma, broadcastable against ``distance``.
        distance: n of each row, any shape.
        size: The norm of each row of W0 itself, same shape.
        roundoff: Largest relative error of rounding to the weight's dtype (half its eps), broadcastable;
            0 for a row that `project_inside` rounds.

    Returns:
        r, the shape of ``distance``.

    >>> safe_ratio(torch.tensor(1.0), torch.tensor([0.5, 2.0]), size=torch.tensor(7.0), roundoff=torch.tensor(0.01))
    tensor([1.0000, 0.4600])
    """
    inside = ratio(radius - roundoff * (size + radius), distance)
    return torch.where(radius < distance + EPS, inside, 1)


def project(weight: Tensor, anchor: Tensor, ratio: Tensor, out: Tensor | None = None) -> Tensor:
    """W0 + r (W - W0), computed in float32 at least; a row with r = 1 is returned unchanged to the bit.

    Each row is shrunk radially towards its anchor, and keeps the direction of its deviation. For ``l2`` this is the
    Euclidean projection onto the ball. For ``mars`` it is *not* the nearest point of the L1 ball.

    Args:
        weight: W, any shape and floating dtype.
        anchor: W0, same shape and dtype.
        ratio: r, broadcastable against W, float32 or float64. From `safe_ratio` it keeps the result inside the ball,
            which rounding would leave by a little otherwise.
        out: Where to write the result, shape and dtype of ``weight``, which it may be. None: new memory.

    Returns:
        The projected weight, same shape and dtype as ``weight``.

    Source: Tian et al., CVPR 2023, equation 4.

    >>> project(torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([0.5])).tolist()
    [1.5, 2.0]
    """
    dtype = torch.promote_types(weight.dtype, ratio.dtype)
    start, end, ratio = anchor.to(dtype), weight.to(dtype), ratio.to(dtype)
    if out is not None and weight.dtype == dtype:
        return torch.lerp(start, end, ratio, out=out)
    projected = start.lerp(end, ratio).to(weight.dtype)
    return projected if out is None else out.copy_(projected)


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether a dtype has 16 bits: then the worst case of its rounding is no small part of a radius."""
    return dtype.itemsize == 2


def project_inside(weight: Tensor, anchor: Tensor, ratio: Tensor, norm: Norm, out: Tensor | None = None) -> Tensor:
    """`project` for 16-bit dtypes, rounded so that no row is farther from its anchor than it would be unrounded.

    Of two elements that are to move by half a step of the dtype, one moves and the other stays. The fractions of steps
    are added up along the row. Where they make a whole one the element is rounded away from W0, else towards it. So a
    row keeps its length, even if all its elements are to move by less than a step. What is too long by then is taken
    back.

    Args:
        weight: W, shape (R, L), float16 or bfloat16.
        anchor: W0, same shape and dtype.
        ratio: r, shape (R, 1), float32 or float64.
        norm: What a row's distance is: the L1 norm (``"mars"``) or the Euclidean norm (``"l2"``).
        out: Where to write the result, which may be ``weight``. None: new memory.

    Returns:
        The projected weight. A row with r = 1 is unchanged to the bit. Parts of a row may be rounded one by one.

    >>> weight = torch.full((1, 4), 1 + 2**-7, dtype=torch.bfloat16)  # one step of the dtype from 1
    >>> anchor, ratio = torch.ones_like(weight), torch.tensor([[0.6]])
    >>> project_inside(weight, anchor, ratio, "mars").sub(anchor).mul(2**7).tolist()
    [[0.0, 1.0, 0.0, 1.0]]
    """
    moved = deviation(weight, anchor)
    target = moved.mul(ratio).abs_()
    nearest = project(weight, anchor, ratio)
    lower = torch.where(deviation(nearest, anchor).abs_() > target, _neighbour(nearest, -moved), nearest)
    low = deviation(lower, anchor).abs_()
    upper = torch.where(low < target, _neighbour(lower, moved), lower)
    high = deviation(upper, anchor).abs_()
    if norm == "l2":  # what adds up over a row
        target, low, high = target.square_(), low.square_(), high.square_()
    total = _running_sums((target - low).clamp_(min=0))
    step = high - low  # where it is 0 it leaves inf > inf, or nan > nan: not up
    before = total.roll(1, dims=1)  # not total - fraction, which is another after rounding
    before[:, :1] = 0
    up = total.div_(step).floor_() > before.div_(step).floor_()
    excess = torch.where(up, high, low).sub_(target).sum(dim=1, keepdim=True)
    gain = (high - low).mul_(up)
    up &= _running_sums(gain).sub_(gain) >= excess
    projected = torch.where(up, upper, lower)
    return projected if out is None else out.copy_(projected)


def _running_sums(values: Tensor) -> Tensor:
    """The sum of each row up to every element, shape (R, L), of values that are not negative.

    Whole numbers are added, so that the order does not matter. On a GPU running sums of floats are others each time:
    copies of a weight on several processes would drift apart. With ``torch.use_deterministic_algorithms`` they are an
    error.
    """
    unit = values.sum(dim=1, keepdim=True).mul_(2**-48).clamp_(min=torch.finfo(values.dtype).tiny)
    return (values / unit).round_().to(torch.int64).cumsum(dim=1) * unit


def _neighbour(values: Tensor, direction: Tensor) -> Tensor:
    """The next number in a direction, from a zero the one of its sign: `torch.nextafter` for float16, too."""
    outwards = (direction * values.sign() >= 0).to(torch.int16)  # bits taken as an integer count the numbers from zero
    return (values.view(torch.int16) + (2 * outwards - 1)).view(values.dtype)


def radius_slope(dot: Tensor, distance: Tensor, radius: Tensor) -> Tensor:
    """What each row adds to dLoss/dgamma: <G_row, D_row> / (n_row + eps) if 0 < gamma / (n + eps) < 1, else 0.

    G is the gradient of the loss at the projected weight W0 + r D. Rows inside the ball do not depend on the radius.

    Args:
        dot: <G_row, D_row>, any shape.
        distance: n, same shape.
        radius: gamma, broadcastable.

    Source: the chain rule through Tian et al., CVPR 2023, equation 4.
    """
    active = radius / (distance + EPS)
    return torch.where((active > 0) & (active < 1), dot / (distance + EPS), 0)


def legal_radius(radius: Tensor, largest: Tensor) -> Tensor:
    """Clamp radii to [1e-8, largest distance]; the upper bound wins for a tensor that has not moved that far.

    A radius that is not a number stays as it is. A distance that is not a number is no upper bound.

    Args:
        radius: gamma, shape (T,) for T tensors.
        largest: The largest row distance of each tensor, shape (T,).

    >>> legal_radius(torch.tensor([5.0, -1.0, 1.0]), torch.tensor([2.0, 2.0, 0.0])).tolist()
    [2.0, 9.99999993922529e-09, 0.0]
    """
    radius = radius.clamp(min=MIN_RADIUS)
    return torch.where(largest < radius, largest, radius)
