"""The reference is checked before it judges: by hand, by autograd, by finite differences and by recorded runs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from parity_model import ParityModel, Recording, load_recording
from reference import (
    ReferenceDiGraP,
    ReferenceFTP,
    ReferenceL2SP,
    ReferenceSPD,
    ReferenceTPGM,
    ScalarAdam,
    clamp_radius,
    distance_rows,
    ftp_radius_gradient,
    gradient_projection,
    inner,
    omega_derivative,
    omega_gradient,
    project,
    radius_gradient,
    ratio_rows,
    wise_ft,
)

SHAPES = [(), (5,), (4, 3), (3, 2, 4), (4, 2, 3, 3)]
NORMS = ["mars", "l2"]


def double(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vectorised_projection(anchor: Tensor, weight: Tensor, radius: Tensor, norm: str) -> Tensor:
    """W0 + clip(gamma / (n + eps), 0, 1) D without a loop, so that autograd can differentiate it."""
    deviation = weight - anchor
    flat = deviation.reshape(1, -1) if norm == "l2" or deviation.dim() < 2 else deviation.flatten(1)
    distance = flat.abs().sum(1, keepdim=True) if norm == "mars" else flat.norm(dim=1, keepdim=True)
    return anchor + ((radius / (distance + 1e-8)).clamp(0, 1) * flat).reshape(deviation.shape)


# --- norms and projection ---


@pytest.mark.parametrize(
    ("deviation", "mars", "l2"),
    [
        (double([[1, -2], [3, 4]]), [3, 7], [math.sqrt(30)]),
        (double([[[1, -2]], [[3, 4]]]), [3, 7], [math.sqrt(30)]),
        (double([3, -4]), [7], [5]),
        (torch.tensor(-2.0), [2], [2]),
    ],
)
def test_distance_by_hand(deviation: Tensor, mars: list[float], l2: list[float]) -> None:
    assert distance_rows(deviation, "mars") == pytest.approx(mars, rel=1e-15)
    assert distance_rows(deviation, "l2") == pytest.approx(l2, rel=1e-15)


def test_projection_by_hand() -> None:
    """Inside: unchanged. Outside: shrunk onto the radius, along the deviation, around the anchor."""
    anchor, weight = double([[10, 10], [10, 10]]), double([[11, 8], [13, 14]])
    torch.testing.assert_close(project(anchor, weight, 3.5, "mars"), double([[11, 8], [11.5, 12]]), rtol=1e-8, atol=0)
    torch.testing.assert_close(
        project(anchor, weight, math.sqrt(30) / 2, "l2"), double([[10.5, 9], [11.5, 12]]), rtol=1e-8, atol=0
    )
    assert torch.equal(project(anchor, weight, 8.0, "mars"), weight)
    assert ratio_rows(weight - anchor, 3.5, "mars") == pytest.approx([1, 0.5], rel=1e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_equals_vectorised(shape: tuple[int, ...], norm: str) -> None:
    anchor, weight = randn(*shape), randn(*shape, seed=1)
    for radius in (1e-8, 0.7 * min(distance_rows(weight - anchor, norm)), 1e3):
        expected = vectorised_projection(anchor, weight, double(radius), norm)
        torch.testing.assert_close(project(anchor, weight, radius, norm), expected, rtol=1e-12, atol=1e-14)


def test_clamp_radius() -> None:
    assert clamp_radius(0.5, 1.0) == 0.5
    assert clamp_radius(2.0, 1.0) == 1.0
    assert clamp_radius(-1.0, 1.0) == 1e-8
    assert clamp_radius(0.5, 0.0) == 0.0


def test_adam_equals_torch() -> None:
    value, adam = 0.3, ScalarAdam(lr=0.02)
    parameter = torch.nn.Parameter(double(0.3))
    optimizer = torch.optim.Adam([parameter], lr=0.02)
    for gradient in [0.5, -2.0, 0.0, 1e-9, 3.0, 3.0]:
        parameter.grad = double(gradient)
        optimizer.step()
        value = adam.step(value, gradient)
        assert value == pytest.approx(parameter.item(), rel=1e-12)


# --- TPGM ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quantile", [0.3, 0.8, 1.5])
def test_radius_gradient_equals_autograd(shape: tuple[int, ...], norm: str, quantile: float) -> None:
    """Radii below the smallest distance, between the distances of two rows (mars) and above the largest."""
    anchor, weight, target = randn(*shape), randn(*shape, seed=1), randn(*shape, seed=2)
    distances = sorted(distance_rows(weight - anchor, norm))
    radius = double(
        {0.3: 0.3 * distances[0], 0.8: 0.4 * (distances[0] + distances[-1]), 1.5: 1.5 * distances[-1]}[quantile]
    )
    radius.requires_grad_()

    def loss_of(projected: Tensor) -> Tensor:
        return torch.sin(projected - target).sum() + ((projected - target) ** 4).sum()

    (expected,) = torch.autograd.grad(loss_of(vectorised_projection(anchor, weight, radius, norm)), radius)
    projected = project(anchor, weight, radius.item(), norm).requires_grad_()
    (loss_grad,) = torch.autograd.grad(loss_of(projected), projected)
    actual = radius_gradient(loss_grad, weight - anchor, radius.item(), norm)
    assert actual == pytest.approx(expected.item(), rel=1e-10, abs=1e-14)
    assert (actual == 0) == (quantile == 1.5)


@pytest.mark.parametrize(("radius", "in_float32"), [(0.5, 0.0), (0.1, -2.0)])
def test_radius_gradient_at_its_bound(radius: float, in_float32: float) -> None:
    """A radius equal to the distance counts in float64; in float32 it drops out once the ratio rounds to 1."""
    deviation, loss_grad = double([radius, 0.0]), double([-2.0, 5.0])
    assert radius_gradient(loss_grad, deviation, radius, "l2") == pytest.approx(-2.0, rel=1e-6)
    assert radius_gradient(loss_grad, deviation, radius, "l2", torch.float32) == pytest.approx(in_float32, rel=1e-6)
    assert radius_gradient(loss_grad, deviation, 0.0, "l2") == 0


def test_tpgm_steps_by_hand() -> None:
    """Two rows at distances 2 and 4: the radius starts at 1, and Adam's first step moves it by radius_lr."""
    seen = []

    def loss_grads(projected: dict[str, Tensor]) -> dict[str, Tensor | None]:
        seen.append(projected["w"].clone())
        return {"w": double([[-1, -1], [0, 0]])}  # a larger radius lowers the loss

    reference = ReferenceTPGM({"w": torch.zeros(2, 2)}, radius_lr=0.01)
    projected = reference.after_step({"w": double([[1, 1], [4, 0]]), "unconstrained": double(0.0)}, loss_grads)
    torch.testing.assert_close(seen[0], double([[0.5, 0.5], [1, 0]]), rtol=1e-7, atol=0)
    assert reference.radii == pytest.approx({"w": 1.01}, rel=1e-7)
    assert reference.adams["w"].m == pytest.approx(-0.1, rel=1e-7)
    assert reference.adams["w"].v == pytest.approx(0.001, rel=1e-7)
    torch.testing.assert_close(projected, {"w": double([[0.505, 0.505], [1.01, 0]])}, rtol=1e-7, atol=0)

    reference.after_step({"w": double([[0.1, 0], [0.2, 0]])}, loss_grads)  # the clamp pulls the radius to 0.2
    torch.testing.assert_close(seen[1], double([[0.1, 0], [0.2, 0]]), rtol=1e-6, atol=0)
    assert reference.radii == pytest.approx({"w": 0.2}, rel=1e-12)


def test_tpgm_when_updates_are_due() -> None:
    """Steps 1, 4, 7 of seven, twice each; the projection happens on every step."""
    calls = []
    reference = ReferenceTPGM({"w": torch.zeros(3)}, norm="l2", radius_steps=2, every_n_steps=3)

    def loss_grads(projected: dict[str, Tensor]) -> dict[str, Tensor | None]:
        calls.append((reference.steps, reference.radii["w"]))
        return {"w": projected["w"]}  # positive gradient: the radius shrinks

    for _ in range(7):
        projected = reference.after_step({"w": double([3, 0, 4])}, loss_grads)
        assert distance_rows(projected["w"], "l2") == pytest.approx([reference.radii["w"]], rel=1e-7)
    assert [step for step, _ in calls] == [1, 1, 4, 4, 7, 7]
    assert [radius for _, radius in calls] == sorted({radius for _, radius in calls}, reverse=True)
    assert reference.adams["w"].t == 6


def test_tpgm_unmoved_and_unused_tensors() -> None:
    reference = ReferenceTPGM({"unmoved": torch.ones(2, 2), "unused": torch.zeros(2)})
    weights = {"unmoved": torch.ones(2, 2), "unused": torch.ones(2)}
    projected = reference.after_step(weights, lambda projected: {"unmoved": torch.ones(2, 2), "unused": None})
    assert torch.equal(projected["unmoved"], weights["unmoved"].double())
    assert reference.radii == pytest.approx({"unmoved": math.nan, "unused": 1.0}, abs=0, nan_ok=True)


# --- FTP ---


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ftp_radius_gradient_equals_autograd(shape: tuple[int, ...], norm: str) -> None:
    """With every row outside the ball, it is the derivative of the loss through the previous projection."""
    anchor, weight, grad = randn(*shape), randn(*shape, seed=1), randn(*shape, seed=2)
    radius = double(0.5 * min(distance_rows(weight - anchor, norm))).requires_grad_()
    (vectorised_projection(anchor, weight, radius, norm) * grad).sum().backward()
    assert ftp_radius_gradient(grad, weight - anchor, norm) == pytest.approx(radius.grad.item(), rel=1e-10)


def test_ftp_keeps_inactive_rows() -> None:
    assert ftp_radius_gradient(double([[1, 0], [0, 1]]), double([[1e-3, 0], [0, 9]]), "mars") == pytest.approx(
        2, rel=1e-4
    )


@pytest.mark.parametrize(("k", "sign", "change"), [(1.0, 1, -1), (0.0, 1, 0), (1.0, -1, 1), (0.0, -1, 1)])
def test_ftp_k_scales_only_shrinking(k: float, sign: int, change: int) -> None:
    """Step 1 snaps to the anchor; the first update is corrected with t = 2: 1 - 0.9**2 and 1 - 0.999**2."""
    reference = ReferenceFTP({"w": torch.zeros(2)}, k=k)
    weights = {"w": double([1.0, 1.0]), "unconstrained": double(0.0)}
    projected = reference.after_step(weights, {"w": double([9.0, 9.0])})
    assert reference.radii["w"] == 1e-8
    assert projected["w"].abs().max() < 1e-8
    assert list(projected) == ["w"]

    reference.radii["w"] = 0.5
    reference.after_step(weights, {"w": sign * double([1.0, 3.0])})
    update = 0.01 * (0.1 / 0.19) / math.sqrt(0.001 / 0.001999)
    assert reference.radii["w"] == pytest.approx(0.5 + change * update, rel=1e-6)
    assert reference.adams["w"].t == 2


def test_ftp_uses_the_unprojected_deviation() -> None:
    reference = ReferenceFTP({"w": torch.zeros(2)})
    reference.after_step({"w": double([3.0, 0.0])}, {"w": double([1.0, 1.0])})
    reference.after_step({"w": double([0.0, 1e-3])}, {"w": double([-2.0, 7.0])})
    assert reference.adams["w"].m == pytest.approx(0.1 * -2.0, rel=1e-6)
    assert reference.radii["w"] == pytest.approx(1e-3 + 1e-8, rel=1e-12), "clamped to the new distance + 1e-8"


# --- recorded runs ---


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The recordings were made on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch_loss(model: ParityModel, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return cross_entropy(model(images.to(model.fc.weight.dtype)), labels)


def replay(recording: Recording, dtype: torch.dtype) -> tuple[Tensor, ParityModel]:
    """Train as the recording was made, the reference doing the projection: radii after each step, final model."""
    model = recording.model().to(dtype)
    parameters = {name: dict(model.named_parameters())[name] for name in recording.names}
    settings = recording.settings
    if "radius_lr" in settings:
        tpgm = ReferenceTPGM(
            recording.anchors, settings["norm"], settings["radius_lr"], settings["iters"], settings["freq"]
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"], momentum=0.9)
    else:
        ftp = ReferenceFTP(recording.anchors, k=settings["k"])
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings["opt_lr"],
            momentum=settings["opt_momentum"],
            nesterov=settings["opt_nesterov"],
        )
    heldout: list[tuple[Tensor, Tensor]] = []

    def write(weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)

    def loss_grads(projected: dict[str, Tensor]) -> dict[str, Tensor | None]:
        heldout.extend([] if heldout else recording.heldout_batches())
        write(projected)
        model.eval()
        gradients = torch.autograd.grad(batch_loss(model, heldout.pop(0)), list(parameters.values()))
        model.train()
        return dict(zip(parameters, gradients, strict=True))

    radii = []
    for batch in recording.train_batches():
        optimizer.zero_grad()
        batch_loss(model, batch).backward()
        optimizer.step()
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        if "radius_lr" in settings:
            write(tpgm.after_step(weights, loss_grads))
            radii.append([tpgm.radii[name] for name in recording.names])
        else:
            write(ftp.after_step(weights, {name: parameter.grad for name, parameter in parameters.items()}))
            radii.append([ftp.radii[name] for name in recording.names])
    return double(radii), model


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("file", "steps"), [("tpgm_mars.npz", 24), ("ftp_sgd_k1.npz", 30)])
def test_reference_follows_the_recording(file: str, steps: int, dtype: torch.dtype) -> None:
    recording = load_recording(file)
    radii, model = replay(recording, dtype)
    assert radii.shape == (steps, 9)
    torch.testing.assert_close(radii, recording.radii.double(), rtol=1e-5, atol=1e-6)
    final = {name: value.to(recording.final[name].dtype) for name, value in model.state_dict().items()}
    torch.testing.assert_close(final, recording.final, rtol=1e-5, atol=1e-6)


# --- DiGraP ---

HESSIAN = torch.diag(double([1.0, 4.0, 0.5]))
MINIMUM = double([1.0, -1.0, 2.0])


def quadratic(weight: Tensor) -> float:
    return 0.5 * float((weight - MINIMUM) @ HESSIAN @ (weight - MINIMUM))


def quadratic_grad(weight: Tensor) -> Tensor:
    return HESSIAN @ (weight - MINIMUM)


@pytest.mark.parametrize("lr", [0.1, 1.5])
def test_omega_derivative_equals_finite_difference(lr: float) -> None:
    """The derivative of Loss(W_t) by omega_(t-1), with W_t = W_(t-1) - lr (g - omega g_proj).

    Once for a short step and once for one that overshoots.
    """
    anchor, weight, omega, h = double([0.0, 0.0, 0.0]), double([0.5, 0.1, 0.3]), 0.3, 1e-4
    grad = quadratic_grad(weight)
    removed = gradient_projection(grad, weight - anchor)
    assert inner(grad, weight - anchor) < 0

    def stepped(omega: float) -> Tensor:
        return weight - lr * (grad - omega * removed)

    expected = (quadratic(stepped(omega + h)) - quadratic(stepped(omega - h))) / (2 * h)
    next_grad = quadratic_grad(stepped(omega))
    assert omega_derivative(next_grad, removed, lr) == pytest.approx(expected, rel=1e-8)
    normalised = omega_gradient(next_grad, removed, lr)
    assert normalised == pytest.approx(expected / float(next_grad.norm() * removed.norm()), rel=1e-8)


def test_gradient_projection_by_hand() -> None:
    assert torch.equal(gradient_projection(double([-3.0, 5.0]), double([2.0, 0.0])), double([-3.0, 0.0]))
    assert torch.equal(gradient_projection(double([-3.0, 5.0]), double([0.0, 0.0])), double([0.0, 0.0]))


def test_digrap_by_hand() -> None:
    """Only conflicts change the gradient; omega rises when the last step overshot, never below 0, and fades to 1."""
    reference = ReferenceDiGraP({"w": torch.zeros(2)}, omega_lr=0.25)

    def change(weight: list[float], grad: list[float]) -> list[float]:
        return reference.change_gradients({"w": double(weight)}, {"w": double(grad)}, lr=0.1)["w"].tolist()

    assert change([2, 0], [-3, 5]) == [-3, 5], "omega is 0 on step 1"
    assert change([2, 0], [-3, 5]) == [-3, 5], "the step was good: omega would fall, stays at 0"
    assert reference.omegas["w"] == 0
    assert reference.adams["w"].m == pytest.approx(0.1 * 0.1 * 3 / math.sqrt(34), rel=1e-12)

    reference = ReferenceDiGraP({"w": torch.zeros(2)}, omega_lr=0.25)
    change([2, 0], [-3, 5])
    assert change([2, 0], [3, 5]) == [3, 5], "no conflict"
    assert reference.omegas["w"] == pytest.approx(0.25, rel=1e-5), "the step overshot: omega rises by Adam's first step"
    omega = reference.omegas["w"]
    change([-2, 0], [3, 5])
    m, v = 0.09 * -0.1 * 3 / math.sqrt(34), 0.000999 * (0.1 * 3 / math.sqrt(34)) ** 2
    assert reference.adams["w"].m == pytest.approx(m, rel=1e-12), "after a step without conflict the gradient is 0"
    assert reference.adams["w"].v == pytest.approx(v, rel=1e-12)
    assert reference.omegas["w"] > omega

    reference.omegas["w"], reference.adams["w"].m = 0.9, -1e3
    assert change([2, 0], [-3, 5]) == [0, 5], "omega is clipped to 1: nothing is left along the deviation"
    assert reference.omegas["w"] == 1


def test_digrap_uses_the_previous_learning_rate() -> None:
    reference = ReferenceDiGraP({"w": torch.zeros(1)})
    for lr in (0.5, 0.125):
        reference.change_gradients({"w": double([1.0])}, {"w": double([-1.0])}, lr=lr)
    assert reference.adams["w"].m == pytest.approx(0.1 * 0.5, rel=1e-12)


# --- SPD, L2-SP and WiSE-FT ---


@pytest.mark.parametrize(
    ("previous", "weight", "grad", "expected"),
    [
        ([3, 4], [6, 8], [1, 1], [6 * 0.75, 8 * 0.75]),  # distance 5 -> 10: rho 0.5, lambda 0.5
        ([3, 4], [6, 8], [-1, -1], [6, 8]),  # the condition does not hold
        ([6, 8], [3, 4], [1, 1], [3, 4]),  # the distance fell: rho is 0
        ([0, 0], [6, 8], [1, 1], [6, 8]),  # <g, 0> is not positive
        ([3, 4], [0, 0], [1, 1], [0, 0]),  # back at the anchor
        ([3, 4], [6, 8], None, [6, 8]),
    ],
)
def test_spd_by_hand(
    previous: list[float], weight: list[float], grad: list[float] | None, expected: list[float]
) -> None:
    anchor = double([100.0, 200.0])
    reference = ReferenceSPD({"w": anchor}, decay=0.5)
    decayed = reference.after_step(
        {"w": anchor + double(previous)}, {"w": anchor + double(weight)}, {"w": None if grad is None else double(grad)}
    )
    torch.testing.assert_close(decayed, {"w": anchor + double(expected)}, rtol=1e-14, atol=0)


def test_l2sp_adds_the_gradient_of_its_penalty() -> None:
    anchor, weight, grad = randn(3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2)
    variable = weight.clone().requires_grad_()
    (penalty_grad,) = torch.autograd.grad(0.3 / 2 * (variable - anchor).square().sum(), variable)
    reference = ReferenceL2SP({"w": anchor}, decay=0.3)
    torch.testing.assert_close(reference.change_gradients({"w": weight}, {"w": grad}), {"w": grad + penalty_grad})
    assert reference.change_gradients({"w": weight}, {"w": None}) == {"w": None}


def test_wise_ft_mixes_floating_tensors_with_an_anchor() -> None:
    anchor = {"w": double([1.0, 2.0]), "running_mean": torch.tensor([0.0]), "count": torch.tensor(3)}
    weights = {
        "w": double([3.0, 10.0]),
        "running_mean": torch.tensor([4.0]),
        "count": torch.tensor(9),
        "head": double(7.0),
    }
    mixed = wise_ft(anchor, weights, alpha=0.25)
    expected = {"w": double([1.5, 4.0]), "running_mean": double([1.0]), "count": torch.tensor(9), "head": double(7.0)}
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0)
