"""What the methods with a learned radius per tensor share: the ball around the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_tpgm.anchor import AnchorDevice, Pretrained
from lightning_tpgm.blocks import Blocks, fused_blocks
from lightning_tpgm.callbacks.base import AnchoredCallback, check, is_number, unfreezes
from lightning_tpgm.callbacks.observed import Log
from lightning_tpgm.framework import MisconfigurationException, callbacks_of, pl, rank_zero_warn
from lightning_tpgm.layout import Matrices
from lightning_tpgm.norms import NORMS, Norm
from lightning_tpgm.projection import ratio, safe_ratio
from lightning_tpgm.radii import Radii
from lightning_tpgm.sharding import reshard


class RadiusCallback(AnchoredCallback):
    """Base of the methods that learn a radius per tensor and keep each weight inside its ball.

    Args:
        radius_lr: Adam learning rate of the radii.
        norm: ``"mars"`` or ``"l2"``.
        exclude: See `AnchoredCallback`.
        pretrained: See `AnchoredCallback`.
        log: See `ObservedCallback`.
        summary: See `ObservedCallback`.
        anchor_device: See `AnchoredCallback`.
        compile: Whether the distances, projections and radius gradients are compiled.
    """

    def __init__(
        self,
        radius_lr: float,
        norm: Norm,
        exclude: Sequence[str] = (),
        pretrained: Pretrained | None = None,
        log: Log = "summary",
        summary: bool = False,
        anchor_device: AnchorDevice = None,
        compile: bool = False,
    ) -> None:
        check(is_number(radius_lr) and radius_lr > 0, "radius_lr", "a positive number", radius_lr)
        check(norm in NORMS, "norm", f"one of {', '.join(map(repr, NORMS))}", norm)
        check(isinstance(compile, bool), "compile", "True or False", compile)
        super().__init__(exclude, pretrained, log, summary, anchor_device)
        self.radius_lr = radius_lr
        self.norm = norm
        self.compile = compile
        self.reset_method()

    def acts_after_steps(self) -> bool:
        """Whether the weights are projected after optimizer steps."""
        return True

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also refuses a second radius for the same parameters."""
        super().on_train_start(trainer, pl_module)
        self._check_alone(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Also refuses a second radius for parameters that join now."""
        known = len(self._parameters)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if len(self._parameters) > known:
            self._check_alone(trainer)

    def _check_alone(self, trainer: pl.Trainer) -> None:
        callbacks = callbacks_of(trainer)
        for other in callbacks[: callbacks.index(self)]:
            if isinstance(other, RadiusCallback) and other.acts_after_steps() and self.acts_after_steps():
                both = self._expected(trainer) & other._expected(trainer)
                if both:
                    raise MisconfigurationException(
                        f"{other!r} and {self!r} both learn a radius for {len(both)} parameters, {min(both)!r} among"
                        " them: each would take the other's projection for the optimizer's step. Exclude them in one."
                    )

    def _expected(self, trainer: pl.Trainer) -> set[str]:
        """The parameters that are constrained, and those that a finetuning callback may yet unfreeze."""
        return {*self._parameters, *(self._waiting if unfreezes(trainer) else ())}

    @property
    def radii(self) -> dict[str, float]:
        """The radius of each constrained parameter, by name; empty before the first fit, nan until it is first used."""
        return self._radii.as_dict()

    @property
    def distances(self) -> dict[str, float]:
        """The largest row distance of each constrained parameter after the last projection, by name."""
        return dict(zip(self._radii.names, self._distances.tolist(), strict=True))

    @override
    def quantities(self) -> dict[str, Tensor]:
        """Radius, distance, ratio and whether it binds, as after the last projection."""
        if not self._parameters:
            return {}
        if self._handles and not self.acts_after_steps():  # no radius yet
            return super().quantities()
        radius, reach = self._radii.value, self._reach
        binds = radius < reach
        ratios = torch.where(binds, ratio(radius, reach), 1)
        return {"radius": radius, "distance": self._distances, "ratio": ratios, "binds": binds}

    @override
    def quantities_are_at_hand(self) -> bool:
        """Every projection knows them."""
        return self.acts_after_steps()

    @override
    def growth(self) -> float:
        """Adam's step is at most about its learning rate."""
        return self.radius_lr

    @override
    def reset_method(self) -> None:
        """Forgets the radii."""
        self._radii = Radii(self.radius_lr)
        self._distances = self._reach = torch.empty(0)  # after and before the last projection

    @override
    def joined(self, names: list[str]) -> None:
        """Gives each new parameter a radius."""
        self._place_radii()
        self._radii.add(names)
        zeros = self._distances.new_zeros(len(names))
        self._distances, self._reach = torch.cat([self._distances, zeros]), torch.cat([self._reach, zeros])

    @override
    def method_state(self) -> dict[str, Any]:
        """Radii, their Adam state, and the last distances."""
        return {
            "radii": self._radii.state_dict(),
            "distances": self._distances.cpu(),
            "reach": self._reach.cpu(),
        }

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        """Takes over radii and Adam state."""
        self._radii.load_state_dict(state["radii"])
        self._distances = state["distances"]
        self._reach = state.get("reach", self._distances)  # older checkpoints have none
        self._place_radii()

    @override
    def _arrange(self) -> None:
        super()._arrange()
        self._row_sizes = self._sharding.distances(self._layout.norms(self._anchors))

    @override
    def _blocks_for(self, weights: list[Tensor]) -> Blocks:
        if self.compile and weights:
            try:
                return fused_blocks(weights[0].device.type)
            except Exception as error:  # noqa: BLE001  # whatever a compiler, or the lack of one, raises
                rank_zero_warn(
                    f"{type(self).__name__}: `compile` = True has no effect, torch.compile does not work here:"
                    f" {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                )
                self.compile = False
        return super()._blocks_for(weights)

    def _place_radii(self) -> None:
        self._radii.to(self._layout.scalar())
        self._distances, self._reach = self._distances.to(self._radii.value), self._reach.to(self._radii.value)

    def _measure(self, weights: Matrices, copies: Matrices | None = None) -> tuple[Tensor, Tensor]:
        """The distances of all rows of this process's parts, and the largest of each constrained tensor.

        The weights are copied on the way, if that is asked for.
        """
        if copies is None:
            parts = self._layout.distances(weights, self._anchors)
        else:
            parts = self._layout.copied_distances(weights, self._anchors, copies)
        distances = self._sharding.distances(parts)
        return distances, self._sharding.largest(self._layout.largest(distances))

    def _project(self, pl_module: nn.Module, weights: Matrices, distances: Tensor, moved: Sequence[bool]) -> None:
        """Write the projections of these weights into the parameters that were moved.

        The others are inside their balls; a write would invalidate graphs through them that are still in use.
        """
        reshard(pl_module)
        targets = [weight if written else None for weight, written in zip(self._weights, moved, strict=True)]
        bounds = self._layout.of_rows(self._radii.bounds)
        ratios = safe_ratio(bounds, distances, self._row_sizes, self._layout.roundoff)
        self._layout.project(targets, weights, self._anchors, ratios)

    def _projected(self, largest: Tensor, moved: Tensor) -> None:
        """Note the largest distances after a projection, from those before it, of the tensors that were moved."""
        self._reach = torch.where(moved, largest, self._reach)
        self._distances = ratio(self._radii.bounds, self._reach) * self._reach
