"""LightningCLI: the example as a user runs it, and what else may stand in its configuration."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

import lightning_tpgm
from lightning_tpgm import TPGMCallback
from toys import Blobs, Classifier, blobs

ROOT = Path(__file__).parents[1]


def main(*args: str) -> str:
    """What the example prints."""
    done = subprocess.run(
        [sys.executable, "main.py", *args],
        cwd=ROOT / "examples" / "cli",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_example_runs(tmp_path: Path) -> None:
    main("fit", "--config", "tpgm.yaml", "--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path))
    (file,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if key.startswith("TPGMCallback"))
    assert sorted(state["anchor"]) == sorted(
        name for name in saved["state_dict"] if "head" not in name and "running" not in name and "num" not in name
    )
    pretrained = torch.load(ROOT / "examples" / "digits" / "assets" / "mnist_cnn.pt", weights_only=True)
    assert all(torch.equal(anchor, pretrained[name]) for name, anchor in state["anchor"].items())
    assert saved["global_step"] == 13
    assert state["method"]["held_out"]["drawn"] == 4  # on steps 1, 5, 9, 13
    assert (state["method"]["radii"]["value"] > 0).all()


CALLBACKS = [name for name in lightning_tpgm.__all__ if name.endswith("Callback")]


def test_the_example_explains_the_arguments() -> None:
    """LightningCLI shows the arguments of a callback on demand."""
    text = " ".join(main("fit", "--trainer.callbacks.help=lightning_tpgm.TPGMCallback").split())
    assert "(type: Union[float, Literal['auto']], default: auto)" in text


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_is_the_docstring(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The description of each argument of each callback, whole."""
    callback = getattr(lightning_tpgm, name)
    with pytest.raises(SystemExit):
        LightningCLI(Classifier, Blobs, run=False, args=[f"--trainer.callbacks.help=lightning_tpgm.{name}"])
    shown = " ".join(capsys.readouterr().out.split())
    described = docstring_parser.parse(inspect.getdoc(callback) or "").params
    assert [param.arg_name for param in described] == list(inspect.signature(callback).parameters)
    for param in described:
        description = " ".join((param.description or "").split())
        assert description
        assert re.search(rf"\.{param.arg_name} .{{0,100}}{re.escape(description)}", shown), param.arg_name


class HeldOut(DataLoader[Any]):
    """A loader that a configuration can build. (jsonargparse cannot build torch's own: its data set is generic.)"""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(blobs(24, seed=3), batch_size)


def held_out() -> DataLoader[Any]:
    return HeldOut(batch_size=4)


LOADERS = {
    "class": "{class_path: test_cli.HeldOut, init_args: {batch_size: 4}}",
    "function": "test_cli.held_out",
    "function, with a colon": "test_cli:held_out",
}


@pytest.mark.parametrize("kind", LOADERS)
def test_held_out_loader_in_yaml(kind: str, tmp_path: Path) -> None:
    torch.save(Classifier().state_dict(), tmp_path / "pretrained.pt")
    config = tmp_path / "config.yaml"
    config.write_text(f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_tpgm.TPGMCallback
      init_args:
        pretrained: {tmp_path}/pretrained.pt
        dataloader: {LOADERS[kind]}
        every_n_steps: 1
""")
    args = ["--config", str(config)]
    cli = LightningCLI(
        Classifier, Blobs, run=False, args=args, seed_everything_default=False, save_config_callback=None
    )
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, TPGMCallback))
    batches: list[int] = []
    cli.model.training_step = lambda batch, batch_idx: batches.append(len(batch[0])) or cli.model.loss(batch)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert batches == [8, 4] * 4  # a batch of training, a held-out one
    assert callback.anchor.keys() == Classifier().state_dict().keys()
