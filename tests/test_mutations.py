"""Lines of the package that a change could spoil while runs still look right: each is pinned by what it gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_tpgm import TPGMCallback, constrain
from lightning_tpgm.callbacks.isolation import Isolation
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods import L2SP
from lightning_tpgm.methods.radii import Radii
from lightning_tpgm.projection import radius_slope
from lightning_tpgm.sharding import local_gradient
from properties import assert_same
from toys import quiet_trainer, train_loader, val_loader

# --- the gradient of a radius: rows at the boundary


def test_rows_at_the_boundary_do_not_count() -> None:
    """gamma / (n + eps) = 1 exactly: the projection leaves the row as it is, and a larger radius changes nothing."""
    distance, dot = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([3.0, 3.0, 3.0, 3.0])
    radius = torch.tensor(1.0)
    assert float(radius / (distance[1] + 1e-8)) == 1
    assert radius_slope(dot, distance, radius).tolist() == pytest.approx([0, 0, 1.5, 0.75])
    assert radius_slope(dot, distance, torch.tensor(0.0)).tolist() == [0, 0, 0, 0]


def test_a_tensor_on_the_sphere_of_its_radius_has_no_slope() -> None:
    """As it is right after a radius was clamped to the largest distance."""
    weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 0.25]]))
    with torch.no_grad():
        tensors = Constrained({"w": weight}, {"w": torch.zeros(2, 2)}, "mars")
        radii = Radii(0.1)
        radii.add(["w"])
        weights = tensors.weights()
        rows = tensors.rows(weights)
        radii.start(tensors.largest(rows))
        assert radii.value.tolist() == [1]
        assert radii.slope(tensors, tensors.arrange([torch.ones(2, 2)]), weights, rows).tolist() == [0]


# --- what a step changes is put back


class Bare(pl.LightningModule):
    """A module without anything, to hang one thing on."""


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_expanded_buffers_are_put_back(shape: tuple[int, ...]) -> None:
    """Several elements have one memory: written all at once, torch refuses them."""
    module = Bare()
    own = torch.arange(1.0, 3.0)[: shape[0] if len(shape) == 2 else 1].unsqueeze(-1)
    module.register_buffer("table", own.expand(2, 3) if len(shape) == 2 else own.squeeze(-1).expand(3))
    module.seen = torch.zeros(1).expand(4)  # an attribute is no other
    table, before = module.table, module.table.clone()
    assert 0 in table.stride()
    with Isolation().no_trace(quiet_trainer(), module):
        own += 5
        module.seen[:1] += 1
        assert not torch.equal(table, before)
    assert module.table is table
    assert table.stride() == module.table.stride()
    assert_same(table.clone(), before)
    assert module.seen.tolist() == [0] * 4


@pytest.mark.parametrize("changes", [True, False])
def test_a_graph_through_a_buffer_survives(changes: bool) -> None:
    """Two graphs through one buffer, in-place changes between their backwards: both find the version they saw."""
    module = Bare()
    module.register_buffer("factor", torch.tensor([2.0, 3.0]))
    weight = nn.Parameter(torch.ones(2))
    first, second = ((weight * module.factor).sum() for _ in range(2))
    first.backward()
    version = module.factor._version
    with Isolation().no_trace(quiet_trainer(), module):
        if changes:
            module.factor.mul_(10)
            module.factor.add_(1)
    assert module.factor._version == version
    second.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [4, 6]


class TwoGraphs(pl.LightningModule):
    """Manual optimization: both losses are there before the first of two optimizers steps, and share a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(16, 2), nn.Linear(16, 2)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))

    def losses(self, batch: Any) -> list[Tensor]:
        return [(part(batch[0].flatten(1)) * self.scale - batch[1]).square().mean() for part in (self.left, self.right)]

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.scale.mul_(1.5)
        return sum(self.losses(batch), torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        losses = self.losses(batch)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        groups = [[*self.left.parameters(), self.unused], [*self.right.parameters()]]
        return [torch.optim.SGD(group, lr=0.1) for group in groups]


def test_manual_optimization_with_two_graphs_through_one_buffer() -> None:
    """The held-out loss is evaluated between the two backwards, and the run is the one without it."""
    runs = []
    for callbacks in ([TPGMCallback(exclude=["left.*", "right.*"], loss="validation_step", radius_steps=2)], []):
        module = TwoGraphs()
        quiet_trainer(*callbacks, limit_val_batches=0).fit(module, train_loader(3), val_loader())
        runs.append(dict(module.state_dict()))
    assert_same(*runs)


class Key:
    """Equal to every other one."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key)

    def __hash__(self) -> int:
        return 0


def test_mappings_get_back_their_own_keys_and_values_in_order() -> None:
    """However many there are afterwards: another key, another order, an equal key or value that is another object."""
    shared, key = [1.0], Key()
    tables: dict[str, dict[Any, Any]] = {
        "another key": {"a": 1, "b": 2},
        "another order": {"a": shared, "b": shared},
        "an equal key": {key: shared},
        "an equal value": {"a": shared},
        "fewer": {"a": 1, "b": 2},
    }
    module = Bare()
    module.tables = tables
    before = {name: list(table.items()) for name, table in tables.items()}
    with Isolation().no_trace(quiet_trainer(), module):
        tables["another key"]["c"] = tables["another key"].pop("a")
        tables["another order"]["a"] = tables["another order"].pop("a")
        tables["an equal key"][Key()] = tables["an equal key"].pop(key)
        tables["an equal value"]["a"] = [1.0]
        del tables["fewer"]["a"]
    for name, table in tables.items():
        assert list(table) == [k for k, _ in before[name]], name
        for (k, value), (kept_key, kept) in zip(table.items(), before[name], strict=True):
            assert k is kept_key, name
            assert value is kept, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("again", ["first", "third"])
def test_buffers_keep_their_names_in_order(tied: bool, again: str) -> None:
    """As in a checkpoint, though they are the same tensors, and as many, under other names or in another order."""
    module, first = Bare(), torch.zeros(2)
    buffers = {"first": first, "second": first if tied else torch.ones(2)}
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    with Isolation().no_trace(quiet_trainer(), module):
        del module.first
        module.register_buffer(again, first)
        assert list(module.state_dict()) == ["second", again]
    assert list(module.state_dict()) == ["first", "second"]
    assert all(getattr(module, name) is buffer for name, buffer in buffers.items())


# --- gradients of tensors that are split over processes


@pytest.fixture
def second_of_two() -> Iterator[DeviceMesh]:
    """A mesh in which this process is the second of two, of which there is no first: nothing is communicated."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def test_a_gradient_is_split_like_its_parameter(second_of_two: DeviceMesh) -> None:
    """Autograd may leave a replicated gradient of a parameter that is split."""
    values = torch.arange(12.0).reshape(4, 3)
    gradient = DTensor.from_local(values, second_of_two, [Replicate()], run_check=False)
    for dim, mine in {0: values[2:], 1: values[:, 2:]}.items():
        parameter = nn.Parameter(gradient.redistribute(placements=[Shard(dim)]))
        assert_same(local_gradient(gradient, parameter), mine.contiguous())
        tensors = Constrained({"w": parameter}, {"w": parameter.detach()}, "l2")
        assert_same(tensors.part(gradient, 0), mine.contiguous())


def test_what_is_added_to_a_gradient_that_is_split_otherwise_stays(second_of_two: DeviceMesh) -> None:
    """The gradient that the optimizer sees is split first."""
    zeros = DTensor.from_local(torch.zeros(4, 3), second_of_two, [Replicate()], run_check=False)
    module = nn.Module()
    module.weight = nn.Parameter(zeros.redistribute(placements=[Shard(0)]))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    constraint = constrain(module, L2SP(2.0), optimizer)
    with torch.no_grad():
        module.weight.to_local().add_(1.0)
    module.weight.grad = zeros.clone()
    optimizer.step()
    assert module.weight.grad.placements == (Shard(0),)
    assert module.weight.grad.to_local().tolist() == [[2.0] * 3] * 2
    constraint.steps.stop()
