"""What is compared: every method with the grid of settings that it is tried with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Callback

from lightning_tpgm import DiGraPCallback, FTPCallback, L2SPCallback, SPDCallback, TPGMCallback

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))


@dataclass(frozen=True)
class Method:
    """A method and its grid, the most constrained setting first: among equals the first is chosen.

    Attributes:
        name: As in the tables.
        grid: Settings: the arguments of `callback`, or of the special case in `benchmark.py`.
        callback: Makes the callback that is added to plain fine-tuning; None: a special case.
    """

    name: str
    grid: tuple[Mapping[str, Any], ...] = ({},)
    callback: Callable[..., Callback] | None = None

    def first(self) -> Method:
        """The method with only the first setting of its grid; WiSE-FT keeps its curve, which needs no training."""
        return self if self.name == "WiSE-FT" else replace(self, grid=self.grid[:1])


def over(**values: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """A grid over one argument.

    >>> over(k=(1, 0))
    ({'k': 1}, {'k': 0})
    """
    ((name, options),) = values.items()
    return tuple({name: option} for option in options)


def ema(decay: float) -> Callback:
    """Lightning's moving average of the weights, which came with lightning 2.6."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return EMAWeightAveraging(decay=decay)


@dataclass(frozen=True)
class Fixed:
    """A setting that is reported whatever is chosen.

    Attributes:
        name: As in the tables.
        method: The method whose grid it is in.
        settings: The setting.
    """

    name: str
    method: str
    settings: Mapping[str, Any]


RADII: tuple[dict[str, Any], ...] = (
    {"radius_lr": 0.01, "radius_steps": 1},
    {"radius_lr": 0.01, "radius_steps": 2},
    {"radius_lr": 0.1, "radius_steps": 1},
)
PRETRAINED = Method("pretrained")
PLAIN = Method("plain fine-tuning")  # its learning rate is chosen by the suite's grid, before all others
LINEAR_PROBE = Method("linear probe", over(probe_lr=(1e-3, 1e-2)))
LP_FT = Method("LP-FT")
WISE_FT = Method("WiSE-FT", over(alpha=ALPHAS))
POST_HOC = Method("TPGM after the fact, l2", over(radius_steps=(50, 200)))
METHODS = (
    PRETRAINED,
    PLAIN,
    LINEAR_PROBE,
    LP_FT,
    Method("EMA", over(decay=(0.98, 0.9)), ema),
    Method("L2-SP", over(strength=(1.0, 0.1, 0.01)), L2SPCallback),
    WISE_FT,
    Method("SPD", over(strength=(1.0, 0.3)), SPDCallback),
    Method("DiGraP", over(omega_lr=(0.1, 0.01)), DiGraPCallback),
    Method("FTP", over(k=(1.0, 0.5, 0.0)), FTPCallback),
    Method("TPGM, mars", tuple({"norm": "mars", **setting} for setting in RADII), TPGMCallback),
    Method("TPGM, l2", tuple({"norm": "l2", **setting} for setting in RADII), TPGMCallback),
    POST_HOC,
)
FIXED = (
    Fixed("TPGM, mars, radius_lr 0.01", "TPGM, mars", {"norm": "mars", "radius_lr": 0.01, "radius_steps": 1}),
    Fixed("TPGM, mars, radius_lr 0.1", "TPGM, mars", {"norm": "mars", "radius_lr": 0.1, "radius_steps": 1}),
    Fixed("TPGM after the fact, 200 steps", POST_HOC.name, {"radius_steps": 200}),
)

ELSEWHERE = (
    PLAIN,
    Method("L2-SP", ({"strength": 0.1},), L2SPCallback),
    Method(WISE_FT.name, ({"alpha": 0.6},)),
    Method("FTP", ({"k": 1.0},), FTPCallback),
    Method("TPGM, mars", ({"norm": "mars", "radius_lr": 0.1, "radius_steps": 1},), TPGMCallback),
    Method(POST_HOC.name, ({"radius_steps": 200},)),
)
"""What is compared under other conditions, at these fixed settings."""
