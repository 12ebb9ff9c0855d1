"""Which parameters are constrained."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def clean_name(name: str) -> str:
    """A parameter's name without what `torch.compile` and Fabric add to it.

    >>> clean_name("model._orig_mod.conv.weight")
    'model.conv.weight'
    """
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_forward_module"))


def check_patterns(exclude: object) -> None:
    """Raise a TypeError unless this is a sequence of strings, but no string."""
    remedy = f" Write [{exclude!r}]." if isinstance(exclude, str) else ""
    if remedy or not isinstance(exclude, Sequence) or not all(isinstance(pattern, str) for pattern in exclude):
        raise TypeError(f"`exclude` should be a sequence of patterns, found {exclude!r}.{remedy}")


def constrainable(module: nn.Module, exclude: Sequence[str] = (), buffers: bool = False) -> dict[str, Tensor]:
    """The parameters that a constraint may act on, frozen ones included, by name.

    A parameter counts once, under its first name, if several modules share it; a pattern that matches any of its names
    excludes it. Integer, complex, sparse and empty tensors are left alone.

    Args:
        module: The module whose parameters are meant.
        exclude: fnmatch patterns (``*``, ``?``, ``[...]``, case-sensitive) over parameter names. What `torch.compile`
            adds to names may be in them or not.
        buffers: Whether buffers are meant too.

    Raises:
        ValueError: If a pattern matches no parameter, with the closest names; or if a parameter has no shape yet.
    """
    names: dict[Tensor, list[str]] = {}
    named: list[tuple[str, Tensor]] = list(module.named_parameters(remove_duplicate=False))
    if buffers:
        named += module.named_buffers(remove_duplicate=False)
    for name, tensor in named:
        names.setdefault(tensor, []).append(clean_name(name))
    known = [name for aliases in names.values() for name in aliases]
    patterns = [clean_name(pattern) for pattern in exclude]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"`exclude` pattern {pattern!r} matches no parameter. {_closest(pattern, known)}"
                " Patterns are compared with the names in `model.named_parameters()`."
            )

    selected: dict[str, Tensor] = {}
    for parameter, aliases in names.items():
        if any(fnmatchcase(name, pattern) for name in aliases for pattern in patterns):
            continue
        if is_lazy(parameter):
            raise ValueError(
                f"Parameter {aliases[0]!r} has no shape yet. Run one batch through the lazy module before the fit,"
                " or name it in `exclude`."
            )
        if _has_distance(parameter):
            selected[aliases[0]] = parameter
    return selected


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that `constrainable` may have, by all of their names."""
    return _with_distance(module.named_buffers(remove_duplicate=False))


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by their first names, as in `constrainable`, and the buffers that it may have."""
    return {**_with_distance(module.named_parameters()), **buffers_of(module)}


def _with_distance(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {clean_name(name): tensor for name, tensor in named if _has_distance(tensor)}


def _has_distance(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout is torch.strided and tensor.numel() > 0


def check_dense(title: str, parameters: Mapping[str, Tensor]) -> None:
    """Refuse sparse gradients, on behalf of a method that adds to them.

    Raises:
        ValueError: With the name of the parameter.
    """
    for name, parameter in parameters.items():
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ValueError(
                f"{title} adds to gradients, and that of {name!r} is sparse. Build the layer with sparse=False, or name"
                " it in `exclude`."
            )


def _closest(pattern: str, names: list[str]) -> str:
    stem = pattern.rstrip("*").rstrip(".")
    if not names:
        return "The module has none."
    close = [name for name in names if stem and stem in name] or difflib.get_close_matches(pattern, names, cutoff=0.4)
    if close or len(names) <= 5:
        return f"The closest names are {', '.join(map(repr, (close or names)[:5]))}."
    paths = [name.split(".") for name in names]
    levels = [Counter(".".join(path[:depth]) for path in paths) for depth in range(1, max(map(len, paths)) + 1)]
    beginnings = next((level for level in levels if len(level) > 1), levels[0])  # where names branch
    return f"Names begin with {', '.join(f'{start} ({count})' for start, count in beginnings.items())}."
