"""A fit on two processes that Lightning starts as functions; run by tests/test_spawn.py.

``python tests/spawn_worker.py FOLDER sharded`` writes there what each process drew and learned, and what the parent
knows afterwards.
"""

from __future__ import annotations

import atexit
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_tpgm import TPGMCallback
from toys import Blobs, Classifier, classifier_loss


def numbered() -> TensorDataset:
    """16 held-out rows that tell their number by their last feature."""
    x, y = Blobs().val.tensors
    return TensorDataset(torch.cat([x[:, :-1], torch.arange(16.0)[:, None]], dim=1), y)


class Noting:
    """A held-out loss that notes the rows it is asked for."""

    def __init__(self) -> None:
        self.rows: list[float] = []

    def __call__(self, pl_module: Classifier, batch: Any) -> Tensor:
        self.rows += batch[0][:, -1].tolist()
        return classifier_loss(pl_module, batch)


class Write(pl.Callback):
    """Writes what its process drew and learned."""

    def __init__(self, folder: Path, callback: TPGMCallback, loss: Noting) -> None:
        self.folder, self.callback, self.loss = folder, callback, loss

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {"rows": self.loss.rows, **known(self.callback, pl_module)}
        (self.folder / f"rank-{trainer.global_rank}.json").write_text(json.dumps(found))
        atexit.register(torch.distributed.destroy_process_group)  # gloo's threads, left running, may abort it


def known(callback: TPGMCallback, module: Classifier) -> dict[str, Any]:
    return {"radii": callback.radii, "weights": {name: weight.tolist() for name, weight in module.named_parameters()}}


def main(folder: Path, use_distributed_sampler: bool) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(0)
    module, loss = Classifier(), Noting()
    callback = TPGMCallback(DataLoader(numbered(), 4), loss=loss, every_n_steps=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=1,
        callbacks=[callback, Write(folder, callback, loss), ModelCheckpoint(folder, filename="saved")],
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=use_distributed_sampler,
    )
    trainer.fit(module, Blobs())
    (folder / "parent.json").write_text(json.dumps(known(callback, module)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "sharded")
