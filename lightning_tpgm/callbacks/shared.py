"""The arguments that all callbacks share: their types, and the checks of their values."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TypedDict, get_args, get_type_hints

import numpy as np
from torch import nn

from lightning_tpgm.anchors import AnchorDevice
from lightning_tpgm.callbacks.framework import MisconfigurationException
from lightning_tpgm.callbacks.logs import Log
from lightning_tpgm.methods.method import check, is_flag
from lightning_tpgm.pretrained import Pretrained
from lightning_tpgm.references import check_save_anchor
from lightning_tpgm.selection import check_patterns


class Shared(TypedDict, total=False):
    """Keyword arguments of every callback.

    Attributes:
        exclude: fnmatch patterns over parameter names, for instance ``["head.*"]``; those are not constrained.
        pretrained: Where the anchors come from: the path of a Lightning checkpoint or of a state dict (also
            ``.safetensors``), a mapping, or a module. None: the weights at the start of the fit. Parameters that it
            lacks, or has in another shape, are not constrained, and this is reported.
        log: What goes to the trainer's loggers at its ``log_every_n_steps``. ``"summary"``: ``tpgm/distance``, of all
            tensors, as the root of the sum of squares. Methods with radii add five. ``tpgm/mean_ratio`` and
            ``tpgm/min_ratio`` are what the projection left of the deviation of a tensor's farthest row, 1 inside the
            ball. ``tpgm/binding`` is the share of tensors whose constraint binds. ``tpgm/bound`` is the share of its
            steps in which a tensor was bound so far, as a mean. ``tpgm/pinned`` is the share of tensors that were held
            at their anchor nearly always. ``"all"``: also ``tpgm_radius/NAME``, ``tpgm_distance/NAME``,
            ``tpgm_ratio/NAME``, ``tpgm_bound/NAME``, ``tpgm_wanted/NAME`` and ``tpgm_allowed/NAME`` of each tensor.
            ``"none"``: nothing, nor to the progress bar.
        summary: Whether the fit ends with a printed table of what was wanted and what was allowed, and a verdict. It
            needs rich.
        anchor_device: ``"cpu"``: the anchors are kept in the host's memory, pinned, and come to the GPU block by block
            when they are needed. None: on the parameters' device. What acts at the end of the fit brings them there
            then, and has them in the host's memory before.
        save_anchor: Whether checkpoints hold the anchors. False: they hold the path of the ``pretrained`` file and a
            fingerprint of its tensors. To resume reads the file and compares. If it has moved, pass its new place.
            What acts at the end of the fit reads the file again then. It holds no anchors in memory before, and so
            records no distances. False has no effect where a run resumes from a checkpoint that holds its anchors.
    """

    exclude: Sequence[str]
    pretrained: Pretrained | None
    log: Log
    summary: bool
    anchor_device: AnchorDevice
    save_anchor: bool


def as_plain_numbers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """numpy's numbers among some attributes as python's: what is pickled is plain data."""
    return {name: value.item() for name, value in attributes.items() if isinstance(value, np.generic)}


def write_out_shared(callback: type, constructor: Any, base: Any) -> None:
    """Give a class whose constructor forwards ``**shared`` to its base a signature and a docstring with what that is.

    Editors read the annotation; help(), LightningCLI and notebooks read these two.
    """
    parameters = dict(inspect.signature(constructor).parameters)
    if parameters.pop("shared", None) is None:
        return
    types = get_type_hints(base)
    shared = list(inspect.signature(base).parameters.values())[1:]
    written = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=types[p.name]) for p in shared]
    constructor.__signature__ = inspect.Signature([*parameters.values(), *written])
    if callback.__doc__ and Shared.__doc__:
        explained = Shared.__doc__.partition("    Attributes:\n")[2].rstrip() + "\n"
        callback.__doc__ = re.sub(r" {8}shared: .*\n", lambda _: explained, callback.__doc__)


@contextmanager
def configuration_errors() -> Iterator[None]:
    """Errors of the pure code become Lightning's `MisconfigurationException`, the message unchanged."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise MisconfigurationException(str(error)) from error


def check_shared(exclude: Any, pretrained: Any, log: Any, summary: Any, anchor_device: Any, save_anchor: Any) -> None:
    """Raise Lightning's `MisconfigurationException` about a value that no fit could use."""
    accepted = isinstance(pretrained, str | os.PathLike | Mapping | nn.Module | None)
    with configuration_errors():
        check_patterns(exclude)
        check(accepted, "pretrained", "a path, a mapping of tensors by name, a module or None", pretrained)
        check(anchor_device in (None, "cpu"), "anchor_device", "None or 'cpu'", anchor_device)
        check_save_anchor(save_anchor, pretrained)
        check(log in get_args(Log), "log", f"one of {get_args(Log)}", log)
        check(is_flag(summary), "summary", "True or False", summary)
        if summary and find_spec("rich") is None:
            raise ImportError("`summary` = True needs rich: pip install rich.")
