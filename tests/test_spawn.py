"""Processes that Lightning starts as functions (ddp_spawn): what they learn, and what comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from properties import assert_same

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the processes talk through gloo on Linux"),
    pytest.mark.slow,
]
ROOT = Path(__file__).parents[1]


def run(folder: Path, loading: str) -> tuple[dict[str, Any], str]:
    """What each process wrote, and what was printed."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "spawn_worker.py"), str(folder), loading],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}, done.stderr


@pytest.mark.parametrize(
    ("loading", "rows"),
    [
        ("sharded", [[*range(0, 16, 2)], [*range(1, 16, 2)]]),
        ("use_distributed_sampler=False", [[*range(16)], [*range(16)]]),
    ],
)
def test_processes_started_as_functions(loading: str, rows: list[list[int]], tmp_path: Path) -> None:
    """The radii are learned in step; weights and checkpoints come back, the radii do not, and a warning says so."""
    found, printed = run(tmp_path, loading)
    ranks = [found[f"rank-{rank}"] for rank in range(2)]
    assert [rank["rows"] for rank in ranks] == rows
    assert ranks[0]["radii"] == ranks[1]["radii"]
    assert ranks[0]["weights"] == ranks[1]["weights"] == found["parent"]["weights"]
    assert found["parent"]["radii"] == {}
    assert printed.count("What TPGMCallback learns in this fit stays in the processes that ddp_spawn") == 1

    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if key.startswith("TPGMCallback"))
    radii = state["method"]["radii"]
    assert_same(dict(zip(radii["names"], radii["value"].tolist(), strict=True)), ranks[0]["radii"])
