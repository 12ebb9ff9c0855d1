"""What the methods cost: the READMEs have the committed results, whose ratios are within their bounds."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_tpgm import constrain
from lightning_tpgm.methods import FTP, SPD, TPGM, DiGraP, Method
from lightning_tpgm.norms import Norm

pytest.importorskip("matplotlib", reason="the report draws a figure")


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "overhead" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"overhead_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load("report")


def test_readmes_have_the_tables_of_the_committed_results(report: ModuleType) -> None:
    for path, text in report.documents().items():
        assert path.read_text() == text


def test_committed_ratios_are_within_their_bounds(report: ModuleType) -> None:
    times = report.read(report.RESULTS / "times.csv")
    assert report.too_slow(times) == []
    times["ViT-B/16", 8]["TPGM, l2"] *= 2
    times["MiniLM-L6", 32]["SPD"] *= 50
    found = report.too_slow(times)
    assert len(found) == 2
    assert "ViT-B/16, batch 8: TPGM, l2 / floor" in found[0]
    assert "MiniLM-L6, batch 32: plain + SPD" in found[1]
    times["ResNet-50", 1] |= {"FTP, mars": 0.8, "naive FTP": 1.0}
    times["20 tensors", 1] |= {"FTP, mars": 0.8, "naive FTP": 1.0}
    (found,) = set(report.too_slow(times)) - set(found)
    assert "ResNet-50, batch 1: FTP, mars / naive FTP = 0.80" in found


PEERS: dict[str, tuple[Callable[[], Method], Callable[[ModuleType, torch.optim.Optimizer], Any]]] = {
    "FTP, mars": (lambda: FTP(radius_lr=1e-2), lambda naive, optimizer: naive.NaiveFTP(optimizer, "mars")),
    "FTP, l2": (lambda: FTP(radius_lr=1e-2, norm="l2"), lambda naive, optimizer: naive.NaiveFTP(optimizer, "l2")),
    "SPD": (SPD, lambda naive, optimizer: naive.NaiveSPD(optimizer)),
    "DiGraP": (lambda: DiGraP(omega_lr=1e-2), lambda naive, optimizer: naive.NaiveDiGraP(optimizer)),
}


def networks(count: int) -> list[nn.Module]:
    """As many that are the same."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return [deepcopy(network) for _ in range(count)]


def differ(ours: nn.Module, theirs: nn.Module) -> bool:
    """By more than rounding."""
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return any((a - b).abs().max() > 1e-3 for a, b in pairs)


@pytest.mark.parametrize("name", PEERS)
def test_a_transcription_is_the_method(name: str) -> None:
    start, free, ours, theirs = networks(4)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (free, ours, theirs)]
    method, peer = PEERS[name]
    constrain(ours, method(), optimizers[1])
    steps = [optimizers[0].step, optimizers[1].step, peer(load("naive"), optimizers[2]).step]
    for _ in range(8):
        inputs, classes = torch.randn(4, 8), torch.randint(3, (4,))
        for model, step in zip((free, ours, theirs), steps, strict=True):
            model.zero_grad()
            nn.functional.cross_entropy(model(inputs), classes).backward()
            step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
    assert differ(ours, start)
    assert differ(ours, free)


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_the_transcription_of_tpgm_is_tpgm(norm: Norm) -> None:
    ours, theirs = networks(2)
    held_out = [torch.randn(16, 8), torch.randint(3, (16,))]
    loss = nn.functional.cross_entropy
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    method = TPGM(radius_lr=1e-2, norm=norm, every_n_steps=1)
    constrain(ours, method, optimizers[0], held_out_loss=lambda: loss(ours(held_out[0]), held_out[1]))
    wrapped = SimpleNamespace(model=theirs)
    naive = load("naive").NaiveTPGM(wrapped, norm)
    for _ in range(8):
        inputs, classes = torch.randn(4, 8), torch.randint(3, (4,))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.zero_grad()
            loss(model(inputs), classes).backward()
            optimizer.step()
        naive(wrapped, held_out)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-6)
