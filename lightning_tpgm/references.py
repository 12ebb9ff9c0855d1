"""Anchors that a checkpoint names instead of holding: the file that they came from, and what it held."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_tpgm.methods.method import check, is_flag
from lightning_tpgm.pretrained import Pretrained, match_names, path_of, read_pretrained

_PLACES = ("anchor", "waiting")  # of anchors in a state dict


@dataclass(frozen=True)
class AnchorFile:
    """The file that anchors came from.

    Attributes:
        path: Absolute.
        fingerprint: Of the tensors that became anchors, see `fingerprint`.
        sources: Their names in the file, by those of the parameters.
    """

    path: str
    fingerprint: str
    sources: Mapping[str, str]

    @classmethod
    def of(
        cls,
        path: Path,
        pretrained: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        verified: AnchorFile | None = None,
    ) -> AnchorFile:
        """Of a file that was read.

        Args:
            path: Of the file, absolute.
            pretrained: What `read_pretrained` found in it.
            parameters: Those that may be constrained, by name.
            verified: The same file, if `read` has just compared it. Its tensors are hashed again only if the
                parameters need others.
        """
        sources = match_names(pretrained, parameters, lambda text: None) if parameters else {}
        if verified is not None and verified.sources == sources:
            return verified
        return cls(str(path), fingerprint(pretrained, sources), sources)

    def read(self, path: Path | None = None, given: Mapping[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """The tensors that were in it, and more.

        Args:
            path: Where it is now. None: where it was.
            given: What is there, if it has been read. Without a path it was no file.

        Raises:
            ValueError: If it is not there, cannot be read, or holds other tensors.
        """
        where = self.path if path is None else str(path)
        is_in = f"The anchors are in {where!r} (`save_anchor` = False), and"
        first = "Pass the file that the first run started from as `pretrained`."
        try:
            tensors = read_pretrained(where) if given is None else given
        except FileNotFoundError as error:
            raise ValueError(f"{is_in} there is no such file. Pass the file's new place as `pretrained`.") from error
        except ValueError as error:
            raise ValueError(f"{is_in} that file cannot be read. {first}") from error
        missing = sorted(set(self.sources.values()) - set(tensors))
        if missing or fingerprint(tensors, self.sources) != self.fingerprint:
            found = "`pretrained`" if path is None and given is not None else repr(where)
            other = f"{found} holds other tensors than the anchors of this run, which came from {self.path!r}."
            changed = f"{is_in} that file has changed since."
            lacks = f" It lacks {missing[0]!r}." if missing else ""
            raise ValueError(f"{changed if found == repr(self.path) else other}{lacks} {first}")
        return tensors

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"path": self.path, "fingerprint": self.fingerprint, "sources": dict(self.sources)}


def check_save_anchor(save_anchor: object, pretrained: Pretrained | None) -> None:
    """Raise a ValueError about what cannot be referred to."""
    check(is_flag(save_anchor), "save_anchor", "True or False", save_anchor)
    if not save_anchor and path_of(pretrained) is None:
        kind = type(pretrained).__name__
        raise ValueError(f"`save_anchor` = False needs the path of a file as `pretrained`, found {kind}.")


def fingerprint(tensors: Mapping[str, Tensor], sources: Mapping[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors that are sources of anchors."""
    found = hashlib.sha256()
    for source in sorted(set(sources.values())):
        tensor = tensors[source].detach().cpu().contiguous()
        found.update(f"{source} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def named(state: Mapping[str, Any]) -> AnchorFile | None:
    """The file that a state dict names; None if it holds its anchors."""
    return AnchorFile(**state["file"]) if "file" in state else None


def moved(file: AnchorFile | None, path: Path | None) -> AnchorFile | None:
    """The file at its new place, if it has one."""
    return file if file is None or path is None else replace(file, path=str(path))


def put_back(
    state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None, copy: bool = False
) -> Mapping[str, Any]:
    """A state dict that holds its anchors, from the file that it names.

    Args:
        state: As `lightning_tpgm.constraint.Constraint.state_dict` gave it.
        tensors: What `AnchorFile.read` gave. None: it is read where it was, if it is needed.
        copy: Whether what is read is copied, see `read_pretrained`.

    Raises:
        ValueError: See `AnchorFile.read`.
    """
    file = named(state)
    if file is None or not any(isinstance(value, str) for place in _PLACES for value in state[place].values()):
        return state
    tensors = file.read() if tensors is None else tensors
    values = {place: {**state[place], **_values(state[place], file, tensors, copy)} for place in _PLACES}
    return {**{key: value for key, value in state.items() if key != "file"}, **values}


def _values(place: Mapping[str, Any], file: AnchorFile, tensors: Mapping[str, Tensor], copy: bool) -> dict[str, Tensor]:
    found = {name: tensors[file.sources[name]] for name, value in place.items() if isinstance(value, str)}
    return {name: value.clone() for name, value in found.items()} if copy else found
