"""The house in three storeys: imports point down, none goes in a circle, below the callbacks torch alone is enough."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import pytest
from lightning.pytorch import Callback

import lightning_tpgm
from lightning_tpgm.callbacks.method import MethodCallback

PACKAGE = Path(lightning_tpgm.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}  # "methods.tpgm", "layout", ...

# from the ground up; a module may import what stands on its own floor or below
FLOORS = (
    (
        "norms",
        "projection",
        "blocks",
        "groups",
        "layout",
        "sharding",
        "selection",
        "pretrained",
        "initialisation",
        "drawn",
        "freshness",
        "gradients",
        "optimizers",
    ),
    ("anchors", "constrained"),
    ("methods",),
    ("steps",),
    ("observing",),
    ("references", "attached", "constraint", "plain"),
    ("callbacks",),
    ("__main__",),
)


def floor(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module.partition(".")[0] in names)


def imports(module: str) -> Iterator[str]:
    """What a module of the package imports of it, wherever in its text, less what only type checkers read."""
    tree = ast.parse(MODULES[module].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_tpgm."):
            yield (node.module or "").removeprefix("lightning_tpgm.")


INSIDE = [module for module in MODULES if module != "__init__"]


@pytest.mark.parametrize("module", INSIDE)
def test_imports_point_down(module: str) -> None:
    home = module.removesuffix(".__init__")
    for imported in imports(module):
        assert floor(imported) <= floor(home), f"{module} imports {imported}"
    if home.startswith("observing"):
        assert not [name for name in imports(module) if name.startswith("methods")], "it knows quantities, no method"


def test_no_import_goes_in_a_circle() -> None:
    reached: dict[str, set[str]] = {}

    def reach(module: str, path: tuple[str, ...]) -> set[str]:
        assert module not in path, " -> ".join([*path, module])
        if module not in reached:
            names = MODULES.keys() & {module, f"{module}.__init__"}
            direct = {found for name in names for found in imports(name)} - {module}
            reached[module] = direct.union(*(reach(found, (*path, module)) for found in direct))
        return reached[module]

    for module in INSIDE:
        # a package and its members are one place: `methods` gathers what is in it
        if not module.endswith("__init__"):
            reach(module, ())


def test_torch_alone_is_enough_below_the_callbacks() -> None:
    """In an interpreter that finds no Lightning at all."""
    below = [m.removesuffix(".__init__") for m in INSIDE if floor(m) < floor("callbacks")]
    names = ", ".join(f"'lightning_tpgm.{name}'" for name in below)
    code = f"""
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"):
    sys.modules[name] = None
from importlib import import_module
for name in [{names}]:
    import_module(name)
from lightning_tpgm import Constraint, constrain
from lightning_tpgm.methods import FTP, L2SP, SPD, TPGM, AnchorDecay, DiGraP, WiSEFT
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    lines = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert max(lines.values()) < 300, max(lines, key=lines.__getitem__)
    assert statistics.median(lines.values()) < 120


def test_a_method_is_a_short_file_without_hooks_or_trainers() -> None:
    for module in INSIDE:
        if module.startswith("methods."):
            text = MODULES[module].read_text()
            assert "register_" not in text
            assert not re.search(r"\b(trainer|pl_module)\b", text)
            assert len(text.splitlines()) < 180  # docstrings included


def test_classes_are_at_most_two_levels_below_lightnings_callback() -> None:
    for info in walk_packages([str(PACKAGE)], "lightning_tpgm."):
        if not info.name.endswith("__main__"):
            for value in vars(import_module(info.name)).values():
                if isinstance(value, type) and issubclass(value, Callback) and value is not Callback:
                    ours = [base for base in value.__mro__ if issubclass(base, Callback) and base is not Callback]
                    ours = [base for base in ours if base.__module__.startswith("lightning_tpgm")]
                    assert len(ours) <= 2, ours
    assert Callback in MethodCallback.__bases__
