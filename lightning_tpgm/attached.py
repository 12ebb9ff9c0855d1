"""A method's tensors on a model: found, with their anchors, and in checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_tpgm.anchors import AnchorDevice, Anchors, Place, exchanged
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods.method import Method
from lightning_tpgm.observing.leaving import too_long_for_max_norm
from lightning_tpgm.observing.reporter import Reporter
from lightning_tpgm.observing.shown import Shown
from lightning_tpgm.references import AnchorFile, moved, named, put_back
from lightning_tpgm.selection import buffers_of, tensors_of
from lightning_tpgm.sharding import gathering, reshard

Say = Callable[[str], None]
Tensors = Mapping[str, Tensor]  # by name
log_info = logging.getLogger("lightning_tpgm").info


class Attached(Shown):
    """The constrained tensors of a model and their anchors; the arguments are those of `lightning_tpgm.Constraint`."""

    def __init__(
        self, method: Method, anchor_device: AnchorDevice, save_anchor: bool, title: str, warn: Say, tell: Say
    ) -> None:
        if method.is_taken:
            raise ValueError(
                "`method` has been given to a model before, and keeps what it learned of that one. Pass a new"
                f" {type(method).__name__} for each model."
            )
        method.is_taken = True
        self.method, self.title = method, title
        self._place: Place = "device" if anchor_device is None else "host"  # of anchors that are used
        self.anchors = Anchors(self._place)
        self.reporter = Reporter(self.title, method.growth())
        self.tensors: Constrained | None = None  # those that are constrained now. None: no model is attached
        self._save_anchor = save_anchor
        self._path: Path | None = None  # of the file that was passed
        self._file: AnchorFile | None = None  # what checkpoints name instead of holding anchors
        self._warn, self._tell = warn, tell
        self._model: nn.Module | None = None
        self._gathering: list[nn.Module] = []
        self._candidates: Tensors = {}

    # ---- attaching the method to a model

    def begin(
        self, model: nn.Module, candidates: Tensors, pretrained: Tensors | None = None, path: Path | None = None
    ) -> None:
        """Take the anchors from the model's weights, or from given ones, which may come from a file."""
        self._path = path
        if pretrained is not None and path is not None and not self._save_anchor:
            self._file = AnchorFile.of(path, pretrained, candidates)
        self._put_aside()
        if pretrained is None:
            self.anchors.begin(candidates)
        else:
            self.anchors.begin_from(pretrained, candidates, self._report)
        self._attach(model, candidates)

    def _put_aside(self) -> None:
        """Anchors that only the end needs will be in their file until then, or in the host's memory."""
        if self.method.acts_at_end:
            self.anchors.place = "host" if self._file is None else "file"

    def restore(
        self,
        model: nn.Module,
        candidates: Tensors,
        state: Mapping[str, Any],
        pretrained: Tensors | None = None,
        path: Path | None = None,
    ) -> None:
        """Go on where `state_dict` was asked for; a state that names a file finds it here, if it has moved."""
        self._path = path
        self._restore(candidates, state, pretrained)
        self._attach(model, candidates, state)

    def _restore(self, candidates: Tensors, state: Mapping[str, Any], pretrained: Tensors | None = None) -> None:
        self._check_kind(state)
        file = named(state)
        tensors = None if file is None else file.read(self._path, pretrained)  # also if layers wait at its values
        self._file = None if self._save_anchor else moved(file, self._path)
        if not self._save_anchor and file is None:
            self._warn(
                f"{self.title}: `save_anchor` = False has no effect. The checkpoint holds its anchors, and so will"
                " those that follow."
            )
        self._put_aside()
        self.anchors.restore(put_back(state, tensors), candidates)

    def go_on(self, model: nn.Module, candidates: Tensors, pretrained: Tensors | None = None) -> None:
        """Go on with the same model after `release`."""
        if self._file is not None and pretrained is not None:  # the model may have got new parameters
            self._file.read(self._path, pretrained)
            self._file = AnchorFile.of(Path(self._file.path), pretrained, candidates, self._file)
        self._put_aside()
        self.anchors.go_on(candidates, pretrained, self._report)
        self._attach(model, candidates)

    def _attach(self, model: nn.Module, candidates: Tensors, state: Mapping[str, Any] | None = None) -> None:
        self._model, self._gathering, self._candidates = model, gathering(model), candidates
        self.reporter.order = list(candidates)
        if state is not None:
            self._load(state)  # first: what was learned before may be of other tensors
        self._arrange()
        self.join()
        self.anchors.own()
        if self.method.has_radii and not self.anchors.in_file:
            text = too_long_for_max_norm(model, self.anchors.joined, self.anchors.parameters)
            if text:
                self._warn(f"{self.title}: {text}")

    def _report(self, text: str) -> None:
        self._tell(f"{self.title}: {text}")

    @torch.no_grad()
    def retake(self, buffers: bool = False, settled: bool = False) -> None:
        """Take fresh anchors anew, before the first step: weights may have been loaded since `begin`.

        Args:
            buffers: Whether those of buffers as well.
            settled: Whether nobody can load any more. A closure that is called again may be at other weights.
        """
        if not self.anchors.settled:
            self.find_buffers()
            self.anchors.retake(buffers)
            self.anchors.settled = settled
            self._arrange()

    def join(self, stepped: Collection[int] = ()) -> bool:
        """Constrain the parameters that have thawed, or are stepped, see `Anchors`; says whether there are any."""
        names = self.anchors.join(stepped=stepped)
        if names:
            tensors = self._arrange()
            self.method.joined(tensors, names)
        return bool(names)

    @torch.no_grad()
    def _arrange(self) -> Constrained:
        parameters, anchors = self.anchors.parameters, self.anchors.joined
        self.tensors = Constrained(parameters, anchors, self.method.norm, self._gathering)
        if not self.anchors.in_file:
            self.tensors.prepare(self.method.has_radii)
        self.method.place(self.tensors)
        return self.tensors

    def find_buffers(self) -> None:
        """Training, or a move to another device, may have put others in their place: names are what stays."""
        if self._model is not None and self.method.constrains_buffers:
            self._replace(buffers_of(self._model))

    def find_tensors(self) -> None:
        """The same of parameters, too: when an epoch or an optimizer is new, and at the end. FSDP2 modules let go."""
        if self._model is not None:
            reshard(self._model)
            self._replace(tensors_of(self._model))

    def _replace(self, present: Tensors) -> None:
        self._candidates = {**self._candidates, **exchanged(self._candidates, present)}
        if self.anchors.replace(present):
            self._arrange()

    def fetch(self) -> None:
        """Bring the anchors that were put aside to where they are used."""
        if self.anchors.place == self._place:
            return
        if self.anchors.in_file:
            state = put_back(self._kept())
            self.anchors.place = self._place
            self.anchors.restore(state, self._candidates)
            self.anchors.own()
        else:
            self.anchors.bring()
        self._arrange()

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Anchors or their file, what was learned and what was seen, on the CPU. Collective where tensors are split."""
        learned, history = self.method.state(), self.reporter.history.state_dict()
        return {**self._kept(), "of": self._kind, "method": learned, "history": history}

    @property
    def _kind(self) -> dict[str, str]:
        """Of whom a state is."""
        return {"method": type(self.method).__name__, "norm": self.method.norm}

    def _check_kind(self, state: Mapping[str, Any]) -> None:
        found = state.get("of", self._kind)  # older states do not say
        if found != self._kind:
            here, there = ("{method} with norm {norm!r}".format_map(kind) for kind in (self._kind, found))
            raise ValueError(
                f"The state should be one of {here}, found one of {there}. Go on with the method and the norm of the"
                " run that wrote it, or begin anew without the state."
            )

    def _kept(self) -> dict[str, Any]:
        if self._file is None:
            return self.anchors.state_dict()
        return {**self.anchors.state_dict(self._file.sources), "file": self._file.state()}

    @property
    @override
    def anchor(self) -> dict[str, Tensor]:
        """The pretrained value of each constrained parameter, by name; read from their file while they are there."""
        return dict(put_back(self._kept(), copy=True)["anchor"] if self.anchors.in_file else self.anchors.joined)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave: the anchors are the original ones, whatever the model holds now.

        Raises:
            ValueError: If the state is of another method or norm, its anchors do not fit, or there is no model.
        """
        if self.tensors is None:
            raise ValueError(f"{self.title} is attached to no model. Call load_state_dict before remove.")
        self._restore(self._candidates, state)
        self._load(state)
        self._arrange()
        self.join()
        self.anchors.own()

    def recall(self, state: Mapping[str, Any]) -> None:
        """Know what `state_dict` gave, and be attached to no model."""
        self._check_kind(state)
        self.anchors.load_state_dict(put_back(state, copy=True))
        self._file = None if self._save_anchor else named(state)
        self._load(state)

    def load(self, state: Mapping[str, Any]) -> None:
        """What was learned and seen alone."""
        self._check_kind(state)
        self._load(state)
        if self.tensors is not None:
            self.method.place(self.tensors)

    def _load(self, state: Mapping[str, Any]) -> None:
        try:
            self.method.load(state["method"])
        except KeyError as error:
            raise ValueError(f"The state is not one of {self.title}: it lacks {error}.") from error
        self.reporter.load(state.get("history", {}))
