"""What the methods cost: the READMEs have the committed results, whose ratios are within their bounds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
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
from test_passes import documented, documented_at_rest

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
    times, own = (report.read(report.RESULTS / f"{name}.csv") for name in ("times", "own"))
    assert report.too_slow(times, own) == []
    times["ViT-B/16", 8]["TPGM, l2"] *= 2
    times["MiniLM-L6", 32]["SPD"] *= 50
    found = report.too_slow(times, own)
    assert len(found) == 3
    assert "ViT-B/16, batch 8: TPGM, l2 / floor" in found[0]
    assert "ViT-B/16, batch 8: TPGM, l2 / naive" in found[1]
    assert "MiniLM-L6, batch 32: plain + SPD" in found[2]
    times["MiniLM-L6", 8]["TPGM, mars: projection"] *= 10
    (slow,) = set(report.too_slow(times, own)) - set(found)
    assert slow.startswith("MiniLM-L6, batch 8: plain + TPGM = ")
    assert slow.endswith("expected at most 1.3")
    found.append(slow)
    times["ResNet-50", 1] |= {"FTP, mars": 0.8, "naive FTP": 1.0}
    times["20 tensors", 1] |= {"FTP, mars": 0.8, "naive FTP": 1.0}
    (slow,) = set(report.too_slow(times, own)) - set(found)
    assert "ResNet-50, batch 1: FTP, mars / naive FTP = 0.80" in slow
    found.append(slow)
    times["20 tensors", 32] |= {"FTP, l2": 1.1, "naive FTP, l2": 1.0}
    (slow,) = set(report.too_slow(times, own)) - set(found)
    assert slow == "20 tensors, batch 32: FTP, l2 / naive FTP = 1.10, expected at most 1.0"


@pytest.mark.parametrize(("norm", "naive"), [("mars", "naive"), ("l2", "naive, l2")])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_tpgm_has_to_be_faster_than_its_transcription_where_that_can_be_told(
    report: ModuleType, batch: int, norm: str, naive: str
) -> None:
    times = report.read(report.RESULTS / "times.csv")
    for model in ("2,000 tiny tensors", "20 tensors"):
        slow = {**times, (model, batch): times[model, batch] | {f"TPGM, {norm}": 1.1, naive: 1.0}}
        assert report.too_slow(slow, {}) == [
            f"{model}, batch {batch}: TPGM, {norm} / naive = 1.10, expected at most 1.0",
        ]


def test_own_work_is_shown_over_its_passes_and_held_against_the_transcriptions(report: ModuleType) -> None:
    assert list(report.own_tables({})) == []
    own = {("ResNet-50", 1): {"copy": 2.0} | {name: float(passes) for name, passes in report.PASSES.items()}}
    own["ResNet-50", 1] |= {"naive FTP": 10.0, "naive SPD": 11.25, "naive DiGraP": 5.2}
    shares, peers = report.own_tables(own)
    assert shares.splitlines()[-1] == "| ResNet-50 |" + 7 * " 1.00 |"
    assert peers.splitlines()[-1] == "| ResNet-50 | 1.25 | 1.50 | 0.80 |"
    assert report.too_slow({}, own) == [
        "ResNet-50, own work: FTP / naive FTP = 0.80, expected at most 0.71",
        "ResNet-50, own work: DiGraP / naive DiGraP = 1.25, expected at most 1.0",
    ]


@pytest.mark.parametrize(("model", "bound"), [("MiniLM-L6", 1.25), ("2,000 tiny tensors", 2.0)])
def test_a_projection_takes_little_more_than_three_copies(report: ModuleType, model: str, bound: float) -> None:
    t = report.read(report.RESULTS / "times.csv")[model, 1]
    t |= {"TPGM, l2: projection": 3.03 * bound * t["copy"]}
    assert report.too_slow({(model, 1): t}, {}) == [
        f"{model}, batch 1: projection, l2 / three copies = {1.01 * bound:.2f}, expected at most {bound}",
    ]


def test_results_of_tpgm_at_the_end_show_no_memory_while_training(report: ModuleType) -> None:
    large = report.read_large(report.RESULTS / "large.csv")
    plain = {row["parameters"]: row["during_bytes"] for row in large["plain"]}
    beyond = {row["parameters"]: row["during_bytes"] - plain[row["parameters"]] for row in large[report.AT_END]}
    assert len(beyond) >= 5
    assert [size for size, bytes_ in beyond.items() if bytes_ >= 0.1 * 4 * size] == []


def test_passes_are_the_documented_ones(report: ModuleType) -> None:
    """But for an update of TPGM, which makes two more than its floor, and where half of the tensors are left alone."""
    counted = documented()
    expected: dict[str, float] = dict.fromkeys(("TPGM, mars", "TPGM, l2"), counted["TPGM, update"] - 2)
    expected |= {name: (counted[name] + at_rest) / 2 for name, at_rest in documented_at_rest().items()}
    expected |= {name: counted[name] for name in report.PASSES if name not in expected}
    assert expected == report.PASSES


def test_a_step_on_digits_takes_at_most_half_as_much_again(report: ModuleType) -> None:
    t = dict(report.read(report.RESULTS / "times.csv")["20 tensors", 32])
    t |= {"plain step": 1.0, "TPGM, mars": 1.1, "TPGM, mars: projection": 0.3}
    assert report.too_slow({("digits CNN", 32): t | {"naive": 2.0}}, {}) == []
    t["TPGM, mars: projection"] = 0.5
    assert report.too_slow({("digits CNN", 32): t | {"naive": 2.0}}, {}) == [
        "digits CNN, batch 32: plain + TPGM = 1.65, expected at most 1.5",
    ]


@pytest.mark.slow
def test_own_work_is_measured_once(report: ModuleType, tmp_path: Path) -> None:
    script = report.RESULTS.parent / "own.py"
    for expected in ("20 tensors\ndigits CNN\n", ""):
        command = [sys.executable, str(script), "--quick", "--output", str(tmp_path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        assert done.stdout == expected
    shares, peers = report.own_tables(report.read(tmp_path / "own.csv"))
    assert shares.count("\n") == peers.count("\n") == 3


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
