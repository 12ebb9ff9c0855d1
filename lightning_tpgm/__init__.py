"""Robust fine-tuning for PyTorch Lightning: callbacks that keep a model near its pretrained weights.

`constrain` and `lightning_tpgm.methods` do the same in any PyTorch loop, without Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "AnchorDecayCallback",
    "Constraint",
    "DiGraPCallback",
    "FTPCallback",
    "FreezeBatchNorm",
    "L2SPCallback",
    "SPDCallback",
    "TPGMCallback",
    "WiSEFTCallback",
    "WiSEFTSweep",
    "constrain",
    "project_checkpoint",
    "wise_ft_sweep",
]

if TYPE_CHECKING:
    from lightning_tpgm.callbacks.anchor_decay import AnchorDecayCallback
    from lightning_tpgm.callbacks.digrap import DiGraPCallback
    from lightning_tpgm.callbacks.freeze_batch_norm import FreezeBatchNorm
    from lightning_tpgm.callbacks.ftp import FTPCallback
    from lightning_tpgm.callbacks.l2sp import L2SPCallback
    from lightning_tpgm.callbacks.post_hoc import project_checkpoint
    from lightning_tpgm.callbacks.spd import SPDCallback
    from lightning_tpgm.callbacks.sweep import wise_ft_sweep
    from lightning_tpgm.callbacks.sweep_result import WiSEFTSweep
    from lightning_tpgm.callbacks.tpgm import TPGMCallback
    from lightning_tpgm.callbacks.wise_ft import WiSEFTCallback
    from lightning_tpgm.constraint import Constraint
    from lightning_tpgm.plain import constrain

_HOMES = {
    "AnchorDecayCallback": "callbacks.anchor_decay",
    "Constraint": "constraint",
    "DiGraPCallback": "callbacks.digrap",
    "FTPCallback": "callbacks.ftp",
    "FreezeBatchNorm": "callbacks.freeze_batch_norm",
    "L2SPCallback": "callbacks.l2sp",
    "SPDCallback": "callbacks.spd",
    "TPGMCallback": "callbacks.tpgm",
    "WiSEFTCallback": "callbacks.wise_ft",
    "WiSEFTSweep": "callbacks.sweep_result",
    "constrain": "plain",
    "project_checkpoint": "callbacks.post_hoc",
    "wise_ft_sweep": "callbacks.sweep",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: the methods and `constrain` need no Lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = f"lightning_tpgm.{_HOMES[name]}"
    found = getattr(import_module(home), name)
    if home.startswith("lightning_tpgm.callbacks."):  # a LightningCLI is about to look at its bases
        import_module("lightning_tpgm.callbacks.framework").join_later_imports()
    return found
