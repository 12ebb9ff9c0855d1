"""What the methods cost: the READMEs have the committed results, whose ratios are within their bounds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("matplotlib", reason="the report draws a figure")


@pytest.fixture(scope="module")
def report() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "overhead" / "report.py"
    spec = importlib.util.spec_from_file_location("overhead_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
