"""Robust fine-tuning for PyTorch Lightning: callbacks that keep a model near its pretrained weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TPGMCallback"]

if TYPE_CHECKING:
    from lightning_tpgm.callbacks.tpgm import TPGMCallback

_HOMES = {"TPGMCallback": "lightning_tpgm.callbacks.tpgm"}


def __getattr__(name: str) -> Any:
    """Import a callback when it is first asked for: the tensor functions alone need no lightning."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
