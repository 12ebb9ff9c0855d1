"""Images as tensors: read by pillow, cut, scaled and normalised."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

Item = tuple[Path, int]  # an image file and its label


@dataclass(frozen=True)
class View:
    """How an image becomes a tensor: side of the square in pixels, mean and standard deviation of its channels."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Images(Dataset[tuple[Tensor, int]]):
    """Images with their labels. ``augment``: a random part of each, half of them mirrored.

    Otherwise it is the square in the middle, with a margin as if a shorter side of 256 was cropped to 224.
    """

    def __init__(self, items: Sequence[Item], view: View, augment: bool = False) -> None:
        # arrays: to read from a list of objects writes to each, so every worker would copy all of a million paths
        self.paths = np.array([os.fsencode(path) for path, _ in items])
        self.labels = np.array([label for _, label in items])
        self.view, self.augment = view, augment

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image (3, size, size) and label."""
        with Image.open(os.fsdecode(self.paths[index])) as file:
            image = file.convert("RGB")
        box = random_box(*image.size) if self.augment else middle_box(*image.size)
        image = image.resize((self.view.size, self.view.size), Image.Resampling.BICUBIC, box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        if self.augment and torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (self.view.mean, self.view.std))
        return (pixels - shift) / scale, int(self.labels[index])


def middle_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the square in the middle."""
    side = min(width, height) * 224 / 256
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """A box with 8 to 100 % of the area and sides of 3:4 to 4:3, cut to the image."""
    area = width * height * float(torch.empty(()).uniform_(0.08, 1))
    ratio = math.exp(float(torch.empty(()).uniform_(math.log(3 / 4), math.log(4 / 3))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    left, top = (int(torch.randint(room + 1, ())) for room in (width - w, height - h))
    return left, top, left + w, top + h
