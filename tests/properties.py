"""Assertions that all methods share: bit-for-bit equality, and what a projection onto a ball must satisfy.

Distances are computed here in float64 over the rows of tests/reference.py, not by the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference import rows

SLACK = 1e-5  # relative, on the radius


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    """Equal to the bit, at any depth: type, keys and their order, shape, dtype, value; NaN equals NaN."""
    assert type(found) is type(expected), f"{path}: {type(found)} is not {type(expected)}"
    if isinstance(found, Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        same = torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())
        assert same, f"{path}: {found} is not {expected}"
    elif isinstance(found, np.ndarray):
        assert found.dtype == expected.dtype, path
        np.testing.assert_array_equal(found, expected, err_msg=path)
    elif isinstance(found, Mapping):
        assert list(found) == list(expected), f"{path}: {list(found)} is not {list(expected)}"
        for key in found:
            assert_same(found[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected), f"{path}: {len(found)} items, expected {len(expected)}"
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    else:
        assert found == expected or found != found != expected != expected, f"{path}: {found!r} is not {expected!r}"


def distances(deviation: Tensor, norm: str) -> list[float]:
    """The distance of every row: sum of absolute values (`mars`) or Frobenius norm (`l2`), in float64."""
    matrix = torch.stack(rows(deviation, norm))
    return (matrix.abs().sum(dim=1) if norm == "mars" else matrix.square().sum(dim=1).sqrt()).tolist()


def _rounding(weight: Tensor, anchor: Tensor) -> Tensor:
    """eps max(|W|, |W0|) of each entry.

    eps is the dtype's (2^-23 for float32, 2^-7 for bfloat16): rounding W0 + r D to the dtype moves an entry by at most
    half of that, and the arithmetic before it, in float32 at least, by at most as much again.
    """
    return torch.finfo(weight.dtype).eps * weight.double().abs().maximum(anchor.double().abs())


def resolution(weight: Tensor, anchor: Tensor, norm: str) -> list[float]:
    """How much of each row's distance may be due to the weights' dtype: the row's norm of eps max(|W|, |W0|)."""
    return distances(_rounding(weight, anchor), norm)


def assert_tensor_inside_ball(weight: Tensor, anchor: Tensor, radius: float, norm: str, name: str = "") -> None:
    """Each row's distance is at most radius (1 + 1e-5) and the resolution of the weight's dtype."""
    weight = weight.detach()
    found = distances(weight.double() - anchor.double(), norm)
    for i, (distance, rounding) in enumerate(zip(found, resolution(weight, anchor, norm), strict=True)):
        assert distance <= radius * (1 + SLACK) + rounding, f"{name} row {i}: distance {distance}, radius {radius}"


def assert_inside_ball(
    module: nn.Module | Mapping[str, Tensor], anchors: Mapping[str, Tensor], radii: Mapping[str, float], norm: str
) -> None:
    """Every constrained tensor of a module (or state dict) is inside its ball around its anchor.

    Args:
        module: A module or its state dict.
        anchors: W0 by parameter name.
        radii: gamma by parameter name, of exactly the anchored ones. A radius that is not a number yet, before the
            first step that its parameter takes part in, constrains nothing.
        norm: ``"mars"`` or ``"l2"``.
    """
    weights = dict(module.named_parameters()) if isinstance(module, nn.Module) else module
    assert set(anchors) == set(radii)
    for name, radius in radii.items():
        if radius == radius:  # not NaN
            assert_tensor_inside_ball(weights[name], anchors[name], radius, norm, name)


def assert_distances(module: nn.Module, anchors: Mapping[str, Tensor], shown: Mapping[str, float], norm: str) -> None:
    """What a callback shows as distances are the largest row distances of the module's weights."""
    weights = dict(module.named_parameters())
    assert set(anchors) == set(shown)
    for name, distance in shown.items():
        weight, anchor = weights[name].detach(), anchors[name]
        found = max(distances(weight.double() - anchor.double(), norm))
        slack = SLACK * found + max(resolution(weight, anchor, norm))
        assert abs(distance - found) <= slack, f"{name}: shown {distance}, found {found}"


Project = Callable[[Tensor], Tensor]


def assert_idempotent(project: Project, weight: Tensor, anchor: Tensor, norm: str) -> None:
    """Projecting twice is projecting once, up to the 1e-8 that the ratio adds to a distance and some roundings."""
    once = project(weight)
    moved = distances(project(once).double() - once.double(), norm)
    for distance, rounding in zip(moved, resolution(once, anchor, norm), strict=True):
        assert distance <= 1.01e-8 + 4 * rounding


def assert_unchanged(project: Project, weight: Tensor) -> None:
    """What is inside stays as it is, to the bit."""
    assert torch.equal(project(weight), weight)


def assert_same_direction(project: Project, weight: Tensor, anchor: Tensor, norm: str) -> None:
    """Each row of the deviation is shrunk by one ratio in [0, 1]: it keeps its direction and never grows."""
    projected = project(weight)
    before, after = rows(weight.double() - anchor.double(), norm), rows(projected.double() - anchor.double(), norm)
    for d, shrunk, rounding in zip(before, after, rows(_rounding(projected, anchor), norm), strict=True):
        ratio = float(shrunk.norm() / d.norm()) if d.norm() > 0 else 0.0
        slack = float(rounding.norm())
        assert ratio <= 1 + SLACK + slack / max(float(d.norm()), 1e-30)
        assert ((shrunk - ratio * d).abs() <= SLACK * ratio * d.abs() + rounding + slack).all()


def row_distances(weight: Tensor, anchor: Tensor, norm: str) -> Tensor:
    """The distance of every row, in float64; written without the package."""
    deviation = weight.double() - anchor.double()
    if norm == "l2" or deviation.dim() < 2:
        deviation = deviation.reshape(1, -1)
    deviation = deviation.flatten(1)
    return deviation.abs().sum(1) if norm == "mars" else deviation.square().sum(1).sqrt()


def assert_inside_balls(
    module: nn.Module, anchors: Mapping[str, Tensor], radii: Mapping[str, float], norm: str = "mars", rtol: float = 1e-5
) -> None:
    """Every tensor is no farther from its anchor than its radius; storing a weight rounds it.

    One whose radius is not a number has not been stepped yet, and so has not moved.
    """
    parameters = dict(module.named_parameters())
    assert radii
    for name, radius in radii.items():
        weight = parameters[name].detach()
        distance = row_distances(weight, anchors[name], norm)
        rounding = torch.finfo(weight.dtype).eps * row_distances(weight, torch.zeros_like(weight), norm)
        bound = 0.0 if radius != radius else radius
        assert (distance <= bound * (1 + rtol) + rounding).all(), f"{name}: distances {distance}, radius {radius}"
