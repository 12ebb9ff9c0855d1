"""The anchors: which parameters have one, where it came from, and which parameters may get one yet."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tpgm.pretrained import match_pretrained
from lightning_tpgm.sharding import full, is_split, local, split_like

AnchorDevice = Literal["cpu"] | None
Place = Literal["device", "host", "file"]
Origin = Literal["none", "fresh", "pretrained", "restored"]


class Anchors:
    """Every parameter that may be constrained is in one of two states.

    *Waiting*: it is frozen, and its anchor is what it will hold when it thaws, or a value that is kept for it.
    *Joined*: it has thawed once; it has an anchor and is constrained.

    All of them come from one origin, set by one of `begin`, `begin_from` and `restore`. `go_on` keeps what there is for
    another fit of the same model. `join` lets those join that have thawed. `release` lets go of the model.

    Args:
        place: Where the anchors are kept. ``"device"``: on that of the parameters. ``"host"``: in the host's memory.
            ``"file"``: in their file alone, since nobody needs them yet. Those here have no elements then. Each process
            keeps its own parts of those that are split.

    Attributes:
        origin: ``"none"`` before the first of these transitions. ``"fresh"``: the weights as they were found.
            ``"pretrained"``: given weights. ``"restored"``: a checkpoint.
        joined: The anchor of each constrained parameter, by name.
        settled: False where `retake` may find other weights: there has been no step yet.
        parameters: The constrained parameters by the same names, in the same order; empty after `release`.
    """

    def __init__(self, place: Place = "device") -> None:
        self.place = place
        self.forget()

    def forget(self) -> None:
        """Back to the state of a new object."""
        self.origin: Origin = "none"
        self.settled = True
        self.joined: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor | None] = {}  # of all that wait. None: what they hold then
        self._frozen: dict[str, Tensor] = {}  # these parameters, as far as the model has them

    @property
    def waiting(self) -> list[str]:
        """The names of the model's parameters that are frozen yet."""
        return list(self._frozen)

    @property
    def in_file(self) -> bool:
        """Whether those here have no elements."""
        return self.place == "file"

    # ---- where the anchors come from

    def begin(self, candidates: Mapping[str, Tensor]) -> None:
        """The weights as they are now, or as they are when they thaw."""
        self.forget()
        self.origin, self._kept, self._frozen = "fresh", dict.fromkeys(candidates), dict(candidates)
        self.settled = False

    def begin_from(
        self,
        pretrained: Mapping[str, Tensor],
        candidates: Mapping[str, Tensor],
        report: Callable[[str], None],
    ) -> None:
        """Given weights, matched by name; candidates without one are not constrained, and this is reported.

        Raises:
            ValueError: If they do not fit, see `lightning_tpgm.pretrained.match_names`.
        """
        self.forget()
        self.origin = "pretrained"
        self._wait_for(match_pretrained(pretrained, candidates, report) if candidates else {}, candidates)

    def restore(self, state: Mapping[str, Any], candidates: Mapping[str, Tensor]) -> None:
        """What `state_dict` gave.

        Raises:
            ValueError: If these anchors are not those of the candidates.
        """
        self.forget()
        self.origin, self._kept = "restored", dict(state["waiting"])
        self._joins(
            state["anchor"],
            candidates,
            "The checkpoint's anchor of {name!r} has shape {shape}, found {found} among those to constrain. Resume with"
            " the module and the `exclude` of the run that wrote the checkpoint.",
        )

    def go_on(
        self, candidates: Mapping[str, Tensor], pretrained: Mapping[str, Tensor] | None, report: Callable[[str], None]
    ) -> None:
        """Another fit of the same model; parameters that it got since wait like all others.

        Raises:
            ValueError: If a constrained parameter is not there any more, or has another shape.
        """
        self._joins(
            self.joined,
            candidates,
            "{name!r} had shape {shape} in the fit before, found {found} now. A trainer that fits again goes on with"
            " the anchors it has. Use a new Trainer: it takes the present weights for anchors.",
        )
        new = {n: p for n, p in candidates.items() if n not in self.joined and n not in self._kept}
        if pretrained is None:
            self._kept |= dict.fromkeys(new)
            self._frozen |= new
        elif new:
            self._wait_for({n: v for n, v in match_pretrained(pretrained, candidates, report).items() if n in new}, new)

    def _wait_for(self, pretrained: Mapping[str, Tensor], candidates: Mapping[str, Tensor]) -> None:
        """Let all wait that have a pretrained value; those that hold it already need no copy of it."""
        for name, value in pretrained.items():
            parameter = candidates[name]
            same = not parameter.requires_grad and not is_split(parameter) and _equal(value, parameter)
            self._kept[name], self._frozen[name] = None if same else value, parameter

    def _joins(self, anchors: Mapping[str, Tensor], candidates: Mapping[str, Tensor], error: str) -> None:
        kept = {name: value for name, value in self._kept.items() if value is not None and name in candidates}
        for name, value in {**anchors, **kept}.items():
            if name not in candidates or candidates[name].shape != value.shape:
                found = f"shape {tuple(candidates[name].shape)}" if name in candidates else "no such parameter"
                raise ValueError(error.format(name=name, shape=tuple(value.shape), found=found))
        self.parameters = {name: candidates[name] for name in anchors}
        self.joined = {name: self._captured(value, candidates[name]) for name, value in anchors.items()}
        self._frozen = {name: candidates[name] for name in self._kept if name in candidates}

    # ---- what happens to them

    def join(self, frozen: bool = False, stepped: Collection[int] = ()) -> list[str]:
        """Give those an anchor that are trainable now.

        Args:
            frozen: Whether all others join as well.
            stepped: The ids of those that are about to be stepped, frozen or not.

        Returns:
            The names that have joined, in the order of the model.
        """
        new = {
            name: parameter
            for name, parameter in self._frozen.items()
            if frozen or parameter.requires_grad or not isinstance(parameter, nn.Parameter) or id(parameter) in stepped
        }
        for name, parameter in new.items():
            value = self._kept.pop(name)
            self.joined[name] = self._captured(parameter if value is None else value, parameter)
            self.parameters[name] = self._frozen.pop(name)
        return list(new)

    def retake(self, buffers: bool) -> None:
        """The parameters as they are now. Nobody has stepped yet: what has changed since `begin` was loaded.

        Args:
            buffers: Whether theirs as well: not after a forward pass, which changes them.
        """
        for name, parameter in self.parameters.items():
            if buffers or isinstance(parameter, nn.Parameter):
                local(self.joined[name]).copy_(local(parameter.detach()))

    def replace(self, present: Mapping[str, Tensor]) -> bool:
        """Constrain these in place of others of the same names; one of another shape has no anchor, and is left alone.

        Returns:
            Whether there was any; those that wait do not count.
        """
        self._frozen |= exchanged(self._frozen, present)
        others = exchanged(self.parameters, present)
        self.joined |= {name: self._captured(self.joined[name], tensor) for name, tensor in others.items()}
        self.parameters |= others
        return bool(others)

    def bring(self) -> None:
        """Those in the host's memory come to the parameters' device."""
        self.place = "device"
        self.joined = {name: anchor.to(self.parameters[name].device) for name, anchor in self.joined.items()}

    def own(self) -> None:
        """Copy what is kept for those that wait: where it came from may go on training, or be a file that changes."""

        def copy(value: Tensor) -> Tensor:
            return value.to("meta") if self.in_file else value.clone()

        self._kept = {name: None if value is None else copy(value) for name, value in self._kept.items()}

    def release(self) -> None:
        """Let go of the parameters and of device memory; anchors stay, on the CPU, for a later `state_dict`."""
        self.parameters, self._frozen = {}, {}
        self.joined = to_cpu(self.joined)

    def state_dict(self, sources: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
        """Anchors, and what is kept for those that wait, whole and on the CPU. Collective where tensors are split.

        Args:
            sources: What to write in place of the values of these.
        """

        def saved(name: str, value: Tensor) -> Tensor | str:
            return sources[name] if name in sources else full(value).cpu()

        return {
            "anchor": {name: saved(name, anchor) for name, anchor in self.joined.items()},
            "waiting": {name: None if value is None else saved(name, value) for name, value in self._kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, without a model."""
        self.forget()
        self.origin, self.joined, self._kept = "restored", dict(state["anchor"]), dict(state["waiting"])

    def _captured(self, value: Tensor, parameter: Tensor) -> Tensor:
        if self.in_file:
            return torch.empty_like(parameter, requires_grad=False, device="meta")
        return capture(value, parameter, "cpu" if self.place == "host" else None)


def capture(value: Tensor, parameter: Tensor, device: AnchorDevice = None) -> Tensor:
    """A copy of ``value`` of the dtype, device, memory layout and sharding of ``parameter``: its anchor.

    Args:
        value: The whole tensor, or one that is split like the parameter.
        parameter: The parameter that the anchor belongs to.
        device: ``"cpu"``: in the host's memory, pinned where there is a GPU, so that copies to it do not wait.
    """
    pinned = device == "cpu" and torch.cuda.is_available()
    with torch.no_grad():
        anchor = torch.empty_like(parameter, requires_grad=False, device=device, pin_memory=pinned)
        local(anchor).copy_(split_like(value, parameter))
        return anchor


def exchanged(known: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are present in the place of known ones, of the same names and shapes."""
    found = {name: (old, present.get(name, old)) for name, old in known.items()}
    return {name: new for name, (old, new) in found.items() if new is not old and new.shape == old.shape}


def to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU; those that are split over processes, or in a file, stay where they are."""
    return {name: tensor if is_split(tensor) or tensor.is_meta else tensor.cpu() for name, tensor in tensors.items()}


def _equal(value: Tensor, parameter: Tensor) -> bool:
    """Whether a parameter holds its pretrained value, to the bit."""
    return parameter.device.type != "meta" and torch.equal(value.to(parameter), parameter.detach())
