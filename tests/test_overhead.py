"""What the methods cost: the READMEs have the committed results, whose ratios are within their bounds."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from lightning_tpgm import constrain
from lightning_tpgm.methods import FTP
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


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_the_transcription_of_ftp_is_ftp(norm: Norm) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    naive = deepcopy(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, naive)]
    constrain(ours, FTP(radius_lr=1e-2, norm=norm), optimizers[0])
    steps = [optimizers[0].step, load("naive").NaiveFTP(optimizers[1], norm).step]
    for _ in range(6):
        batch = torch.randn(4, 8)
        for model, step in zip((ours, naive), steps, strict=True):
            model.zero_grad()
            model(batch).square().mean().backward()
            step()
    torch.testing.assert_close(ours.state_dict(), naive.state_dict(), rtol=1e-4, atol=1e-6)
