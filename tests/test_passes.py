"""Memory is read and written as often as docs/cost.md says, counted with a model of the processor's cache."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_tpgm.groups
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.methods import FTP, L2SP, SPD, TPGM, AnchorDecay, DiGraP, Method, Step, WiSEFT

SHAPE, BLOCK = (64, 128), 512

METHODS: dict[str, Callable[[], Method]] = {
    "TPGM, no update": lambda: TPGM(every_n_steps=100),
    "TPGM, update": lambda: TPGM(every_n_steps=1),
    "FTP": FTP,
    "SPD": SPD,
    "DiGraP": DiGraP,
    "L2-SP": L2SP,
    "AnchorDecay": AnchorDecay,
    "WiSE-FT, at the end": WiSEFT,
}


def table() -> str:
    return (Path(__file__).parents[1] / "docs" / "cost.md").read_text().partition("| passes |")[2].partition("\n\n")[0]


def documented() -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^\| ([^|]+) \| (\d+) \|", table(), re.MULTILINE)}


def documented_at_rest() -> dict[str, int]:
    """On a CPU, where a method changes nothing."""
    return {name: int(n) for name, n in re.findall(r"^\| ([^|]+) \| \d+ .* (\d+) on a CPU", table(), re.MULTILINE)}


def documented_of_16_bits() -> dict[str, int]:
    """Where weights of 16 bits take another number."""
    return {name: int(n) for name, n in re.findall(r"^\| ([^|]+) \| \d+ .* 16 bits: (\d+)", table(), re.MULTILINE)}


class Memory(TorchDispatchMode):
    """Counts the elements that are read from memory and written to it.

    The cache keeps the blocks that were used last. Only storages that are larger than a block are memory: what is
    computed of a block stays in the cache.
    """

    CACHED = 8  # enough for what works on one block, and not for a second pass to find the first one's blocks

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self._cached: OrderedDict[tuple[int, int], set[str]] = OrderedDict()  # blocks, and what was done to them

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        schema = function._schema
        if function.is_view or "empty" in schema.name:
            return result
        given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | (kwargs or {})
        writes = [argument.name for argument in schema.arguments if argument.is_write]
        overwrites = "copy_" in schema.name or any(argument.is_out for argument in schema.arguments)
        for name, value in given.items():
            if name not in writes or not overwrites:
                self._use(value, "read")
            if name in writes:
                self._use(value, "written")
        if not writes:
            self._use(result, "written")
        return result

    def _use(self, value: Any, how: str) -> None:
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > BLOCK * tensor.element_size():
                key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
                done = self._cached.pop(key, set[str]())
                if how not in done and not (how == "read" and "written" in done):
                    self.elements += tensor.numel()
                if tensor.numel() <= BLOCK:
                    self._cached[key] = done | {how}
                    if len(self._cached) > self.CACHED:
                        self._cached.popitem(last=False)


class HeldOut:
    """A gradient that costs nothing."""

    processes = 1

    def __call__(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        return torch.ones(()), [parameter.grad for parameter in parameters]

    def mean(self, vector: Tensor) -> Tensor:
        return vector


def passes(
    method: Method, gradient: Callable[[Tensor], Tensor] = torch.randn_like, dtype: torch.dtype = torch.float32
) -> float:
    """Elements that a method reads and writes in the third step, or at the end, over those under constraint.

    ``gradient`` makes one from a deviation, ``dtype`` is that of the weights.
    """
    weight = nn.Parameter(torch.randn(SHAPE, dtype=dtype))
    anchor = weight.detach().clone()
    tensors = Constrained({"weight": weight}, {"weight": anchor}, method.norm)
    tensors.prepare(method.has_radii)
    method.joined(tensors, ["weight"])
    optimizer = torch.optim.SGD([weight], lr=0.1)
    step, memory = Step(optimizer, 0), Memory()
    for _ in range(3):
        weight.grad, memory = gradient(weight - anchor), Memory()
        with memory:
            method.before(tensors, step)
            method.change_gradients(tensors, step)
        optimizer.step()
        with memory:
            method.after(tensors, step)
            if method.acts_at_end:
                method.finish(tensors)
    return memory.elements / weight.numel()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_tpgm.groups, "SHARED", 16)
    monkeypatch.setitem(lightning_tpgm.groups.BLOCK, "cpu", BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_memory_is_read_and_written_as_often_as_documented(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted as on a device that the host would wait for."""
    monkeypatch.setattr(Constrained, "may_be_some", lambda tensors, _: [True] * len(tensors.names))
    method = METHODS[name]()
    if isinstance(method, TPGM):
        method.held_out = HeldOut()  # type: ignore[assignment]
    expected = documented() | (documented_of_16_bits() if dtype == torch.bfloat16 else {})
    with torch.no_grad():
        assert passes(method, dtype=dtype) == expected[name]


@pytest.mark.parametrize("name", documented_at_rest())
def test_on_a_cpu_what_does_not_change_is_left_alone(name: str) -> None:
    leads_away = {"SPD": lambda d: -d - 1e-3, "DiGraP": lambda d: d + 1e-3}[name]  # what neither minds
    with torch.no_grad():
        assert passes(METHODS[name](), leads_away) == documented_at_rest()[name]


def test_the_table_has_every_method() -> None:
    assert [*documented()] == [*METHODS]
    assert [*documented_at_rest()] == ["SPD", "DiGraP"]
    assert [*documented_of_16_bits()] == ["FTP"]
