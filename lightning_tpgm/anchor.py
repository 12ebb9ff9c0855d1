"""The pretrained weights: read from wherever the user has them, matched by name, kept like their parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tpgm.selection import clean_name

Pretrained = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module


def capture(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of ``value`` of the dtype, device and memory layout of ``parameter``: the anchor of that parameter."""
    anchor = torch.empty_like(parameter, requires_grad=False)
    with torch.no_grad():
        return anchor.copy_(value)


def read_pretrained(pretrained: Pretrained) -> dict[str, Tensor]:
    """The pretrained tensors by name.

    Args:
        pretrained: Path of a Lightning checkpoint, of a state dict (``.pt``, ``.pth``, ...) or of a ``.safetensors``
            file; or a mapping; or a module. Files are read onto the CPU and never execute code (``weights_only``).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds something else than tensors by name, or needs code to be read.
        ModuleNotFoundError: If a ``.safetensors`` file is given and the package safetensors is not installed.
    """
    if isinstance(pretrained, nn.Module):
        # not state_dict(): a module may rename or leave out entries there
        tensors: Mapping[str, Any] = dict(pretrained.named_parameters(remove_duplicate=False))
    elif isinstance(pretrained, Mapping):
        tensors = pretrained
    else:
        tensors = _read_file(Path(pretrained))
    while "state_dict" in tensors and isinstance(tensors["state_dict"], Mapping):
        tensors = tensors["state_dict"]
    found = {clean_name(name): value.detach() for name, value in tensors.items() if isinstance(value, Tensor)}
    if not found:
        raise ValueError(
            "`pretrained` should hold tensors by parameter name (a state dict, or a Lightning checkpoint with one under"
            f" 'state_dict'), found the keys {list(tensors)[:5]}."
        )
    return found


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`pretrained` should be an existing file, found {str(path)!r}.")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Reading {path.name!r} as `pretrained` needs the package safetensors: pip install safetensors."
            ) from error
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"`pretrained` file {str(path)!r} cannot be read with weights_only=True: {error} Save its weights alone,"
            " torch.save(model.state_dict(), path), and pass that file."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"`pretrained` file {str(path)!r} should hold a state dict, found {type(content).__name__}.")
    return content


def match_pretrained(
    pretrained: Mapping[str, Tensor], parameters: Mapping[str, Tensor], report: Callable[[str], None]
) -> dict[str, Tensor]:
    """The pretrained tensors under the names of the parameters that they belong to.

    If no name fits as it is, one prefix is put before the pretrained names or taken from them (``model.``,
    ``backbone.``, ``module.`` or any other): the one under which most tensors find a parameter of their name and shape.

    Args:
        pretrained: Tensors by name.
        parameters: The parameters to be constrained, by name.
        report: Told in a sentence each: which prefix was used, which parameters have no anchor and why.

    Returns:
        The pretrained tensor of each parameter that has one of its shape. The others are not constrained.

    Raises:
        ValueError: If nothing matches, or two prefixes fit and neither includes the other's matches.
    """

    def fits(name: str, pretrained_name: str) -> bool:
        return pretrained[pretrained_name].shape == parameters[name].shape

    matched = {name: name for name in parameters if name in pretrained}
    if not any(fits(*pair) for pair in matched.items()):
        # by ("put before" or "taken from", prefix): parameter name -> pretrained name
        by_prefix: dict[tuple[str, str], dict[str, str]] = {}
        for name in parameters:
            for prefix, rest in _splits(name):
                if rest in pretrained:
                    by_prefix.setdefault(("put before", prefix), {})[name] = rest
        for pretrained_name in pretrained:
            for prefix, rest in _splits(pretrained_name):
                if rest in parameters:
                    by_prefix.setdefault(("taken from", prefix), {})[rest] = pretrained_name
        fitting = {key: {pair for pair in names.items() if fits(*pair)} for key, names in by_prefix.items()}
        fitting = {key: pairs for key, pairs in fitting.items() if pairs}
        if fitting:
            best = max(fitting, key=lambda key: len(fitting[key]))
            side = 1 if best[0] == "put before" else 0
            covered = {pair[side] for pair in fitting[best]}
            rivals = [
                key
                for key, pairs in fitting.items()
                if key != best and (len(pairs) == len(covered) or not {pair[side] for pair in pairs} <= covered)
            ]
            if rivals:
                prefixes = ", ".join(f"{prefix!r} {how} the names" for how, prefix in [best, *rivals])
                raise ValueError(
                    f"`pretrained` fits the module in several ways: {prefixes}. Pass a mapping with the module's own"
                    " parameter names."
                )
            matched = by_prefix[best]
            report(f"`pretrained`: prefix {best[1]!r} was {best[0]} the pretrained names.")
    anchors = {name: pretrained[source] for name, source in matched.items() if fits(name, source)}
    if not anchors:
        raise ValueError(
            "`pretrained` matches no parameter by name and shape. It holds"
            f" {_some(pretrained)}; the parameters to constrain are {_some(parameters)}."
        )
    other_shape = [
        f"{name} {tuple(parameters[name].shape)} (pretrained {tuple(pretrained[source].shape)})"
        for name, source in matched.items()
        if name not in anchors
    ]
    missing = [name for name in parameters if name not in matched]
    if other_shape:
        report(f"`pretrained` has another shape, not constrained: {', '.join(other_shape)}.")
    if missing:
        report(f"`pretrained` lacks, not constrained: {', '.join(missing)}.")
    return anchors


def _splits(name: str) -> list[tuple[str, str]]:
    """Every way to split a dotted name into a prefix (with its dot) and a rest.

    >>> _splits("a.b.c")
    [('a.', 'b.c'), ('a.b.', 'c')]
    """
    parts = name.split(".")
    return [(".".join(parts[:i]) + ".", ".".join(parts[i:])) for i in range(1, len(parts))]


def _some(names: Mapping[str, Any]) -> str:
    shown = ", ".join(repr(name) for name in list(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
