"""Weights that something moves out of their balls after the last projection, found without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import attrgetter

import torch
from torch import Tensor, nn

from lightning_tpgm.constrained import Constrained
from lightning_tpgm.sharding import local

_version = attrgetter("_version")


class Leaving:
    """Compares the distances of tensors with the largest radius that each had so far.

    Other callbacks bring back averages of earlier weights when a fit ends. These are inside the largest ball, and not
    always inside the last one. What a look finds stays on the device until it is asked for.
    """

    EVERY = 50  # steps of an optimizer from one look to the next; the first is at its second step, and see `is_due`
    SLACK = 1e-3  # of the radius: sums of many numbers round

    def __init__(self) -> None:
        self._steps: dict[int, int] = {}  # seen of each optimizer, by its index
        self._radii: Tensor | None = None  # the largest so far, shape (T,); nan before there is one
        self._found: Tensor | None = None  # distance and radius of those outside, shape (2, T); nan for all others
        self._said = False
        self._marks: list[int] | None = None  # of the tensors after the last step
        self._written = False  # between the last two steps

    def note(self, quantities: Mapping[str, Tensor]) -> None:
        """These are the radii now; the first tensors are those of before, others have joined."""
        if "radius" in quantities:
            now = quantities["radius"].detach()
            self._radii = now.clone() if self._radii is None else _longer(self._radii, now).fmax(now)

    def begin(self, radii: Iterable[Tensor]) -> None:
        """What was noted are these radii, one vector a time."""
        self._radii = self._found = None
        for now in radii:
            self.note({"radius": now})

    def is_due(self, index: int, tensors: Constrained) -> bool:
        """Count a step of an optimizer, and say whether to look before its weights move.

        To look costs a pass over weights and anchors, so it is due now and then. It is due at once where somebody has
        written to a tensor since the last step, but not before each. Torch counts that, but for what is done to
        ``.data`` in place.
        """
        steps = self._steps.get(index, 0)
        self._steps[index] = steps + 1
        before, self._written = self._written, self._marks is not None and self._marks != _marks(tensors)
        return not self._said and (steps % self.EVERY == 1 or (self._written and not before))

    def stepped(self, tensors: Constrained) -> None:
        """What is written to the tensors from now on does not come of the step."""
        self._marks = None if self._said else _marks(tensors)

    def look(self, tensors: Constrained, quantities: Mapping[str, Tensor]) -> None:
        """See where tensors are; collective where they are split over processes, if there are radii.

        Args:
            tensors: Those that are measured.
            quantities: Of all that are constrained.
        """
        self.note(quantities)
        if "radius" not in quantities or self._radii is None or not tensors.names:
            return
        at = slice(None) if tensors.at is None else tensors.at
        radii, distances = self._radii[at], tensors.distance(tensors.weights())
        # storing a weight rounds it
        eps = tensors.vector([torch.finfo(tensor.dtype).eps for tensor in tensors.parameters], distances.dtype)
        outside = distances > radii * (1 + self.SLACK) + eps * tensors.size()
        found = torch.full_like(self._radii.expand(2, -1), torch.nan)
        found = found if self._found is None else _longer(self._found, found)
        found[:, at] = torch.stack([distances, radii]).where(outside, found[:, at])
        self._found = found

    def texts(self, names: Sequence[str]) -> Iterator[str]:
        """What was found, in words, once; waits for the device."""
        found, self._found = self._found, None
        if found is None or self._said:
            return
        distances, radii = found.cpu()
        count = int((~distances.isnan()).sum())
        if count:
            self._said = True
            worst = int((distances / radii).nan_to_num(nan=-1).argmax())
            yield (
                f"{names[worst]!r} is outside of its ball, at a distance of {float(distances[worst]):.3g} with a radius"
                f" of {float(radii[worst]):.3g} (1 of {count} such tensors). Something changed it after the last"
                " projection. Pruning masks do, nn.Embedding(max_norm=...), clipping, steps of other"
                " optimizers, callbacks and hooks that write to weights. Let them write before the optimizer"
                f" steps, or name the tensor in `exclude`: [{names[worst]!r}]."
            )

    def leave_device(self) -> None:
        """Keep the radii on the CPU, and nothing else."""
        self._radii, self._found = None if self._radii is None else self._radii.cpu(), None


def _marks(tensors: Constrained) -> list[int]:
    """What changes when somebody writes to a tensor. Of split ones nothing: all processes have to look together."""
    if tensors.are_split:
        return []
    trainable = [parameter for parameter in tensors.parameters if parameter.requires_grad]
    return [*map(_version, trainable), *map(Tensor.data_ptr, trainable)]


def _longer(vectors: Tensor, like: Tensor) -> Tensor:
    """Vectors of those tensors that there were once, for all that there are now, where these are."""
    more = vectors.new_full((*vectors.shape[:-1], like.shape[-1] - vectors.shape[-1]), torch.nan)
    return torch.cat([vectors, more], dim=-1).to(like, non_blocking=True)


def too_long_for_max_norm(model: nn.Module, anchors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> str:
    """Which anchors the forward pass of an embedding would shorten, in words; empty if there are none.

    An l2 ball around an anchor that is short enough is not left: to shorten a row moves it no farther from there. Of
    tensors that are split over processes each process sees its own part.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, str] = {}
    for layer in model.modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.max_norm is not None:
            name = names.get(id(layer.weight))
            if name is not None:
                rows = local(anchors[name])
                dtype = torch.promote_types(rows.dtype, torch.float32)
                sizes = torch.linalg.vector_norm(rows, layer.norm_type, dim=-1, dtype=dtype)
                if count := int((sizes > layer.max_norm * (1 + 1e-3)).sum()):
                    found[name] = f"{count} of {len(rows)} rows of {name!r} (max_norm={layer.max_norm:g})"
    if not found:
        return ""
    return (
        f"The pretrained values of {', '.join(found.values())} are longer than max_norm: the layer shortens the rows"
        f" that it looks up, which takes them out of their ball. Leave out max_norm, or use `exclude` = {[*found]}."
    )
