"""The project that the pages under docs/ speak of: small networks on tiny random pictures."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

CLASSES, SIZE, WIDTH = 3, 8, 16


def photos(count: int, seed: int) -> TensorDataset:
    """Noise, brighter by the class."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(noise + labels.view(-1, 1, 1, 1), labels)


def held_out(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(photos(16, seed=3), batch_size)


class Photos(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(photos(32, seed=1), batch_size=8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(photos(16, seed=2), batch_size=8)


class Network(LightningModule):
    """Trains and validates what its subclasses build."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        self.build()
        if weights is not None:
            self.load_state_dict(torch.load(weights, weights_only=True))

    def build(self) -> None:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        images, labels = batch
        return cross_entropy(self(images), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.log("val_acc", (logits.argmax(dim=1) == labels).float().mean())
        return cross_entropy(logits, labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)


class ConvNet(Network):
    def __init__(self, weights: str | None = None) -> None:
        super().__init__(weights)

    def build(self) -> None:
        self.features = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean(dim=(2, 3)))


class Block(nn.Module):
    """Attention and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, num_heads=2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs = self.norm1(tokens)
        tokens = tokens + self.attn(inputs, inputs, inputs, need_weights=False)[0]
        return tokens + self.fc2(self.fc1(self.norm2(tokens)).relu())


class ViT(Network):
    def __init__(self, weights: str | None = None) -> None:
        super().__init__(weights)

    def build(self) -> None:
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=4, stride=4)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, WIDTH) / 10)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.blocks(tokens).mean(dim=1))


class LoRA(nn.Module):
    """Adds the product of two small factors to a frozen linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


class LoRAViT(ViT):
    """All frozen but the adapters and the head."""

    def __init__(self, weights: str | None = None) -> None:
        super().__init__(weights)
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for block in self.blocks:
            block.fc1, block.fc2 = LoRA(block.fc1), LoRA(block.fc2)
