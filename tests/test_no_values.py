"""Without a GPU at hand: fits on the device meta, whose tensors have a shape and a dtype, but no values.

Most operations find out there if their operands are on two devices, and whatever asks for a value fails: it would make
the host wait for a GPU. `test_gpu.py` shows the same, and the values, on a real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

import lightning_tpgm.groups
from lightning_tpgm import (
    AnchorDecayCallback,
    DiGraPCallback,
    FTPCallback,
    L2SPCallback,
    SPDCallback,
    TPGMCallback,
    WiSEFTCallback,
    constrain,
)
from lightning_tpgm.callbacks.method import MethodCallback
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.groups import SHARED
from lightning_tpgm.methods import Method, WiSEFT
from toys import quiet_trainer

METHODS: dict[str, Callable[..., MethodCallback]] = {
    "tpgm": lambda **options: TPGMCallback([torch.ones(2, 3)], every_n_steps=1, **options),
    "tpgm l2": lambda **options: TPGMCallback(
        [torch.ones(2, 3)], norm="l2", radius_steps=2, every_n_steps=1, **options
    ),
    "ftp": FTPCallback,
    "digrap": DiGraPCallback,
    "spd": SPDCallback,
    "l2sp": L2SPCallback,
    "anchor decay": AnchorDecayCallback,
}


class AnyDevice(CPUAccelerator):
    """Has nothing to set up."""

    @override
    def setup_device(self, device: torch.device) -> None:
        pass


class Enough(Exception):
    """Ends a fit before anything reads the results."""


class Module(pl.LightningModule):
    """Large and small tensors of several shapes; one has no gradient in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(SHARED, 3))
        self.vectors = nn.ParameterList(torch.zeros(3) for _ in range(4))
        self.scales = nn.Parameter(torch.ones(2, 1))

    @override
    def cpu(self) -> Module:  # Lightning calls it at the end
        return self

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        used = list(self.vectors)[0 if batch_idx else 1 :]
        return (batch * self.scales * torch.stack(used).sum(0) @ self.matrix.T).square().mean()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 3:
            raise Enough

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, foreach=True)


class Arrivals(TorchFunctionMode):
    """The sizes of what went from the host to the device; nothing else has operands on both, as is possible here."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    @override
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        assert len({operand.device for operand in operands}) <= 1, function
        if function is Tensor.to and args[0].is_cpu and result.is_meta:
            self.sizes.append(result.numel())
        return result


def arrivals_in_four_steps(callback: MethodCallback) -> list[list[int]]:
    """What arrived on the device in the callback's share of each step."""
    steps: list[list[int]] = []

    def watched(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with Arrivals() as arrivals:
                function(*args)
            steps.append(arrivals.sizes)

        return run

    made = callback.make_method

    def make_method() -> Method:
        found = made()
        for name in ("change_gradients", "before", "after"):
            setattr(found, name, watched(getattr(found, name)))
        return found

    callback.make_method = make_method  # type: ignore[method-assign]
    strategy = SingleDeviceStrategy(torch.device("meta"))
    trainer = quiet_trainer(callback, max_steps=9, max_epochs=None, strategy=strategy, accelerator=AnyDevice())
    with pytest.raises(Enough):
        trainer.fit(Module(), iter([torch.ones(2, 3)] * 9))  # no length: Lightning would reduce it over processes
    return steps


PRETRAINED = Module().state_dict()
SMALL = 6  # the held-out batch, and one value of each tensor, may come at any time


@pytest.mark.parametrize("method", METHODS)
def test_cheap_no_step_waits_for_a_value(method: str) -> None:
    steps = arrivals_in_four_steps(METHODS[method]())
    assert len(steps) >= 4
    assert all(size <= SMALL for sizes in steps for size in sizes)


def test_a_learning_rate_on_the_device_is_not_read() -> None:
    """As an optimizer has it whose step is captured or compiled. Another group may have a number."""
    parameters = {name: torch.zeros(3, device="meta") for name in "abc"}
    a, b, c = parameters.values()
    rate = torch.full((1,), 0.1, device="meta", dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": [a, c], "lr": rate}, {"params": [b], "lr": 0.2}])
    found = Constrained(parameters, parameters, "l2").learning_rates(optimizer)
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.float32, (3,))


def test_rates_of_several_groups_in_the_order_of_the_tensors() -> None:
    parameters = {name: torch.zeros(3, dtype=torch.float64) for name in "abc"}
    a, b, c = parameters.values()
    for rate in (0.1, torch.tensor([0.1], dtype=torch.float64)):
        optimizer = torch.optim.SGD([{"params": [b], "lr": 0.2}, {"params": [c, a], "lr": rate}])
        assert Constrained(parameters, parameters, "l2").learning_rates(optimizer).tolist() == [0.1, 0.2, 0.1]


# how often a step reads the anchors
READS = {"tpgm": 4, "tpgm l2": 6, "ftp": 2, "digrap": 1, "spd": 2, "l2sp": 1, "anchor decay": 1}


@pytest.mark.parametrize("method", METHODS)
def test_anchors_in_the_hosts_memory_come_to_the_device_and_go(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_tpgm.groups, "LARGE_BLOCK", 3000)
    callback = METHODS[method](pretrained=PRETRAINED, anchor_device="cpu")
    sizes = [size for sizes in arrivals_in_four_steps(callback) for size in sizes if size > SMALL]
    assert max(sizes) == 3000
    assert sum(sizes) == 4 * READS[method] * PRETRAINED["matrix"].numel()
    assert all(anchor.is_cpu for anchor in callback.anchor.values())


AT_END: dict[str, Callable[..., MethodCallback]] = {
    "tpgm": lambda **options: TPGMCallback([torch.ones(2, 3)], when="fit_end", **options),
    "wise-ft": WiSEFTCallback,
}


@pytest.mark.parametrize("method", AT_END)
def test_anchors_for_the_end_are_in_the_hosts_memory_until_then(method: str) -> None:
    callback = AT_END[method](pretrained=PRETRAINED)
    arrivals_in_four_steps(callback)
    assert callback.anchor
    assert all(anchor.is_cpu for anchor in callback.anchor.values())


@pytest.mark.parametrize("used_on", ["meta", "cpu"])
def test_anchors_for_the_end_come_to_the_device_then(used_on: str) -> None:
    """Once, unless `anchor_device` says otherwise; a state that is loaded later puts them aside again."""
    device: Any = "cpu" if used_on == "cpu" else None
    constraint = constrain(Module().to("meta"), WiSEFT(), pretrained=PRETRAINED, anchor_device=device)
    state = constraint.state_dict()
    for _ in range(2):
        assert {anchor.device.type for anchor in constraint.anchor.values()} == {"cpu"}
        constraint.finish()
        before = constraint.anchor
        assert {anchor.device.type for anchor in before.values()} == {used_on}
        constraint.finish()
        assert all(constraint.anchor[name] is before[name] for name in before)
        constraint.load_state_dict(state)
