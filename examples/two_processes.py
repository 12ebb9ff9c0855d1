"""Two processes (DDP, on the CPU) that learn the same radii: nothing but the Trainer's arguments changes.

Each process draws its share of the training and of the held-out digits; at the end the ranks compare what they learned.
About twenty seconds on two cores:

    python examples/two_processes.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

sys.path.append(str(Path(__file__).resolve().parent / "digits"))

from data import CHECKPOINT, Digits
from lightning_tpgm import TPGMCallback
from model import DigitClassifier


def main() -> None:
    """Fine-tune, and print what each rank holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of fine-tuning (default: %(default)s)")
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    callback = TPGMCallback()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",  # Lightning starts this script a second time
        max_epochs=arguments.epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,  # the radii are learned on the validation digits all the same
    )
    trainer.fit(DigitClassifier(weights=str(CHECKPOINT), freeze_statistics=True), datamodule=Digits(batch_size=16))

    radii = torch.tensor(list(callback.radii.values()))
    difference = (radii - trainer.strategy.broadcast(radii)).abs().max()
    difference = trainer.strategy.reduce(difference, reduce_op="max")
    if trainer.is_global_zero:
        for name, radius in callback.radii.items():
            print(f"{name:22s} radius {radius:.4f}  distance {callback.distances[name]:.4f}")
        print(f"{trainer.world_size} ranks, largest difference of a radius: {float(difference)}")
    torch.distributed.destroy_process_group()  # gloo's threads, left running, may abort the process at its end


if __name__ == "__main__":
    main()
