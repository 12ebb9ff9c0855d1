"""Robust fine-tuning for PyTorch Lightning: callbacks that keep a model near its pretrained weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "DiGraPCallback",
    "FTPCallback",
    "L2SPCallback",
    "SPDCallback",
    "TPGMCallback",
    "WiSEFTCallback",
    "WiSEFTSweep",
    "project_checkpoint",
    "wise_ft_sweep",
]

if TYPE_CHECKING:
    from lightning_tpgm.callbacks.digrap import DiGraPCallback
    from lightning_tpgm.callbacks.ftp import FTPCallback
    from lightning_tpgm.callbacks.l2sp import L2SPCallback
    from lightning_tpgm.callbacks.spd import SPDCallback
    from lightning_tpgm.callbacks.tpgm import TPGMCallback
    from lightning_tpgm.callbacks.wise_ft import WiSEFTCallback, WiSEFTSweep, wise_ft_sweep
    from lightning_tpgm.post_hoc import project_checkpoint

_HOMES = {
    "DiGraPCallback": "callbacks.digrap",
    "FTPCallback": "callbacks.ftp",
    "L2SPCallback": "callbacks.l2sp",
    "SPDCallback": "callbacks.spd",
    "TPGMCallback": "callbacks.tpgm",
    "WiSEFTCallback": "callbacks.wise_ft",
    "WiSEFTSweep": "callbacks.wise_ft",
    "project_checkpoint": "post_hoc",
    "wise_ft_sweep": "callbacks.wise_ft",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: the tensor functions alone need no lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"lightning_tpgm.{_HOMES[name]}"), name)
    import_module("lightning_tpgm.framework").join_later_imports()  # a LightningCLI is about to look at its bases
    return found
