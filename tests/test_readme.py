"""What a reader copies from the README runs."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_tpgm
from lightning_tpgm import TPGMCallback

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# the same code with less work
SHORTER = {"max_epochs=20": "max_epochs=1", "radius_steps=200": "radius_steps=2"}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> None:
    for long, short in SHORTER.items():
        script = script.replace(long, short)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples" / "digits")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def quick_start() -> tuple[str, str]:
    """The script before and after the change."""
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    before, after = (
        "\n".join(line[1:] for line in lines if not line.startswith(added_or_removed)) for added_or_removed in "+-"
    )
    return before, after


def test_quick_start_is_above_line_40() -> None:
    end = README.index("```", README.index("```diff") + 3)
    assert README[:end].count("\n") < 40


def test_quick_start_adds_one_callback_and_changes_nothing_else() -> None:
    before, after = quick_start()
    assert (
        after.replace(", callbacks=[TPGMCallback()]", "").replace("from lightning_tpgm import TPGMCallback\n", "")
        == before
    )


@pytest.mark.slow
def test_readme_code_runs(tmp_path: Path) -> None:
    before, after = quick_start()
    run(before, tmp_path)
    run("\n".join([after, *blocks("python")]), tmp_path)
    assert (tmp_path / "projected.ckpt").exists()


def test_arguments_are_those_of_the_callback() -> None:
    table = README[README.index("| `TPGMCallback(...)`") :].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, flags=re.MULTILINE)
    parameters = inspect.signature(TPGMCallback).parameters.values()
    assert [name for name, _ in rows] == [parameter.name for parameter in parameters]
    assert [eval(default) for _, default in rows] == [parameter.default for parameter in parameters]


def test_every_callback_is_in_the_choice_of_methods() -> None:
    section = README[README.index("## Choosing a method") : README.index("## Results")]
    for name in lightning_tpgm.__all__:
        if name.endswith("Callback"):
            assert f"`{name}" in section
