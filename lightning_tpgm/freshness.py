"""Which layers of a pretrained module nobody has trained: its new head. Found by looking at their numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_tpgm.drawn import drawn, uniform_bounds
from lightning_tpgm.initialisation import LINEAR, NORM_LAYERS, untouched, values_of

_ENOUGH = 256  # entries from which a layer is judged
_MANY = 4096  # entries from which a layer without a bias is
_SAMPLE = 65_536  # entries that are looked at
_FEW = 4  # patterns that a message may have: fresh layers all over a module are by design
_LIMIT = 4.0  # standard deviations
_ZEROS = "all zeros"
_UNKNOWN = "nobody can tell"
_WEIGHTS = (  # by which a layer is judged, and the bias beside it
    ((*LINEAR, nn.Embedding), "weight", "bias"),
    ((nn.MultiheadAttention,), "in_proj_weight", "in_proj_bias"),
    ((nn.MultiheadAttention,), "q_proj_weight", "in_proj_bias"),  # where keys or values have another width
    ((nn.RNNBase,), "weight_hh_l0", "bias_hh_l0"),
)
_ADAPTER = re.compile(r"lora_|adapter", re.IGNORECASE)


class FreshLayers(NamedTuple):
    """Layers that look freshly initialised, in a module that looks trained.

    Attributes:
        names: Their weights' names.
        how: How the first of them was initialised.
        patterns: What matches their parameters and no others, for ``exclude``.
    """

    names: tuple[str, ...]
    how: str
    patterns: tuple[str, ...]

    def text(self, title: str, exclude: Sequence[str]) -> str:
        """What is the matter, and the line that mends it.

        Args:
            title: What constrains them.
            exclude: What is excluded already.
        """
        shown = ", ".join(f"`{name}`" for name in self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        one = len(self.names) == 1
        kept = "zero" if self.how == _ZEROS else "random values"
        return (
            f"{title}: {shown} {'looks' if one else 'look'} freshly initialised ({self.how}), while other layers look"
            f" trained. {title} keeps {'it' if one else 'them'} near {kept}. Leave {'it' if one else 'them'} free:"
            f" exclude={[*exclude, *self.patterns]}."
        )


class _Layer(NamedTuple):
    path: str
    name: str | None  # of its weight. None: it is not constrained
    own: frozenset[int]  # its parameters
    how: str | None  # it was initialised. None: it looks trained
    small: bool  # too few entries to be a reason for an alarm, or against one; not if it is fresh to the last bit

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


def fresh_layers(module: nn.Module, constrained: Mapping[str, Tensor]) -> FreshLayers | None:
    """The constrained layers that look freshly initialised, if they are few and most others look trained.

    Linear, convolution, embedding, recurrent and attention layers are judged. One sign is enough: every bit is as torch
    draws it. Otherwise the distribution is judged, of 256 entries and more. A normal one cannot be told without a bias
    of zero beside it. Adapters start at random, and at zero, by design: layers that are named so, and those beside a
    layer of zeros, are no evidence. Each process looks at its own part: nothing here is collective.

    Args:
        module: The module.
        constrained: Those of its parameters that are constrained, by name.
    """
    with torch.no_grad():
        found = list(_judged(module, {id(parameter): name for name, parameter in constrained.items()}))
        layers = [layer for layer in found if not layer.small]
        at_zero = {layer.parent for layer in found if layer.how == _ZEROS}
        at_random = {layer.parent for layer in layers if layer.how not in (None, _ZEROS)}
        fresh = [layer for layer in layers if layer.name and layer.how and layer.parent not in at_zero & at_random]
        trained = sum(layer.how is None for layer in layers)
        if not fresh or len(fresh) >= trained:
            return None
        small = [layer for layer in found if layer.small and layer.how]  # perhaps beside a fresh one
        patterns = _patterns(module, constrained, fresh, small)
    if len(patterns) > _FEW:
        return None
    return FreshLayers(tuple(layer.name for layer in fresh if layer.name), fresh[0].how or "", patterns)


def _judged(module: nn.Module, names: Mapping[int, str]) -> Iterator[_Layer]:
    seen = set()
    for path, part in module.named_modules():
        for kinds, weight, bias in _WEIGHTS:
            whole = part._parameters.get(weight)
            if not isinstance(part, kinds) or whole is None or nn.parameter.is_lazy(whole):
                continue
            values = values_of(part, weight)
            if values is None or values.ndim < 2 or id(whole) in seen or _ADAPTER.search(path):
                continue
            seen.add(id(whole))  # tied ones count once
            drawn_as = drawn(values, whole.shape) if values.any() else None
            how = drawn_as or _initialised(values, whole.shape, values_of(part, bias), isinstance(part, nn.Embedding))
            if how != _UNKNOWN:
                own = frozenset(id(parameter) for parameter in part.parameters(recurse=False))
                small = values.numel() < _ENOUGH and drawn_as is None
                yield _Layer(path, names.get(id(whole)), own, how, small)


def _patterns(
    module: nn.Module, constrained: Mapping[str, Tensor], fresh: list[_Layer], small: list[_Layer]
) -> tuple[str, ...]:
    """The shortest ones that match the parameters of these layers, what looks fresh beside them, and no others."""
    known = {id(parameter): name for name, parameter in constrained.items()}
    free = {identity for layer in fresh + small for identity in layer.own}
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if isinstance(part, NORM_LAYERS) and own and not any(map(nn.parameter.is_lazy, own)) and untouched(part):
            free.update(map(id, own))
    others = [name for identity, name in known.items() if identity not in free]
    patterns: dict[str, None] = {}
    for layer in fresh:
        names = [known[identity] for identity in layer.own if identity in known]
        prefix = layer.name.rpartition(".")[0] if layer.name else ""
        if not prefix or any(name.startswith(f"{prefix}.") == (name not in names) for name in (*names, *others)):
            patterns.update(dict.fromkeys(sorted(names)))  # no prefix matches them all and nothing else
            continue
        while (above := prefix.rpartition(".")[0]) and not any(name.startswith(f"{above}.") for name in others):
            prefix = above
        patterns[f"{prefix}.*"] = None
    return tuple(patterns)


def _initialised(values: Tensor, shape: torch.Size, bias: Tensor | None, padded: bool) -> str | None:
    """How a layer was initialised; None if it looks trained, `_UNKNOWN` if that cannot be told.

    Scale, distribution, independence of rows and columns, and bias must all be what an initialisation leaves. Of these
    two are sharp, and needed: a uniform distribution fills its interval to the ends, and a bias is zero to the bit. A
    normal distribution without such a bias is no evidence. It still passes all tests when training has moved it by a
    quarter of its norm; `drawn` tells it then.

    Args:
        values: This process's part of a layer's weight.
        shape: That of the whole weight.
        bias: The layer's bias, if it has any.
        padded: Whether a row may be zero by design.
    """
    values = values.flatten(1)
    at_zero = bias is not None and not bool(bias.any())
    z = _sample(values)
    if not bool(z.any()):
        return _ZEROS if (bias is None or at_zero) and not bool(values.any()) else None
    if padded:
        z = z[z.any(dim=1)]  # without the row of padding
    fan_in, fan_out = prod(shape[1:]), shape[0] * prod(shape[2:])
    default = 1 / sqrt(fan_in)  # of torch: uniform, of weight and bias
    if bias is not None and not _fills(bias, default, exactly=False):
        return None
    scale = float(z.square().mean().sqrt())
    for bound, how in uniform_bounds(shape):
        if _near(scale, bound / sqrt(3), z.numel(), 1.8) and _fills(values, bound) and _like_uniform(z / bound):
            return how if bias is not None or values.numel() >= _MANY else _UNKNOWN
    if min(values.shape) > 1 and _orthogonal(values):
        return "orthogonal"
    for std, how in (
        (0.02, "normal with standard deviation 0.02"),
        (0.01, "normal with standard deviation 0.01"),
        (1.0, "normal with standard deviation 1"),
        (sqrt(2 / (fan_in + fan_out)), "Xavier normal"),
        (sqrt(2 / fan_in), "Kaiming normal"),
        (sqrt(2 / fan_out), "Kaiming normal"),
        (default, "normal with standard deviation 1/sqrt(fan_in)"),
    ):
        if _near(scale, std, z.numel(), 3.0) and _like_normal(z / std):
            return how if at_zero else _UNKNOWN
    return None


def _sample(values: Tensor) -> Tensor:
    """Rows from all over a matrix, with columns from all over them."""
    limit = _SAMPLE if values.element_size() > 2 else _SAMPLE // 8  # in half precision more would show the rounding
    columns = values[:, :: -(-values.shape[1] // limit)]
    return columns[:: -(-columns.numel() // limit)].float()


def _near(scale: float, expected: float, count: int, kurtosis: float) -> bool:
    return abs((scale / expected) ** 2 - 1) < _LIMIT * sqrt((kurtosis - 1) / count)


def _fills(values: Tensor, bound: float, exactly: bool = True) -> bool:
    """Whether an interval holds all values and, with one of 12 / count nearest to its ends, is filled by them."""
    largest, rounding = float(values.abs().max()), 2 * torch.finfo(values.dtype).eps
    return largest <= bound * (1 + rounding) and (
        not exactly or largest >= bound * (1 - 12 / values.numel() - rounding)
    )


def _like_uniform(z: Tensor) -> bool:
    """Whether the entries of a matrix are independent and uniform in +-1."""
    return _independent(z * sqrt(3), 1.8, -0.865) and _follows(z, (z.flatten().sort().values + 1) / 2)


def _like_normal(z: Tensor) -> bool:
    """Whether the entries of a matrix are independent and standard normal."""
    return _independent(z, 3.0, 12.0) and _follows(z, torch.special.ndtr(z.flatten().sort().values))


def _follows(z: Tensor, cdf: Tensor) -> bool:
    """Kolmogorov-Smirnov test at 0.1%: ``cdf`` has the distribution's values at the sorted entries."""
    ranks = torch.arange(len(cdf) + 1, device=cdf.device) / len(cdf)
    farthest = torch.maximum(cdf - ranks[:-1], ranks[1:] - cdf).max()
    return float(farthest) * sqrt(z.numel()) < 1.95


def _independent(z: Tensor, kurtosis: float, excess: float) -> bool:
    """Whether rows and columns have the sums and the norms that independent entries of variance 1 give them.

    Args:
        z: Shape (rows, columns).
        kurtosis: Of an entry.
        excess: The excess kurtosis of an entry's square.
    """
    squares = (z.square() - 1) / sqrt(kurtosis - 1)
    found = [z.mean().abs() * sqrt(z.numel()), squares.mean().abs() * sqrt(z.numel())]
    for dim in (0, 1):
        count, others = z.shape[1 - dim], z.shape[dim]
        for values, kurtic in ((z, kurtosis - 3), (squares, excess)):
            degrees = 2 * count / (2 + kurtic / others)
            chi_square = (values.sum(dim) / sqrt(others)).square().mean()  # over its degrees of freedom
            spread = 2 / (9 * degrees)
            found.append((chi_square.pow(1 / 3) - 1 + spread) / sqrt(spread))  # Wilson and Hilferty: standard normal
    return bool((torch.stack(found) < _LIMIT).all())


def _orthogonal(values: Tensor) -> bool:
    """Whether the rows are, or the columns where there are fewer of them; of many the first ones."""
    rows = (values if len(values) <= values.shape[1] else values.T)[:64].float()
    products = rows @ rows.T
    size = products.diagonal().mean()
    tolerance = max(1e-4, 3 * torch.finfo(values.dtype).eps / sqrt(rows.shape[1]))  # what rounding leaves
    return bool(((products / size - torch.eye(len(rows), device=rows.device)).abs() < tolerance).all())
