"""Ways to change a batch of grey images (batch, 1, height, width) with values in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def move(images: Tensor, degrees: Tensor | float = 0.0, offsets: Tensor | None = None) -> Tensor:
    """Rotate each image about its centre, then shift it; what comes in from outside is black.

    Args:
        images: Batch of images.
        degrees: Counter-clockwise angles, (batch,) or one for all.
        offsets: Shifts to the right and down in pixels, (batch, 2). None: no shift.

    Returns:
        The moved images, by bilinear interpolation.
    """
    count, _, height, width = images.shape
    angles = torch.deg2rad(torch.as_tensor(degrees, dtype=images.dtype)).expand(count)
    cos, sin = angles.cos(), angles.sin()
    # `affine_grid` asks where each output pixel comes from: the inverse rotation, in units of half an image.
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], dim=1)
    if offsets is None:
        offsets = images.new_zeros(count, 2)
    shift = offsets * 2 / torch.tensor([width, height])
    source = torch.cat([rotation, -rotation @ shift.unsqueeze(2)], dim=2)
    grid = F.affine_grid(source, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian of standard deviation `sigma` pixels."""
    reach = int(3 * sigma) + 1
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype)
    rows = F.conv2d(images, kernel.view(1, 1, 1, -1), padding=(0, reach))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1), padding=(reach, 0))


def add_noise(images: Tensor, scale: Tensor | float, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of standard deviation `scale` and clip to [0, 1]."""
    noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    return (images + scale * noise).clamp(0, 1)


def lower_contrast(images: Tensor, factor: Tensor | float) -> Tensor:
    """Blend each image with its own mean: a `factor` of 1 leaves it alone, 0 makes it uniformly grey."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + factor * (images - mean)


def invert(images: Tensor) -> Tensor:
    """Swap black and white."""
    return 1 - images
