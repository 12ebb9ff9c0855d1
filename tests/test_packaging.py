"""What the installed package says of itself, and what it pulls in."""

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_tpgm

ROOT = Path(__file__).parents[1]
DISTRIBUTION = "lightning-tpgm"


def modules_after(statement: str) -> set[str]:
    """Names of all modules that a new interpreter holds once it ran the statement."""
    command = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def pins(path: Path) -> dict[str, Requirement]:
    """The requirements of a constraints file by name."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, filter(None, lines))}


def pinned_version(requirement: Requirement) -> str:
    return str(requirement.specifier).removeprefix("==")


def declared() -> list[Requirement]:
    """Everything that the package and its extras ask for, the extras' references to each other left out."""
    asked = map(Requirement, requires(DISTRIBUTION) or [])
    return [requirement for requirement in asked if requirement.name != DISTRIBUTION]


def test_methods_and_constrain_do_not_import_lightning() -> None:
    loaded = modules_after("from lightning_tpgm import constrain, methods")
    assert "lightning_tpgm.methods.tpgm" in loaded
    assert not {name for name in loaded if name.split(".")[0] in {"lightning", "pytorch_lightning", "torchmetrics"}}


def test_version_is_stated_once() -> None:
    assert version(DISTRIBUTION) == lightning_tpgm.__version__
    for file in ("pyproject.toml", "setup.cfg", "CITATION.cff"):
        assert not re.search(r"(?m)^version\s*[:=]\s*[\"']?\d", (ROOT / file).read_text()), file


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("constraints.txt", {"benchmark", "cli", "dev", "docs", "examples", "plots", "safetensors", "test"}),
        ("constraints-oldest.txt", {"cli", "examples", "plots", "safetensors", "test"}),
        ("constraints-compat.txt", {"compat"}),
    ],
)
def test_constraints_pin_all_that_tests_install(file: str, extras: set[str]) -> None:
    pinned = pins(ROOT / file)
    not_exact = [str(pin) for pin in pinned.values() if not re.fullmatch(r"==[^,*]+", str(pin.specifier))]
    assert not_exact == []
    for requirement in declared():
        name = canonicalize_name(requirement.name)
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
        if extra is None or extra[1] in extras:
            assert name in pinned, f"{file} does not pin {name}"
            assert requirement.specifier.contains(pinned_version(pinned[name])), f"{file}: {requirement}"


@pytest.mark.parametrize("name", ["pytorch-lightning", "torchmetrics", "jsonargparse", "matplotlib", "safetensors"])
def test_oldest_constraints_pin_the_declared_bounds(name: str) -> None:
    (bound,) = {bound for requirement in declared() if requirement.name == name for bound in requirement.specifier}
    assert bound.operator == ">="
    assert Version(bound.version) == Version(pinned_version(pins(ROOT / "constraints-oldest.txt")[name]))
