"""Models of the sizes that are fine-tuned in practice, without their weights, and two that are many or few tensors.

The network of examples/digits is the smallest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "digits"))
from model import DigitClassifier

CLASSES = 10


class Bottleneck(nn.Module):
    """The residual block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        sizes = ((inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        layers: list[nn.Module] = []
        for i, o, kernel, s in sizes:
            layers += [nn.Conv2d(i, o, kernel, s, kernel // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the block's width times four."""
        return (self.layers(x) + self.shortcut(x)).relu()


def resnet50() -> nn.Module:
    """25.6 million parameters in 161 tensors."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(count):
            blocks.append(Bottleneck(inputs, width, 2 if index == 0 and width > 64 else 1))
            inputs = 4 * width
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class Transformer(nn.Module):
    """Encoder blocks over what `embed` gives."""

    def __init__(self, embed: nn.Module, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = embed
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.blocks(self.embed(x)).mean(dim=1))


class Patches(nn.Module):
    """ViT's embedding of 16 x 16 patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """One vector a patch."""
        return self.convolution(x).flatten(2).transpose(1, 2)


class Tiny(nn.Module):
    """`count` vectors that multiply one after the other; `elements` in all."""

    def __init__(self, count: int, elements: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(elements // count) for _ in range(count))
        self.head = nn.Linear(1, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        total = torch.stack([scale.sum() for scale in self.scales]).sum() / len(self.scales)
        return self.head(x.mean(dim=(1, 2, 3)).unsqueeze(1) * total)


def digits_cnn() -> nn.Module:
    """The network of examples/digits: 0.19 million parameters in 14 tensors."""
    classifier = DigitClassifier()
    return nn.Sequential(classifier.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier.head)


def images(batch: int) -> Tensor:
    """ImageNet's size."""
    return torch.randn(batch, 3, 224, 224)


def tokens(batch: int) -> Tensor:
    """Sentences of 64 word pieces."""
    return torch.randint(30522, (batch, 64))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "ResNet-50": (resnet50, images),
    "ViT-B/16": (lambda: Transformer(Patches(768), 768, 12, 12), images),
    "MiniLM-L6": (lambda: Transformer(nn.Embedding(30522, 384), 384, 6, 12), tokens),
    "2,000 tiny tensors": (lambda: Tiny(2000, 2**21), lambda batch: torch.randn(batch, 3, 8, 8)),
    "20 tensors": (lambda: Tiny(20, 2**21), lambda batch: torch.randn(batch, 3, 8, 8)),
    "digits CNN": (digits_cnn, lambda batch: torch.rand(batch, 1, 28, 28)),
}


def growing(small: bool) -> list[tuple[int, int]]:
    """Numbers of tensors and of elements in all, for `Tiny`."""
    counts, sizes = ((20, 200), (2**18,)) if small else ((20, 200, 2000), (2**16, 2**18, 2**20, 2**22, 2**24, 2**26))
    return [(count, size) for count in counts for size in sizes]
