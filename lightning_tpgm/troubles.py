"""What goes wrong silently when a pretrained module is fine-tuned, found by looking at numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from lightning_tpgm.projection import MIN_RADIUS
from lightning_tpgm.sharding import local


class Watch:
    """Follows the quantities of `lightning_tpgm.reporting` and says each trouble once."""

    PATIENCE = 100  # steps until something should have moved
    LONG = 500  # steps for which every constraint may bind while the radii grow as fast as they can
    RESOLUTION = 1e-6  # of an anchor's size: a smaller movement is none

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._at_floor_since: int | None = None
        self._at_bound_since: tuple[int, Tensor] | None = None  # and the radii then

    def look(
        self, step: int, quantities: Mapping[str, Tensor], sizes: Callable[[], Tensor], growth: float
    ) -> Iterator[str]:
        """The troubles that are new; waits for the device.

        Args:
            step: How many optimizer steps there were.
            quantities: Shape (T,) each.
            sizes: Gives the norm of each anchor, shape (T,); asked for once.
            growth: By how much a radius can grow in a step.
        """
        for trouble, text in self._troubles(step, quantities, sizes, growth):
            if trouble not in self._said:
                self._said.add(trouble)
                yield text

    def _troubles(
        self, step: int, quantities: Mapping[str, Tensor], sizes: Callable[[], Tensor], growth: float
    ) -> Iterator[tuple[str, str]]:
        if step >= self.PATIENCE and "moved" not in self._said:
            self._said.add("moved")  # one look is enough
            reach = quantities["distance"] / quantities.get("ratio", torch.ones(())).clamp(min=1e-30)
            size = sizes()
            size = size.where(size > 0, size[size > 0].min() if bool(size.any()) else 0)  # one that starts at zero
            if not bool((reach > self.RESOLUTION * size).any()):
                yield (
                    "still",
                    f"After {step} optimizer steps no constrained tensor has moved by more than {self.RESOLUTION:g} of"
                    " its size: there is nothing to constrain yet. Raise the learning rate, or check that the optimizer"
                    " holds these parameters and that they get gradients.",
                )
        if "radius" not in quantities:
            return
        radius, binds = quantities["radius"], quantities["binds"]
        if not bool(binds.any() & (radius <= MIN_RADIUS).all()):
            self._at_floor_since = None
        elif self._at_floor_since is None:
            self._at_floor_since = step
        elif step - self._at_floor_since >= self.PATIENCE:
            yield (
                "floor",
                f"For {step - self._at_floor_since} optimizer steps all {len(radius)} radii have been at their floor of"
                f" {MIN_RADIUS:g}: the weights stay where they were pretrained. Each step of the optimizer goes where"
                " the loss that the radii learn from is higher: lower the learning rate, and check that the held-out"
                " data are like the training data.",
            )
        if not bool(binds.all()):
            self._at_bound_since = None
        elif self._at_bound_since is None:
            self._at_bound_since = step, radius.clone()
        elif step - self._at_bound_since[0] >= self.LONG:
            since, radius_then = self._at_bound_since
            grown = float((radius - radius_then).median()) if radius.shape == radius_then.shape else 0.0
            if grown > growth * (step - since) / 2:
                yield (
                    "bound",
                    f"For {step - since} optimizer steps all {len(radius)} constraints have been at their bound, while"
                    " the radii grew about as fast as they can: `radius_lr` sets how far the weights get, not the data."
                    " Raise `radius_lr`; choose it by accuracy on held-out data in distribution.",
                )
            self._at_bound_since = step, radius.clone()  # judge the next stretch by itself


# ---- was the module ever given weights?

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others cannot be compared everywhere
_ENOUGH = 256  # entries from which a uniform distribution can be recognised


def never_trained(module: nn.Module) -> str | None:
    """What shows that a module holds its random initialisation; None if nothing does.

    Only what training never leaves behind counts: every normalisation layer with weights of exactly 1 and biases of
    exactly 0; or, in a module of nothing but linear and convolution layers, weights that fill the interval of torch's
    default initialisation, +- 1 / sqrt(fan_in), and never leave it. A layer that looks trained speaks against it.
    Where parameters are split over processes each looks at its own part: nothing here is collective.
    """
    norms = linear = entries = 0
    others = False
    with torch.no_grad():
        for part in module.modules():
            own = list(part.parameters(recurse=False))
            if any(nn.parameter.is_lazy(parameter) for parameter in own):
                others = True
            elif isinstance(part, _NORMS) and own:
                if not _untouched(part):
                    return None
                norms += 1
            elif isinstance(part, _LINEAR) and own:
                as_initialised, looks_trained = _judge(part)
                if looks_trained:
                    return None
                linear, others = linear + 1, others or not as_initialised
                entries += sum(parameter.numel() for parameter in own)
            else:
                others = others or bool(own)
    if norms:
        return f"every normalisation layer ({norms}) has weights of 1 and biases of 0"
    if linear and not others and entries >= _ENOUGH:
        return f"every layer ({linear}) is as torch initialises it"
    return None


def _values(part: nn.Module, name: str) -> Tensor | None:
    """A parameter of the module itself, not computed by a parametrization; this process's part."""
    parameter = part._parameters.get(name)
    if parameter is None or parameter.dtype not in _DTYPES or not local(parameter).numel():
        return None
    return local(parameter.detach())


def _untouched(norm: nn.Module) -> bool:
    weight, bias = _values(norm, "weight"), _values(norm, "bias")
    mean, tracked = getattr(norm, "running_mean", None), getattr(norm, "num_batches_tracked", None)
    return (
        weight is not None
        and bool((weight == 1).all())
        and (bias is None or bool((bias == 0).all()))
        and (mean is None or bool((local(mean) == 0).all()))
        and (tracked is None or int(tracked) == 0)
    )


def _judge(layer: nn.Module) -> tuple[bool, bool]:
    """Whether a layer is as torch initialises it, and whether it looks trained; it may be neither."""
    weight, bias = _values(layer, "weight"), _values(layer, "bias")
    whole = layer._parameters.get("weight")
    if weight is None or whole is None:
        return False, False
    bound = prod(whole.shape[1:]) ** -0.5  # no indexing: of a split tensor that would be collective
    inside = all(bool((own.abs() <= 1.01 * bound).all()) for own in (weight, bias) if own is not None)
    filled = weight.numel() < _ENOUGH or abs(float(weight.float().std()) * 3**0.5 / bound - 1) < 0.1
    return inside and filled, not inside and bias is not None and bool(bias.any())


# ---- are the held-out data held out?


def shared_examples(training: Sequence[Any], held_out: Sequence[Any]) -> tuple[int, int]:
    """How many examples of the held-out loaders are in the training loaders, and of how many.

    Only what is certain counts: the same data set object, with known indices. Samplers of unknown kind, iterable data
    sets and whatever is no DataLoader are passed over.

    Args:
        training: Loaders.
        held_out: Loaders.

    >>> data = torch.utils.data.TensorDataset(torch.rand(10, 2))
    >>> shared_examples([DataLoader(Subset(data, range(6)))], [DataLoader(Subset(data, range(4, 10)))])
    (2, 6)
    """
    known = [found for found in map(_examples, training) if found is not None]
    shared = count = 0
    for dataset, indices in (found for found in map(_examples, held_out) if found is not None):
        drawn = set(indices)
        seen = {index for base, others in known if base is dataset for index in others if index in drawn}
        shared, count = shared + len(seen), count + len(drawn)
    return shared, count


def _examples(loader: Any) -> tuple[Dataset[Any], Iterable[int]] | None:
    """The data set at the bottom of a loader, and which of its examples are drawn."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader.batch_sampler) not in (BatchSampler, type(None)) or not hasattr(loader.dataset, "__len__"):
        return None
    sampler = loader.sampler
    indices: Sequence[int]
    if isinstance(sampler, SubsetRandomSampler):
        indices = list(sampler.indices)
    elif isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler):
        source = sampler.dataset if isinstance(sampler, DistributedSampler) else sampler.data_source
        if source is not loader.dataset:
            return None
        indices = range(len(loader.dataset))
    else:
        return None
    dataset: Any = loader.dataset
    while isinstance(dataset, Subset):
        indices = [int(dataset.indices[index]) for index in indices]
        dataset = dataset.dataset
    return dataset, indices
