"""The arguments that all callbacks share: their types, and the checks of their values."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypedDict, get_args, get_type_hints

from torch import nn

from lightning_tpgm.anchors import AnchorDevice
from lightning_tpgm.callbacks.framework import MisconfigurationException
from lightning_tpgm.callbacks.logs import Log
from lightning_tpgm.methods.method import check
from lightning_tpgm.pretrained import Pretrained


class Shared(TypedDict, total=False):
    """Keyword arguments of every callback; `MethodCallback` explains them."""

    exclude: Sequence[str]
    pretrained: Pretrained | None
    log: Log
    summary: bool
    anchor_device: AnchorDevice


def write_out_shared(callback: type, constructor: Any, base: type) -> None:
    """Give a class whose constructor forwards ``**shared`` to its base a signature and a docstring with what that is.

    Editors read the annotation; help(), LightningCLI and notebooks read these two.
    """
    parameters = dict(inspect.signature(constructor).parameters)
    if parameters.pop("shared", None) is None:
        return
    types = get_type_hints(vars(base)["__init__"])
    shared = inspect.signature(base).parameters.values()
    written = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=types[p.name]) for p in shared]
    constructor.__signature__ = inspect.Signature([*parameters.values(), *written])
    if callback.__doc__ and base.__doc__:
        explained = base.__doc__.partition("    Args:\n")[2].rstrip() + "\n"
        callback.__doc__ = re.sub(r" {8}shared: .*\n", lambda _: explained, callback.__doc__)


@contextmanager
def configuration_errors() -> Iterator[None]:
    """Errors of the pure code become Lightning's `MisconfigurationException`, the message unchanged."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise MisconfigurationException(str(error)) from error


def check_shared(exclude: Any, pretrained: Any, log: Any, summary: Any, anchor_device: Any) -> None:
    """Raise Lightning's `MisconfigurationException` about a value that no fit could use."""
    patterns = isinstance(exclude, Sequence) and not isinstance(exclude, str)
    accepted = isinstance(pretrained, str | os.PathLike | Mapping | nn.Module | None)
    with configuration_errors():
        check(patterns and all(isinstance(p, str) for p in exclude), "exclude", "a sequence of patterns", exclude)
        check(accepted, "pretrained", "a path, a mapping of tensors by name, a module or None", pretrained)
        check(anchor_device in (None, "cpu"), "anchor_device", "None or 'cpu'", anchor_device)
        check(log in get_args(Log), "log", f"one of {get_args(Log)}", log)
        if summary and find_spec("rich") is None:
            raise ImportError("`summary` = True needs rich: pip install rich.")
