"""Was a module ever given weights? Found by looking at its numbers."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_tpgm.sharding import local

NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
LINEAR = (nn.Linear, nn.modules.conv._ConvNd)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # others cannot be compared everywhere
_ENOUGH = 256  # entries from which a uniform distribution can be recognised


def never_trained(module: nn.Module) -> str | None:
    """What shows that a module holds its random initialisation; None if nothing does.

    Only what training never leaves behind counts. One sign is that every normalisation layer has weights of exactly 1
    and biases of exactly 0. The other is for modules of linear and convolution layers alone: all weights fill the
    interval of torch's default initialisation, +- 1 / sqrt(fan_in). A layer that looks trained speaks against both.
    Where parameters are split over processes each looks at its own part: nothing here is collective.
    """
    norms = linear = entries = 0
    others = False
    with torch.no_grad():
        for part in module.modules():
            own = list(part.parameters(recurse=False))
            if any(nn.parameter.is_lazy(parameter) for parameter in own):
                others = True
            elif isinstance(part, NORM_LAYERS) and own:
                if not untouched(part):
                    return None
                norms += 1
            elif isinstance(part, LINEAR) and own:
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


def values_of(part: nn.Module, name: str) -> Tensor | None:
    """A parameter of the module itself, not computed by a parametrization; this process's part."""
    parameter = part._parameters.get(name)
    if parameter is None or parameter.dtype not in _DTYPES or not local(parameter).numel():
        return None
    return local(parameter.detach())


def untouched(norm: nn.Module) -> bool:
    """Whether a normalisation layer has weights of 1, biases of 0 and no statistics yet."""
    weight, bias = values_of(norm, "weight"), values_of(norm, "bias")
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
    weight, bias = values_of(layer, "weight"), values_of(layer, "bias")
    whole = layer._parameters.get("weight")
    if weight is None or whole is None:
        return False, False
    bound = prod(whole.shape[1:]) ** -0.5  # no indexing: of a split tensor that would be collective
    inside = all(bool((own.abs() <= 1.01 * bound).all()) for own in (weight, bias) if own is not None)
    filled = weight.numel() < _ENOUGH or abs(float(weight.float().std()) * 3**0.5 / bound - 1) < 0.1
    return inside and filled, not inside and bias is not None and bool(bias.any())
