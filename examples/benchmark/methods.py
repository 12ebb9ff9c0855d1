"""What is compared: each method as it comes, and the settings that are tried for the tuned table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback

from leads import FROM_SWEEP, HALF, IDEAS, IN_TURN, LATER, LOSSES, MIXES, ONE_BY_ONE, ROTATING, lead_or_tpgm
from lightning_tpgm import FTPCallback, L2SPCallback

PLAIN, WISE_FT, EMA, L2_SP, FTP = "plain fine-tuning", "WiSE-FT", "EMA", "L2-SP", "FTP"
TPGM, TPGM_SWEEP, AFTER = "TPGM", "TPGM, then the sweep", "TPGM after the fact"
SHOWN = (PLAIN, EMA, L2_SP, WISE_FT, FTP, AFTER, TPGM, TPGM_SWEEP)
"""The rows of the tables. A fit of plain fine-tuning gives three of them, and one of TPGM two."""


def ema(decay: float = 0.98) -> Callback:
    """Lightning's moving average of the weights, which came with lightning 2.6."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return EMAWeightAveraging(decay=decay)


@dataclass(frozen=True)
class Method:
    """A fit: which callback is added to plain fine-tuning, and other settings of it than its own defaults."""

    name: str
    callback: Callable[..., Callback] | None = None
    others: tuple[Mapping[str, Any], ...] = ()
    constrains: bool = True


METHODS = (
    Method(PLAIN),
    Method(TPGM, lead_or_tpgm, ({"norm": "l2"},)),
    Method(FTP, FTPCallback, ({"k": 0.0},)),
    Method(L2_SP, L2SPCallback, ({"strength": 0.1}, {"strength": 1.0})),
    Method(EMA, ema, ({"decay": 0.9},), constrains=False),
)
FIXED_RATES = tuple({"radius_lr": rate} for rate in (0.001, 0.01, 0.1, 1.0))
"""Settings of TPGM that "auto" is compared with."""
CADENCES = tuple({"every_n_steps": steps} for steps in (1, 2, 8))
"""Settings of TPGM that its default of four is compared with."""
OTHER_LOSSES = tuple({"lead": loss} for loss in LOSSES)
"""Settings of TPGM: what its radii are learned from."""
OTHER_DATA = tuple({"lead": mix} for mix in MIXES)
"""Settings of TPGM: whether its radii are learned from training data, too."""
IN_TURN_OR_HALF = ({"lead": IN_TURN}, {"lead": HALF})
"""Settings of TPGM: training batches for every second update, or training data as half of the examples."""
TRIED = ((PLAIN, {"lead": FROM_SWEEP}), *((TPGM, {"lead": lead}) for lead in IDEAS))
"""Ideas that are not in the package."""
TRIED_LATER = (
    *((TPGM, {"lead": lead}) for lead in (*LATER, ROTATING)),
    *((PLAIN, {"lead": lead}) for lead in (FROM_SWEEP, ONE_BY_ONE)),
)
"""More of them."""
