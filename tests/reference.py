"""Slow, literal float64 twins of the methods: the judge of the package's fast code.

They import nothing of the package. Every tensor is cut into rows, every row is treated by itself in a Python loop,
every scalar (radius, omega, Adam moment) is a Python float, and every value is paired by parameter name.

Notation: anchor W0, weight W, deviation D = W - W0, distance n, radius gamma, ratio r, projected weight W0 + r D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-8  # added to a distance before dividing by it
RADIUS_MIN = 1e-8  # smallest legal radius

Tensors = dict[str, Tensor]
LossGrads = Callable[[Tensors], dict[str, Tensor | None]]


# --- rows and projection ---


def rows(tensor: Tensor, norm: str) -> list[Tensor]:
    """Cut a tensor into the flat float64 rows that `norm` measures.

    `l2` has one row, the whole tensor. `mars` has one row per index of the first dimension; a tensor of one or zero
    dimensions is one row.
    """
    if norm == "l2" or tensor.dim() <= 1:
        return [tensor.double().flatten()]
    return [tensor[i].double().flatten() for i in range(tensor.shape[0])]


def distance_rows(deviation: Tensor, norm: str) -> list[float]:
    """The distance n of every row: sum of absolute values (`mars`) or Frobenius norm (`l2`)."""
    distances = []
    for row in rows(deviation, norm):
        if norm == "mars":
            distances.append(sum(abs(x) for x in row.tolist()))
        else:
            distances.append(math.sqrt(sum(x * x for x in row.tolist())))
    return distances


def ratio_rows(deviation: Tensor, radius: float, norm: str) -> list[float]:
    """The ratio r = clip(gamma / (n + eps), 0, 1) of every row."""
    return [min(max(radius / (n + EPS), 0.0), 1.0) for n in distance_rows(deviation, norm)]


def project(anchor: Tensor, weight: Tensor, radius: float, norm: str) -> Tensor:
    """The projected weight W0 + r D, in float64 and of the weight's shape."""
    deviation = weight.double() - anchor.double()
    ratios = ratio_rows(deviation, radius, norm)
    shrunk = [r * row for r, row in zip(ratios, rows(deviation, norm), strict=True)]
    return anchor.double() + torch.cat(shrunk).reshape(deviation.shape)


def clamp_radius(radius: float, largest_distance: float) -> float:
    """Clamp a radius to [1e-8, largest distance]; the upper bound wins where the tensor has (almost) not moved."""
    return min(max(radius, RADIUS_MIN), largest_distance)


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product <a, b> over all elements, in float64."""
    return float((a.double() * b.double()).sum())


# --- Adam ---


@dataclass
class ScalarAdam:
    """Adam for one scalar: betas 0.9 / 0.999, eps 1e-8."""

    lr: float
    m: float = 0.0
    v: float = 0.0
    t: int = 0

    def step(self, value: float, gradient: float, rate: float | None = None) -> float:
        """The value after one step; `t` may be set beforehand to move the bias correction.

        With a rate of its own the first moment is not corrected for its start at zero, and eps is next to nothing.
        """
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m_hat = self.m / (1 - 0.9**self.t)
        v_hat = self.v / (1 - 0.999**self.t)
        if rate is not None:
            return value - rate * self.m / (math.sqrt(v_hat) + 1e-20)
        return value - self.lr * m_hat / (math.sqrt(v_hat) + 1e-8)


@dataclass
class Pace:
    """How far an optimizer step carries a tensor: the mean of |n - n'|, an older step counting 0.95 of the next one.

    n is the largest distance after the step, n' that after the projection before it. The first step has none before it.
    """

    total: float = 0.0
    weight: float = 0.0
    projected: float | None = None

    def follow(self, largest: float) -> None:
        """A step has been taken."""
        if self.projected is not None:
            self.total = 0.95 * self.total + abs(largest - self.projected)
            self.weight = 0.95 * self.weight + 1

    @property
    def mean(self) -> float:
        """0 before the second step."""
        return self.total / self.weight if self.weight else 0.0


# --- TPGM ---


def radius_gradient(
    loss_grad: Tensor, deviation: Tensor, radius: float, norm: str, boundary_dtype: torch.dtype = torch.float64
) -> float:
    """dLoss/dgamma = sum over rows with 0 < gamma / (n + eps) < 1 of <G_row, D_row> / (n_row + eps).

    Args:
        loss_grad: G, the gradient of the held-out loss with respect to the projected weight.
        deviation: D, before projection, of the same shape.
        radius: gamma.
        norm: `mars` or `l2`.
        boundary_dtype: Precision in which 0 < gamma / (n + eps) < 1 is decided. It matters for a radius clamped to its
            own row's distance: in float32 the ratio n / (n + 1e-8) rounds to 1 from n = 0.25 on, and the row drops out;
            in float64 it stays below 1 and the row counts. Judge float32 code with torch.float32.
    """
    total = 0.0
    distances = distance_rows(deviation, norm)
    for n, g_row, d_row in zip(distances, rows(loss_grad, norm), rows(deviation, norm), strict=True):
        ratio = torch.tensor(radius, dtype=boundary_dtype) / (torch.tensor(n, dtype=boundary_dtype) + EPS)
        if 0 < ratio < 1:
            total += inner(g_row, d_row) / (n + EPS)
    return total


class ReferenceTPGM:
    """Trainable Projected Gradient Method: held-out data move the radii, every step is projected.

    Attributes:
        radii: Radius of every tensor, empty before the first step; nan of one that has not moved yet.
        adams: Adam state (m, v, t) of every radius.
        steps: Optimizer steps seen.
    """

    def __init__(
        self,
        anchors: Tensors,
        norm: str = "mars",
        radius_lr: float | str = 1e-2,
        radius_steps: int = 1,
        every_n_steps: int = 1,
        boundary_dtype: torch.dtype = torch.float64,
        at_end: bool = False,
    ) -> None:
        self.anchors = {name: anchor.detach().double().clone() for name, anchor in anchors.items()}
        self.norm = norm
        self.radius_steps = radius_steps
        self.every_n_steps = every_n_steps
        self.boundary_dtype = boundary_dtype
        self.at_end = at_end
        self.radii: dict[str, float] = {}
        self.auto = radius_lr == "auto"
        self.adams = {name: ScalarAdam(math.nan if self.auto else float(radius_lr)) for name in anchors}
        self.paces = {name: Pace() for name in anchors}
        self.steps = 0

    def after_step(self, weights: Tensors, loss_grads: LossGrads) -> Tensors:
        """What TPGM does after one optimizer step.

        Args:
            weights: W by name; names that have no anchor are ignored.
            loss_grads: Maps the projected weights to dLoss/dW of the next held-out batch there (None for a tensor that
                the loss does not use). Called once per radius step, on steps 1, 1 + every_n_steps, ...

        Returns:
            The projected weights of all anchored tensors, in float64.
        """
        self.steps += 1
        deviations = {name: weights[name].detach().double() - self.anchors[name] for name in self.anchors}
        distances = {name: distance_rows(deviations[name], self.norm) for name in self.anchors}
        for name in self.anchors:
            if math.isnan(self.radii.setdefault(name, math.nan)) and max(distances[name]) > 0:
                self.radii[name] = min(distances[name]) / 2
        for name, pace in self.paces.items():
            pace.follow(max(distances[name]))

        if (self.steps - 1) % self.every_n_steps == 0:
            for _ in range(self.radius_steps):
                self._clamp(distances)
                gradients = loss_grads(self._project(weights))
                for name in self.anchors:
                    loss_grad = gradients[name]
                    if loss_grad is None or math.isnan(self.radii[name]):
                        continue  # the radius has no gradient either
                    gradient = radius_gradient(
                        loss_grad, deviations[name], self.radii[name], self.norm, self.boundary_dtype
                    )
                    rate = self._rate(name, distances) if self.auto else None
                    radius = self.adams[name].step(self.radii[name], gradient, rate)
                    if self.auto and not self.at_end:
                        radius = min(radius, self._limit(name))
                    self.radii[name] = radius

        self._clamp(distances)
        for name, pace in self.paces.items():
            largest = max(distances[name])
            pace.projected = min(1.0, self.radii[name] / (largest + EPS)) * largest  # 1 if the radius is nan
        return self._project(weights)

    def _rate(self, name: str, distances: dict[str, list[float]]) -> float:
        """Half of what the optimizer carried the tensor for each update; at the end all of it."""
        if self.at_end:
            return max(distances[name]) / self.radius_steps
        return 0.5 * self.paces[name].mean * self.every_n_steps / self.radius_steps

    def _limit(self, name: str) -> float:
        """In four steps half as much again, but a tenth of a step it may always become."""
        steps = self.every_n_steps / self.radius_steps
        return max(1.5 ** (min(steps, 100) / 4) * self.radii[name], 0.1 * self.paces[name].mean)

    def _clamp(self, distances: dict[str, list[float]]) -> None:
        for name, radius in self.radii.items():
            if not math.isnan(radius):
                self.radii[name] = clamp_radius(radius, max(distances[name]))

    def _project(self, weights: Tensors) -> Tensors:
        bounds = {name: math.inf if math.isnan(radius) else radius for name, radius in self.radii.items()}
        return {
            name: project(anchor, weights[name].detach(), bounds[name], self.norm)
            for name, anchor in self.anchors.items()
        }


# --- FTP ---


def ftp_radius_gradient(grad: Tensor, previous_deviation: Tensor, norm: str) -> float:
    """The sum over all rows of <g_t, c_(t-1)> / n_(t-1), n being the row norm + 1e-8; no row is left out."""
    total = 0.0
    distances = distance_rows(previous_deviation, norm)
    for n, g_row, c_row in zip(distances, rows(grad, norm), rows(previous_deviation, norm), strict=True):
        total += inner(g_row, c_row) / (n + EPS)
    return total


class ReferenceFTP:
    """Fast Trainable Projection: the next training gradient moves the radii.

    Attributes:
        radii: Radius of every tensor, empty before the first step.
        adams: Adam state (m, v, t) of every radius; t is the optimizer's step count.
        previous_deviations: Unprojected deviation c of the last step.
        steps: Optimizer steps seen.
    """

    def __init__(self, anchors: Tensors, k: float = 1.0, radius_lr: float | str = 1e-2, norm: str = "mars") -> None:
        self.anchors = {name: anchor.detach().double().clone() for name, anchor in anchors.items()}
        self.k = k
        self.norm = norm
        self.radii: dict[str, float] = {}
        self.auto = radius_lr == "auto"
        self.adams = {name: ScalarAdam(math.nan if self.auto else float(radius_lr)) for name in anchors}
        self.paces = {name: Pace() for name in anchors}
        self.previous_deviations: Tensors = {}
        self.steps = 0

    def after_step(self, weights: Tensors, grads: dict[str, Tensor | None]) -> Tensors:
        """What FTP does in one optimizer step.

        Args:
            weights: W by name, right after the optimizer's step; names that have no anchor are ignored.
            grads: g_t by name, the gradient that this step used; a tensor with None was not stepped and is left alone.

        Returns:
            The projected weights of all anchored tensors, in float64.
        """
        self.steps += 1
        projected = {}
        for name, anchor in self.anchors.items():
            adam, pace, grad = self.adams[name], self.paces[name], grads[name]
            if grad is None:
                projected[name] = weights[name].detach().double()
                self.radii.setdefault(name, 0.0)
                continue
            deviation = weights[name].detach().double() - anchor
            largest = max(distance_rows(deviation, self.norm))
            pace.follow(largest)
            if name not in self.previous_deviations:
                self.radii[name] = RADIUS_MIN
                adam.t = 1  # the optimizer's count: the first update, on step 2, is corrected with t = 2
            else:
                gradient = ftp_radius_gradient(grad.detach(), self.previous_deviations[name], self.norm)
                if gradient > 0:  # the radius would shrink
                    gradient *= self.k
                self.radii[name] = adam.step(self.radii[name], gradient, 0.5 * pace.mean if self.auto else None)

            self.radii[name] = clamp_radius(self.radii[name], largest + EPS)
            pace.projected = min(self.radii[name] / (largest + EPS), 1.0) * largest
            self.previous_deviations[name] = deviation
            projected[name] = project(anchor, weights[name].detach(), self.radii[name], self.norm)
        return projected


# --- DiGraP ---


def gradient_projection(grad: Tensor, deviation: Tensor) -> Tensor:
    """g_proj = (<g, D> / ||D||^2) D: the part of the gradient along the deviation; 0 where D is 0."""
    squared = inner(deviation, deviation)
    if squared == 0:
        return torch.zeros_like(deviation, dtype=torch.float64)
    return inner(grad, deviation) / squared * deviation.double()


def omega_derivative(grad: Tensor, previous_removed: Tensor, previous_lr: float) -> float:
    """dLoss(W_t) / domega_(t-1) = lr_(t-1) <g_t, g_proj_(t-1)>, for a plain gradient step.

    W_t = W_(t-1) - lr_(t-1) (g_(t-1) - omega_(t-1) g_proj_(t-1)), hence dW_t / domega_(t-1) = + lr_(t-1) g_proj_(t-1),
    and g_t is the gradient of the loss at W_t. Without a conflict at step t-1, W_t does not depend on omega_(t-1) and
    the derivative is 0: `previous_removed` is g_proj_(t-1) on conflict and 0 otherwise.
    """
    return previous_lr * inner(grad, previous_removed)


def omega_gradient(grad: Tensor, previous_removed: Tensor, previous_lr: float) -> float:
    """The normalised `omega_derivative`: lr_(t-1) times the cosine of g_t and g_proj_(t-1); 0 where either is 0.

    The method's description leaves the normalisation open. Here the two norms divide out and the learning rate stays,
    so the sign is that of the derivative; to Adam, scale matters only through its changes over time.
    """
    norms = math.sqrt(inner(grad, grad)) * math.sqrt(inner(previous_removed, previous_removed))
    return omega_derivative(grad, previous_removed, previous_lr) / norms if norms > 0 else 0.0


class ReferenceDiGraP:
    """Directional Gradient Projection: takes a learned part of the outward direction out of the gradient.

    Attributes:
        omegas: Strength in [0, 1] of every tensor.
        adams: Adam state (m, v, t) of every omega; t counts the updates, the first one being on step 2.
        previous_removed: g_proj of the last step on conflict, 0 otherwise.
        steps: Optimizer steps seen.
    """

    def __init__(self, anchors: Tensors, omega_lr: float = 1e-2) -> None:
        self.anchors = {name: anchor.detach().double().clone() for name, anchor in anchors.items()}
        self.omegas = dict.fromkeys(anchors, 0.0)
        self.adams = {name: ScalarAdam(omega_lr) for name in anchors}
        self.previous_removed: Tensors = {}
        self.previous_lr = 0.0
        self.steps = 0

    def change_gradients(self, weights: Tensors, grads: Tensors, lr: float) -> Tensors:
        """The gradients that the optimizer should use instead of `grads`.

        Args:
            weights: W by name, before the step: where `grads` were taken.
            grads: g by name.
            lr: Learning rate that the optimizer is about to use.
        """
        self.steps += 1
        changed = {}
        for name, anchor in self.anchors.items():
            grad = grads[name].detach().double()
            deviation = weights[name].detach().double() - anchor
            if self.steps > 1:
                gradient = omega_gradient(grad, self.previous_removed[name], self.previous_lr)
                omega = self.adams[name].step(self.omegas[name], gradient)
                self.omegas[name] = min(max(omega, 0.0), 1.0)

            conflict = inner(grad, deviation) < 0  # a step along -g would increase the distance
            removed = gradient_projection(grad, deviation) if conflict else torch.zeros_like(grad)
            changed[name] = grad - self.omegas[name] * removed
            self.previous_removed[name] = removed
        self.previous_lr = lr
        return changed


# --- SPD, L2-SP and WiSE-FT ---


class ReferenceSPD:
    """Selective Projection Decay: W - lambda rho D after a step with <g, D_prev> > 0.

    All norms are Frobenius norms of the whole tensor.
    """

    def __init__(self, anchors: Tensors, decay: float) -> None:
        self.anchors = {name: anchor.detach().double().clone() for name, anchor in anchors.items()}
        self.decay = decay

    def after_step(self, previous_weights: Tensors, weights: Tensors, grads: dict[str, Tensor | None]) -> Tensors:
        """The decayed weights, given the weights before and after the step and the gradient that the step used."""
        decayed = {}
        for name, anchor in self.anchors.items():
            before = previous_weights[name].detach().double() - anchor
            after = weights[name].detach().double() - anchor
            grad = grads[name]
            n_before = math.sqrt(inner(before, before))
            n_after = math.sqrt(inner(after, after))
            rho = 0.0
            if grad is not None and inner(grad, before) > 0 and n_after > 0:
                rho = min(max((n_after - n_before) / n_after, 0.0), 1.0)
            decayed[name] = weights[name].detach().double() - self.decay * rho * after
        return decayed


class ReferenceL2SP:
    """L2-SP: adds the gradient of lambda / 2 ||W - W0||^2."""

    def __init__(self, anchors: Tensors, decay: float) -> None:
        self.anchors = {name: anchor.detach().double().clone() for name, anchor in anchors.items()}
        self.decay = decay

    def change_gradients(self, weights: Tensors, grads: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The gradients g + lambda D; a gradient of None stays None: the optimizer leaves that tensor alone."""
        changed: dict[str, Tensor | None] = {}
        for name, anchor in self.anchors.items():
            grad = grads[name]
            penalty = self.decay * (weights[name].detach().double() - anchor)
            changed[name] = None if grad is None else grad.detach().double() + penalty
        return changed


def wise_ft(anchor: Tensors, weights: Tensors, alpha: float) -> Tensors:
    """WiSE-FT: W0 + alpha (W - W0) for every floating-point tensor that has an anchor; all others keep their value."""
    mixed = {}
    for name, weight in weights.items():
        if name in anchor and weight.is_floating_point():
            mixed[name] = anchor[name].double() + alpha * (weight.double() - anchor[name].double())
        else:
            mixed[name] = weight.clone()
    return mixed
