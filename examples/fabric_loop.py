"""FTP under Lightning Fabric: a robust loop of one's own that stops in the middle, and goes on from its checkpoint.

``python examples/fabric_loop.py``; about 10 seconds on two cores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.fabric import Fabric
from plain_loop import Classifier, accuracy, digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_tpgm import constrain
from lightning_tpgm.methods import FTP

CHECKPOINT = Path("demo_output") / "fabric.ckpt"


def train(epochs: range) -> None:
    """Train for some epochs, from the checkpoint unless it is the first one, and save what the next ones need."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(epochs.start)
    train_digits, held_out, old = digits()
    model = Classifier()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    constraint = constrain(model, FTP(), optimizer, exclude=["head.*"])  # after `setup`: the model is where it trains
    if epochs.start:
        saved = fabric.load(CHECKPOINT, {"model": model, "optimizer": optimizer})
        constraint.load_state_dict(saved["constraint"])  # the anchors are the original ones again
    loader = fabric.setup_dataloaders(DataLoader(train_digits, batch_size=32, shuffle=True))
    for _ in epochs:
        for images, labels in loader:
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model(images), labels))
            optimizer.step()
    fabric.save(CHECKPOINT, {"model": model, "optimizer": optimizer, "constraint": constraint.state_dict()})
    print(f"epoch {epochs.stop}: new digits {accuracy(model, held_out):.1%}, MNIST {accuracy(model, old):.1%}")
    farthest = max(constraint.report(), key=lambda row: row["distance"])
    print(f"farthest from its pretrained value: {farthest['name']}, {farthest['distance']:.3g}")


if __name__ == "__main__":
    CHECKPOINT.parent.mkdir(exist_ok=True)
    train(range(3))
    train(range(3, 6))
