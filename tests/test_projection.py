"""Properties of the projection and of the radius's gradient, on drawn tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods.radii import Radii
from lightning_tpgm.projection import EPS, MIN_RADIUS, legal_radius, project_inside, ratio, safe_ratio
from properties import (
    assert_idempotent,
    assert_same_direction,
    assert_tensor_inside_ball,
    assert_unchanged,
    distances,
    resolution,
)

SHAPES = [(), (1,), (5,), (1, 4), (4, 1), (3, 4), (2, 3, 2), (3, 2, 2, 2)]
draws = settings(max_examples=80, deadline=None)


class Case(NamedTuple):
    weight: Tensor
    anchor: Tensor
    norm: str

    def tensors(self, weight: Tensor) -> Constrained:
        return Constrained({"w": weight}, {"w": self.anchor}, self.norm)

    def distance(self) -> Tensor:
        """Of every row, in the order of the package's own."""
        tensors = self.tensors(self.weight)
        return tensors.rows(tensors.weights())

    def project(self, weight: Tensor, radius: float | Tensor) -> Tensor:
        """What methods do with all their tensors, of one."""
        target = weight.clone()
        tensors = self.tensors(target)
        weights = tensors.keep()
        tensors.project(weights, tensors.rows(weights), tensors.scalar().new_tensor([float(radius)]))
        return target

    def gradient(self, grad: Tensor, radius: float) -> Tensor:
        """dLoss/dgamma, given the gradient at the projected weight."""
        tensors = self.tensors(self.weight)
        weights, radii = tensors.weights(), Radii(0.1)
        radii.value = tensors.scalar().new_tensor([radius])
        return radii.slope(tensors, tensors.arrange([grad]), weights, tensors.rows(weights))


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple = (torch.float32, torch.float64, torch.bfloat16, torch.float16)) -> Case:
    """A weight and its anchor: any norm, shape, dtype, and scales of anchor and deviation; some rows still."""
    dtype = draw(st.sampled_from(dtypes))
    norm = draw(st.sampled_from(["mars", "l2"]))
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    anchor = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-3, 2))
    moved = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(st.integers(-4, 2))
    if shape and draw(st.booleans()):
        moved[0] = 0
    return Case((anchor + moved).to(dtype), anchor.to(dtype), norm)


@draws
@given(cases(), st.floats(1.001, 1e3))
def test_inside_is_unchanged_to_the_bit(case: Case, factor: float) -> None:
    radius = (float(case.distance().amax()) + EPS) * factor
    assert_unchanged(lambda weight: case.project(weight, radius), case.weight)


@draws
@given(cases())
def test_on_the_boundary_only_eps_is_lost(case: Case) -> None:
    """A row at distance n = gamma moves by the eps of the denominator at most."""
    for n in case.distance().flatten().tolist():
        projected = case.project(case.weight, n)
        assert_tensor_inside_ball(projected, case.anchor, n, case.norm)
        at_n = (case.distance().flatten() == n).tolist()
        moved = distances(projected.double() - case.weight.double(), case.norm)
        rounding = resolution(case.weight, case.anchor, case.norm)
        assert all(m <= 1.01 * EPS + 4 * r for m, r, here in zip(moved, rounding, at_n, strict=True) if here)


@draws
@given(cases(), st.floats(0, 0.999))
def test_outside_lands_on_the_sphere(case: Case, fraction: float) -> None:
    """The farthest row ends at the radius, every row inside the ball, each in its direction, as in float64."""
    largest = float(case.distance().amax())
    assume(largest > 1e-5)
    radius = fraction * largest
    projected = case.project(case.weight, radius)

    assert projected.dtype == case.weight.dtype
    assert projected.shape == case.weight.shape
    assert_tensor_inside_ball(projected, case.anchor, radius, case.norm)
    assert_same_direction(lambda weight: case.project(weight, radius), case.weight, case.anchor, case.norm)
    assert_idempotent(lambda weight: case.project(weight, radius), case.weight, case.anchor, case.norm)
    after = distances(projected.double() - case.anchor.double(), case.norm)
    rounding = max(resolution(projected, case.anchor, case.norm))
    # what was taken off the radius, at most 3/2 of this resolution, and what rounding takes off, at most 1/2
    assert max(after) >= radius * (1 - 1e-5) - 1.01 * EPS - 2 * rounding
    expected = reference.project(case.anchor, case.weight, radius, case.norm)
    atol = 2 * torch.finfo(case.weight.dtype).eps * float(case.weight.abs().maximum(case.anchor.abs()).amax())
    torch.testing.assert_close(projected.double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("shape", [(768,), (16, 4608)])
def test_rounding_does_not_leave_the_ball(shape: tuple[int, ...], norm: Any, dtype: torch.dtype) -> None:
    """Many weights that moved little: half a unit in the last place of each adds up, and is taken off the radius."""
    generator = torch.Generator().manual_seed(0)
    anchor = torch.rand(shape, generator=generator) + 1
    eps = torch.finfo(dtype).eps
    for steps in (0.6, 3, 30, 1000):
        weight = (anchor.to(dtype) + steps * eps * torch.randn(shape, generator=generator)).to(dtype)
        case = Case(weight, anchor.to(dtype), norm)
        n = float(case.distance().amax())
        margin = eps / 2 * max(distances(case.anchor.double(), norm))
        for fraction in (0.001, 0.1, 0.5, 0.9, 0.999):
            after = max(distances(case.project(weight, fraction * n).double() - case.anchor.double(), norm))
            assert after <= fraction * n * (1 + 1e-5)
            assert after >= fraction * n - 2.01 * margin - 1.5 * eps * fraction * n


@st.composite
def coarse_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Rows of 16 bits, down to the smallest numbers and across zero, with a ratio each."""
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16]))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 300])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    anchor, moved = (torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-8, 2)) for _ in range(2))
    ratio = torch.rand(shape[0], 1, generator=generator) ** draw(st.sampled_from([1, 8, 1 / 8]))
    return (anchor + moved).to(dtype), anchor.to(dtype), ratio, draw(st.sampled_from(["mars", "l2"]))


@settings(max_examples=400, deadline=None)
@given(coarse_cases())
def test_rounding_to_16_bits_lengthens_no_row(case: tuple[Tensor, Tensor, Tensor, Any]) -> None:
    """Each element is one of the two numbers next to the exact one, and their row is no longer than the exact one."""
    weight, anchor, ratio, norm = case
    projected = project_inside(weight, anchor, ratio, norm)
    moved = weight.double() - anchor.double()
    exact = anchor.double() + ratio.double() * moved
    step = torch.finfo(weight.dtype).eps * projected.double().abs().maximum(exact.abs())
    smallest = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
    assert ((projected.double() - exact).abs() <= (1 + 1e-4) * step.clamp(min=smallest)).all()
    assert ((projected.double() - anchor.double()) * moved >= 0).all()
    allowed, found = (distances(d, norm) for d in (ratio.double() * moved, projected.double() - anchor.double()))
    sizes = distances(anchor.double().abs().maximum(weight.double().abs()), norm)
    assert all(f <= a + 1e-6 * s for f, a, s in zip(found, allowed, sizes, strict=True))
    assert_unchanged(lambda w: project_inside(w, anchor, torch.ones_like(ratio), norm), weight)


@pytest.mark.parametrize(("norm", "steps"), [("mars", 2), ("l2", 1)])
def test_a_row_of_16_bits_that_fits_exactly_loses_no_step(norm: Any, steps: int) -> None:
    anchor = torch.ones(1, 4, dtype=torch.bfloat16)
    projected = project_inside(anchor + 2**-7, anchor, torch.tensor([[0.5]]), norm)
    assert ((projected - anchor) * 2**7).sum() == steps


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (0, 4)])
def test_empty_parts_of_16_bits(shape: tuple[int, int], norm: Any) -> None:
    """A process may have no element of a tensor that is split."""
    empty = torch.empty(shape, dtype=torch.bfloat16)
    assert project_inside(empty, empty, torch.full((shape[0], 1), 0.5), norm, out=empty).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_long_rows_of_16_bits_are_not_pinned(norm: Any, dtype: torch.dtype) -> None:
    """A ball far smaller than what rounding all elements adds up to: rows reach its surface, in all their parts."""
    generator = torch.Generator().manual_seed(0)
    anchor = (1 + torch.rand(8, 4608, generator=generator)).to(dtype)
    eps = torch.finfo(dtype).eps
    case = Case(anchor + eps, anchor, norm)  # each element moved by one step, as small learning rates move them
    for fraction in (0.1, 0.3, 0.5, 0.8):
        n = float(case.distance().amax())
        projected = case.project(case.weight, fraction * n).double() - anchor.double()
        lengths = distances(projected, norm)
        assert all(0.99 * fraction * n <= length <= fraction * n * (1 + 1e-6) for length in lengths)
        parts = projected.square().unflatten(1, (8, -1)).sum(dim=(0, 2))
        assert parts.max() < 1.2 * parts.min()  # an element more or less counts at the smallest ball


@draws
@given(cases(), st.floats(0, 10))
def test_zero_deviation_is_finite(case: Case, radius: float) -> None:
    """A tensor that has not moved stays, whatever its radius (0 included), and its radius has gradient 0."""
    still = case._replace(weight=case.anchor)
    assert torch.equal(still.distance(), torch.zeros_like(still.distance()))
    assert_unchanged(lambda weight: still.project(weight, radius), still.weight)
    assert torch.isfinite(ratio(torch.tensor(radius), still.distance())).all()
    assert still.gradient(torch.ones_like(still.weight), radius) == 0


@draws
@given(cases(dtypes=(torch.float64,)), st.floats(0.01, 1.2), st.integers(0, 2**31))
def test_gradient_of_the_radius_against_finite_differences(case: Case, fraction: float, seed: int) -> None:
    """Central differences of gamma -> Loss(W0 + r D) in float64, away from the corners at gamma = n."""
    distance = case.distance()
    largest = float(distance.amax())
    assume(largest > 1e-3)
    radius = fraction * largest
    assume(bool(((distance - radius).abs() > 1e-4 * largest).all()))
    generator = torch.Generator().manual_seed(seed)
    linear = torch.randn(case.weight.shape, generator=generator, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        return ((weight - case.anchor) / largest * linear).sin().sum() + (linear * weight / largest).sum()

    at = case.project(case.weight, radius).requires_grad_()
    (grad,) = torch.autograd.grad(loss(at), at)
    found = case.gradient(grad, radius)

    h = 1e-6 * largest
    plus, minus = (loss(case.project(case.weight, radius + side * h)) for side in (1, -1))
    expected = float(plus - minus) / (2 * h)
    scale = float(linear.abs().sum()) / largest
    assert float(found) == pytest.approx(
        expected, rel=1e-5, abs=1e-6 * scale * max(1.0, float(case.anchor.abs().amax()) / largest)
    )


@draws
@given(cases(), st.floats(0.01, 0.99))
def test_gradient_of_the_radius_against_the_reference(case: Case, fraction: float) -> None:
    distance = case.distance()
    radius = float(torch.tensor(fraction * float(distance.amax()), dtype=distance.dtype))
    assume(bool(((distance - radius).abs() > 1e-5 * distance.amax()).all()))
    grad = torch.cos(3 * case.weight.double()).to(case.weight.dtype)
    found = case.gradient(grad, radius)
    moved = case.weight.double() - case.anchor.double()
    expected = reference.radius_gradient(grad, moved, radius, case.norm)
    assert found.dtype == distance.dtype
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@draws
@given(st.floats(-10, 10), st.floats(0, 10))
def test_legal_radius(radius: float, largest: float) -> None:
    found = float(legal_radius(*torch.tensor([[radius], [largest]], dtype=torch.float64)))
    assert found <= largest
    assert found >= min(MIN_RADIUS, largest)
    if MIN_RADIUS <= radius <= largest:
        assert found == radius


def test_what_is_not_a_number_bounds_no_radius_and_gets_no_bound() -> None:
    """A step that is undone leaves no trace in it. One that has not begun does not begin so."""
    found = legal_radius(torch.tensor([0.5, torch.nan, torch.nan]), torch.tensor([torch.nan, 1.0, 0.0]))
    assert found[0] == 0.5
    assert found[1:].isnan().all()


def test_a_safe_ratio_without_rounding_is_the_ratio() -> None:
    """Also on the boundary: there only eps is lost."""
    distance = torch.tensor([0.0, 1e-8, 1e-3, 1e-3 + 1e-9, 2e-3])
    radius, none = torch.tensor(1e-3), torch.zeros(())
    assert torch.equal(safe_ratio(radius, distance, none, none), ratio(radius, distance))
    assert safe_ratio(radius, radius, none, none) < 1
