"""Both names of Lightning: a project that uses one is not made to import the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_tpgm.callbacks.framework as framework

pytestmark = pytest.mark.slow  # each case is a process of its own: what is imported first is what is tested
PROJECT = """
import sys
{before}
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

{imports}

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def loader():
    return DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=8)

class Fit(Callback):
    pass

if {cli}:
    trainer = LightningCLI(
        Module,
        args={{"trainer": {{"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "callbacks": {{"class_path": "lightning_tpgm.TPGMCallback"}}}}}},
        run=False,
        save_config_callback=None,
    ).trainer
else:
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks={callbacks}
    )
trainer.fit(Module(), loader(), loader())
(callback,) = (callback for callback in trainer.callbacks if type(callback).__name__ == "TPGMCallback")
assert all(radius == radius for radius in callback.radii.values()) and len(callback.radii) == 2
assert isinstance(callback, Callback)
try:
    TPGMCallback(radius_lr=-1)
except MisconfigurationException:
    pass
"""
OURS = "from lightning_tpgm import TPGMCallback"


def run(
    package: str,
    *,
    other: str = "-",
    first: bool = False,
    dependency: str = "",
    cli: bool = False,
    callbacks: str = "TPGMCallback()",
) -> None:
    theirs = (
        f"from {package} import Callback, LightningModule, Trainer\n"
        f"from {package}.cli import LightningCLI\n"
        f"from {package}.utilities.exceptions import MisconfigurationException"
    )
    project = PROJECT.format(
        # an entry that is None makes the import of that package fail, as if it were not installed
        before=f"import {dependency}" if dependency else "" if other == "-" else f"sys.modules[{other!r}] = None",
        imports=f"{OURS}\n{theirs}" if first else f"{theirs}\n{OURS}",
        cli=cli,
        callbacks=callbacks,
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", project],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "other"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning")]
)
def test_either_package_works_without_the_other(package: str, other: str) -> None:
    run(package, other=other)


@pytest.mark.parametrize("package", framework.PACKAGES)
def test_either_package_works_when_imported_after_this_one(package: str) -> None:
    run(package, first=True, callbacks="[TPGMCallback()]")


@pytest.mark.parametrize("package", framework.PACKAGES)
def test_either_package_works_from_its_cli(package: str) -> None:
    run(package, cli=True)


@pytest.mark.parametrize("cli", [True, False], ids=["CLI", "bare"])
@pytest.mark.parametrize(
    ("dependency", "package"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")]
)
def test_project_and_its_dependency_use_one_each(dependency: str, package: str, cli: bool) -> None:
    """This package finds the dependency's when it is imported, and goes along with the project's later."""
    run(package, dependency=dependency, first=True, cli=cli)
