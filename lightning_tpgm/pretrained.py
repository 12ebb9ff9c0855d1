"""The pretrained weights: read from wherever the user has them, and matched by name."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_tpgm.selection import clean_name

Pretrained = nn.Module | str | os.PathLike[str] | Mapping[str, Tensor]


def path_of(pretrained: Pretrained | None) -> Path | None:
    """The file that the pretrained weights are in, if they are in one; absolute, and mostly what a link leads to."""
    if not isinstance(pretrained, str | os.PathLike):
        return None
    path = Path(pretrained).absolute()
    file = path.resolve()  # links in a Hugging Face cache lead to files without the suffix that `read_file` goes by
    return file if file.suffix == path.suffix else path


def read_pretrained(pretrained: Pretrained) -> dict[str, Tensor]:
    """The pretrained tensors by name.

    Args:
        pretrained: Path of a Lightning checkpoint, of a state dict (``.pt``, ``.pth``, ...) or of a ``.safetensors``
            file. Or a mapping, or a module. Files are read onto the CPU and never execute code (``weights_only``).

    Returns:
        Tensors that share memory with the mapping or module, or with the file, see `read_file`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds something else than tensors by name, or needs code to be read.
        ModuleNotFoundError: If a ``.safetensors`` file is given and the package safetensors is not installed.
    """
    if isinstance(pretrained, nn.Module):
        # not state_dict(): a module may rename or leave out entries there
        tensors: Mapping[str, Any] = {
            **dict(pretrained.named_buffers(remove_duplicate=False)),
            **dict(pretrained.named_parameters(remove_duplicate=False)),
        }
    elif isinstance(pretrained, Mapping):
        tensors = pretrained
    else:
        tensors = read_file(Path(pretrained))
    tensors = state_dict_in(tensors)
    found = {
        clean_name(name): value.detach()
        for name, value in tensors.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not found:
        raise ValueError(
            "`pretrained` should hold tensors by parameter name (a state dict, or a Lightning checkpoint with one under"
            f" 'state_dict'), found the keys {list(tensors)[:5]}. Pass the mapping that holds the tensors."
        )
    return found


def state_dict_in(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a Lightning checkpoint; anything else is one itself."""
    while isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    return content


def read_file(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint or ``.safetensors`` file, on the CPU; nothing in it is executed.

    The file is mapped into memory: only what is looked at is read, and processes share it. So use the tensors at once,
    or copy them. They change if somebody overwrites the file, and are lost if it gets shorter. Files that torch wrote
    before 1.6 are read as a whole.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it needs code to be read, or holds no mapping.
        ModuleNotFoundError: If a ``.safetensors`` file is given and the package safetensors is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`pretrained` should be an existing file, found {str(path)!r}: {_why_not(path)}")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Reading {path.name!r} as `pretrained` needs the package safetensors: pip install safetensors."
            ) from error
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"`pretrained` file {str(path)!r} cannot be read as safetensors: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(
            f"`pretrained` file {str(path)!r} cannot be read with weights_only=True: {error} Save its weights alone,"
            " torch.save(model.state_dict(), path), and pass that file."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"`pretrained` file {str(path)!r} should hold a state dict, found {type(content).__name__}.")
    return content


def _why_not(path: Path) -> str:
    """Why a path leads to no file, and what to do."""
    if path.is_dir():
        return "that is a folder. Pass a file in it."
    text = "there is no such file."
    if not path.is_absolute():
        text += f" It is looked for in {str(Path.cwd())!r}."
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    for close in get_close_matches(path.name, beside, n=1):
        text += f" The closest in that folder is {close!r}."
    return (
        f"{text} Check its name. If it has moved, pass its new place. If the model holds its pretrained weights"
        " already, leave `pretrained` out."
    )


def match_pretrained(
    pretrained: Mapping[str, Tensor], parameters: Mapping[str, Tensor], report: Callable[[str], None]
) -> dict[str, Tensor]:
    """The pretrained tensors under the names of the parameters that they belong to, see `match_names`."""
    return {name: pretrained[source] for name, source in match_names(pretrained, parameters, report).items()}


def match_names(
    pretrained: Mapping[str, Tensor], parameters: Mapping[str, Tensor], report: Callable[[str], None]
) -> dict[str, str]:
    """Which pretrained tensor belongs to which parameter.

    The pretrained names are taken as they are, or a prefix is put before or taken from all of them. It may be
    ``model.``, ``backbone.``, ``module.`` or any other. What lets most tensors find a parameter of their name and shape
    is taken.

    Args:
        pretrained: Tensors by name.
        parameters: The parameters to be constrained, by name.
        report: Told in a sentence each: which prefix was used, which parameters have no anchor and why.

    Returns:
        The pretrained name of each parameter that has a pretrained tensor of its shape. The others are not constrained.

    Raises:
        ValueError: If nothing matches, or two prefixes fit and neither includes the other's matches.
    """
    named = _namings(pretrained, parameters)
    fitting = {
        naming: {name: source for name, source in pairs.items() if pretrained[source].shape == parameters[name].shape}
        for naming, pairs in named.items()
    }
    best = max(fitting, key=lambda naming: (len(fitting[naming]), not naming.prefix))
    if not fitting[best]:
        raise ValueError(
            f"`pretrained` matches no parameter by name and shape. It holds {_some(pretrained)}. The parameters to"
            f" constrain are {_some(parameters)}. Pass the weights of this module, or a mapping with its parameter"
            " names."
        )
    if best.prefix:
        covered = {
            naming: set(pairs.values() if best.how == "put before" else pairs) for naming, pairs in fitting.items()
        }
        ways = [naming for naming in fitting if not covered[naming] < covered[best]]  # `best` among them
        if len(ways) > 1:
            raise ValueError(
                f"`pretrained` fits the module in several ways: {'; '.join(map(str, ways))}. Pass a mapping with the"
                " module's own parameter names."
            )
        report(f"`pretrained` fits with {best}.")
    matched = {name: fitting[best][name] for name in parameters if name in fitting[best]}
    other_shape = [
        f"{name} {tuple(parameters[name].shape)} (pretrained {tuple(pretrained[source].shape)})"
        for name, source in named[best].items()
        if name not in matched
    ]
    missing = [name for name in parameters if name not in named[best]]
    if other_shape:
        report(f"Not constrained, because `pretrained` has them in another shape: {', '.join(other_shape)}.")
    if missing:
        report(f"Not constrained, because `pretrained` lacks them: {', '.join(missing)}.")
    return matched


class _Naming(NamedTuple):
    """How pretrained names become those of parameters; the empty prefix leaves them as they are."""

    how: Literal["put before", "taken from"]
    prefix: str

    @override
    def __str__(self) -> str:
        return f"prefix {self.prefix!r} {self.how} its names" if self.prefix else "its names as they are"


def _namings(pretrained: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[_Naming, dict[str, str]]:
    """Every way of naming that gives any parameter a pretrained tensor: parameter name -> pretrained name."""
    as_they_are = _Naming("put before", "")
    named = {as_they_are: {name: name for name in parameters if name in pretrained}}
    for name in parameters:
        for prefix, rest in _splits(name):
            if rest in pretrained:
                named.setdefault(_Naming("put before", prefix), {})[name] = rest
    for source in pretrained:
        for prefix, rest in _splits(source):
            if rest in parameters:
                named.setdefault(_Naming("taken from", prefix), {})[rest] = source
    return named


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
