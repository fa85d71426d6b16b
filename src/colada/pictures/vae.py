"""A small convolutional picture VAE: pixels to a posterior of latents, and latents to pixels.

Both ways have one residual block a resolution. Feature maps are (B, F, H, W), with F features.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from colada.pictures.config import GROUPS

MOST_FEATURES = 4
"""Features at the lowest resolution, relative to those at the highest."""


def features(width: int, patch: int) -> list[int]:
    """Return the features of each resolution, from full size down to 1 / patch of it."""
    return [width * min(2**level, MOST_FEATURES) for level in range(patch.bit_length())]


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with 3 × 3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_in, self.norm_hid = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, width)
        self.conv_in, self.conv_out = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block; (B, F, H, W) as its input."""
        return x + self.conv_out(F.silu(self.norm_hid(self.conv_in(F.silu(self.norm_in(x))))))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def _head(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), _conv(width, outputs))


class PictureEncoder(nn.Sequential):
    """Pixels (B, 3, S, S) -> (B, 2C, S / patch, S / patch): mean and log variance of each latent number."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        widths = features(width, patch)
        layers: list[nn.Module] = [_conv(3, widths[0])]
        for inputs, outputs in pairwise(widths):
            layers += [ResidualBlock(inputs), _conv(inputs, outputs, 2)]
        super().__init__(*layers, ResidualBlock(widths[-1]), _head(widths[-1], 2 * channels))


class PictureDecoder(nn.Sequential):
    """Latents (B, C, S / patch, S / patch) -> pixels (B, 3, S, S)."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        widths = features(width, patch)[::-1]
        layers: list[nn.Module] = [_conv(channels, widths[0]), ResidualBlock(widths[0])]
        for inputs, outputs in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2), _conv(inputs, outputs), ResidualBlock(outputs)]
        super().__init__(*layers, _head(widths[-1], 3))
