"""Tensors that are split over processes (FSDP2, tensor parallel): what each process computes, and what must be summed.

Every process works on its own part of a tensor. Distances need a sum over processes only where a row is split, maxima
and inner products wherever the tensor is. All values of one kind travel in one flat vector per group of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_tpgm.layout import Layout
from lightning_tpgm.norms import Norm, from_sums, row_dims

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Replicate
except ImportError:  # before torch 2.6
    from torch.distributed._composable.fsdp import FSDPModule  # type: ignore[attr-defined]
    from torch.distributed._tensor import DTensor, Replicate  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a tensor that is not split is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is split over, or kept in step by, several processes."""
    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every process. Collective: every process must call it."""
    if isinstance(tensor, DTensor):  # an anchor may be kept where processes do not talk
        tensor = tensor.to(tensor.device_mesh.device_type)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_gradient(grad: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a gradient, split like its parameter, and dense."""
    if grad.is_sparse:
        grad = grad.to_dense()
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
        grad = grad.redistribute(placements=parameter.placements)
    return local(grad)


def split_gradients(parameters: Iterable[Tensor]) -> None:
    """Split each ``.grad`` like its parameter, so that `local_gradient` is a part of it and no copy. Collective."""
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
            parameter.grad = grad.redistribute(placements=parameter.placements)


def split_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor that is to be split like a parameter; no communication."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return local(value)
    mesh = parameter.device_mesh
    whole = DTensor.from_local(value.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(whole.redistribute(placements=parameter.placements))


def reshard(module: nn.Module) -> None:
    """Make FSDP2 modules let go of gathered weights, which would hide a change of the sharded ones."""
    for part in gathering(module):
        part.reshard()  # type: ignore[operator]  # an FSDPModule has it


def is_fsdp2(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` was applied to the module itself."""
    return isinstance(module, FSDPModule)


def gathering(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that FSDP2's ``fully_shard`` was applied to."""
    return [module for module in model.modules() if is_fsdp2(module)]


class Sharding:
    """How constrained tensors are split over processes, and the sums that this asks for.

    Args:
        parameters: The constrained parameters.
        layout: Of this process's parts of them.
        norm: Says what a row is.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: Layout, norm: Norm) -> None:
        self._norm = norm
        # for each group of processes the indices of the tensors split over it: all of them, and those whose rows are
        split: dict[dist.ProcessGroup, list[int]] = {}
        rows_split: dict[dist.ProcessGroup, list[int]] = {}
        for index, parameter in enumerate(parameters):
            if not isinstance(parameter, DTensor):
                continue
            for mesh_dim, placement in enumerate(parameter.placements):
                if not placement.is_replicate():
                    group = parameter.device_mesh.get_group(mesh_dim)
                    split.setdefault(group, []).append(index)
                    # not `is_shard`: a part that is split again, tensor parallel and then FSDP2, denies it
                    if getattr(placement, "dim", None) in row_dims(parameter.ndim, norm):
                        rows_split.setdefault(group, []).append(index)
        self._split = {group: layout.on_device(indices, torch.long) for group, indices in split.items()}
        self._rows_split = {group: layout.rows_of(indices) for group, indices in rows_split.items()}

    def distances(self, sums: Tensor) -> Tensor:
        """The norms of whole rows from the sums of their parts, see `lightning_tpgm.blocks.sums`, (..., rows)."""
        for group, rows in self._rows_split.items():
            parts = sums.index_select(-1, rows)
            dist.all_reduce(parts, group=group)
            sums = sums.index_copy(-1, rows, parts)
        return from_sums(sums, self._norm)

    def largest(self, values: Tensor) -> Tensor:
        """The largest value of each whole tensor from those of its parts, shape (T,)."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def smallest(self, values: Tensor) -> Tensor:
        """The smallest value of each whole tensor from those of its parts, shape (T,)."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes that hold parts of each tensor, shape (..., T)."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def _reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        for group, indices in self._split.items():
            part = values.index_select(-1, indices)
            dist.all_reduce(part, op=op, group=group)
            values = values.index_copy(-1, indices, part)
        return values


def mean_over_processes(vector: Tensor) -> Tensor:
    """The mean of a vector over all processes, by one reduction, which no barrier precedes."""
    dist.all_reduce(vector)
    return vector / dist.get_world_size()
