"""An ordinary Lightning classifier of small grey images; it knows nothing of constrained fine-tuning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


def conv_block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution, batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class DigitClassifier(LightningModule):
    """Four convolutions, a global average and a linear head: 186,538 parameters.

    Args:
        lr: Learning rate of Adam.
        weights: Path of a state dict to start from. None: random weights.
        freeze_statistics: Keep the running means and variances of batch normalisation, and normalise by them while
            training too. That is usual where a pretrained network is fine-tuned on few data.
    """

    def __init__(self, lr: float = 1e-3, weights: str | None = None, freeze_statistics: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(
            conv_block(1, 32, stride=2),
            conv_block(32, 64, stride=2),
            conv_block(64, 96, stride=1),
            conv_block(96, 128, stride=2),
        )
        self.head = nn.Linear(128, 10)
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")
        if weights is not None:
            self.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        """Classify `images` (batch, 1, 28, 28), with values in [0, 1], into logits (batch, 10)."""
        return self.head(self.features(images).mean(dim=(2, 3)))

    def on_train_start(self) -> None:
        """Keep batch normalisation in eval mode if its statistics are frozen."""
        if self.hparams["freeze_statistics"]:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of one batch of images and labels."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss and the accuracy of one validation batch."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy of one test batch."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
