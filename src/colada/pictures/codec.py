"""Pictures as latents, and latents as pictures: the codec of a model that has both text and pictures.

Every codec is a network with ``encode`` and ``decode``. The plain one, :class:`PatchPCA`, is linear, and
fitted in seconds: each 8 × 8 patch of a picture is one latent, its first principal components. Latents of
training pictures have mean 0 and mean square 1, on which the timestep law relies. A picture is uint8
(S, S, 3), M are its latents and C their width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from colada.device import parameters_of, unallocated
from colada.errors import ColadaError
from colada.files import read_json_object
from colada.locate import IMAGE_DIR
from colada.networks.checkpoint import read_weights
from colada.networks.config import DiTConfig
from colada.pictures.config import CodecConfig
from colada.pictures.shapes import Picture
from colada.pictures.vae import PictureDecoder, PictureEncoder


def _check(pictures: Tensor, size: int) -> None:
    if pictures.dtype != torch.uint8 or pictures.shape[1:] != (size, size, 3):
        raise ColadaError(
            f"pictures of shape {tuple(pictures.shape)} and type {pictures.dtype},"
            f" expected uint8 (B, {size}, {size}, 3)"
        )


class Codec(nn.Module, ABC):
    """What every picture codec has: a configuration, and both ways.

    Attributes:
        config: of the codec.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        CodecConfig.require(config)
        self.config = config

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the latents of pictures: uint8 (B, S, S, 3) -> (B, M, C).

        Raises:
            ColadaError: for pictures of another shape or type.
        """
        _check(pictures, self.config.size)
        return self.latents_of(pictures.to(self.device, torch.float32) / 255)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pictures of latents: (B, M, C) -> uint8 (B, S, S, 3), on the CPU.

        Raises:
            ColadaError: for latents of another shape.
        """
        expected = (self.config.latents, self.config.channels)
        if latents.shape[1:] != expected:
            raise ColadaError(
                f"latents of shape {tuple(latents.shape)}, expected (B, {expected[0]}, {expected[1]})"
            )
        return (self.pixels_of(latents).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    def init_parameter(self, name: str, parameter: Tensor, generator: torch.Generator | None) -> None:
        """Initialise a parameter of a new codec: convolutions uniformly by what they take in, biases at 0."""
        if parameter.ndim == 1:
            nn.init.constant_(parameter, float(name.endswith("weight")))  # Of a norm.
        else:
            nn.init.kaiming_uniform_(parameter, math.sqrt(5), generator=generator)

    @property
    def device(self) -> torch.device:
        """Where the codec is."""
        return next(iter(self.state_dict().values())).device

    @abstractmethod
    def latents_of(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels (B, S, S, 3) in 0..1."""

    @abstractmethod
    def pixels_of(self, latents: Tensor) -> Tensor:
        """Return pixels (B, S, S, 3), about in 0..1."""


class PatchPCA(Codec):
    """Linear: z = Eᵀ(x − mean) / scale of each patch x, and back, x ≈ mean + E(scale · z).

    The columns of E are principal components; ``scale`` is each one's standard deviation to the power of
    ``whitening``, times one number for all.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(config.patch_numbers))
        self.register_buffer("components", torch.zeros(config.patch_numbers, config.channels))
        self.register_buffer("scale", torch.ones(config.channels))

    def latents_of(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels (B, S, S, 3) in 0..1."""
        return (patches(pixels, self.config.patch) - self.mean) @ (self.components / self.scale)

    def pixels_of(self, latents: Tensor) -> Tensor:
        """Return pixels (B, S, S, 3), about in 0..1."""
        flat = latents.float().to(self.device) @ (self.components * self.scale).T + self.mean
        return unpatch(flat, self.config.patch, self.config.grid)


class ConvVAE(Codec):
    """A picture VAE, whose latents are the posterior's means, shifted and scaled.

    ``mean`` (C,) and ``scale`` are those of the means over training pictures, see :meth:`calibrate`.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: CodecConfig) -> None:
        super().__init__(config)
        self.encoder = PictureEncoder(config.width, config.patch, config.channels)
        self.decoder = PictureDecoder(config.width, config.patch, config.channels)
        self.register_buffer("mean", torch.zeros(config.channels))
        self.register_buffer("scale", torch.ones(()))

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, each (B, M, C), of pixels (B, S, S, 3) in 0..1."""
        moments = self.encoder(2 * pixels.permute(0, 3, 1, 2) - 1)
        mean, logvar = moments.flatten(2).transpose(1, 2).chunk(2, -1)
        return mean, logvar.clamp(-30, 20)

    def reconstruct(self, sample: Tensor) -> Tensor:
        """Return pixels (B, S, S, 3) of a posterior's sample (B, M, C)."""
        output = self.decoder(sample.transpose(1, 2).unflatten(2, self.config.grid))
        return (output.permute(0, 2, 3, 1) + 1) / 2

    def latents_of(self, pixels: Tensor) -> Tensor:
        """Return the latents of pixels (B, S, S, 3) in 0..1."""
        return (self.posterior(pixels)[0] - self.mean) / self.scale

    def pixels_of(self, latents: Tensor) -> Tensor:
        """Return pixels (B, S, S, 3), about in 0..1."""
        return self.reconstruct(latents.float().to(self.device) * self.scale + self.mean)

    def loss(
        self, pixels: Tensor, noise: Tensor, kl_weight: float = 1e-6
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return −E log p(x | z) + kl_weight · KL(q(z | x) ‖ N(0, I)) a picture, and both terms.

        The likelihood is a Gaussian's of variance ½, so that its term is the sum of square errors.

        Args:
            pixels: (B, S, S, 3) in 0..1.
            noise: (B, M, C), what the posterior's sample is drawn with.
            kl_weight: of the divergence.
        """
        mean, logvar = self.posterior(pixels)
        error = (
            (self.reconstruct(mean + (logvar / 2).exp() * noise) - pixels).square().flatten(1).sum(1).mean()
        )
        divergence = (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean() / 2
        return error + kl_weight * divergence, {"error": error.detach(), "kl": divergence.detach()}

    @torch.no_grad()
    def calibrate(self, pictures: Tensor) -> None:
        """Set mean and scale so that latents of pictures, uint8 (B, S, S, 3), have mean 0, mean square 1."""
        self.mean.zero_()
        self.scale.fill_(1.0)
        latents = self.encode(pictures).flatten(0, 1)
        self.mean.copy_(latents.mean(0))
        self.scale.copy_((latents - self.mean).square().mean().sqrt())


def patches(pixels: Tensor, size: int) -> Tensor:
    """Cut pictures (B, S, S, 3) into patches in reading order: (B, M, size · size · 3)."""
    rows = pixels.unflatten(1, (-1, size)).unflatten(3, (-1, size))
    return rows.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)


def unpatch(flat: Tensor, size: int, grid: Sequence[int]) -> Tensor:
    """Put patches (B, M, size · size · 3) together to pictures (B, S, S, 3)."""
    rows = flat.unflatten(2, (size, size, 3)).unflatten(1, tuple(grid))
    return rows.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


def fit(pictures: Iterable[Picture | Tensor], config: CodecConfig) -> PatchPCA:
    """Return the patch PCA of pictures.

    Sums of whole numbers below 2**53 are exact, whatever order they are added in, so that equal pictures give
    equal moments on every machine. Signs are such that a component's largest number is positive.

    Args:
        pictures: batches, uint8 (B, S, S, 3).
        config: of the codec.

    Raises:
        ColadaError: for pictures of another size, or that differ in fewer ways than there are channels.
    """
    numbers = config.patch_numbers
    count, total, products = 0, np.zeros(numbers), np.zeros((numbers, numbers))
    for batch in pictures:
        tensor = torch.as_tensor(batch)
        _check(tensor, config.size)
        flat = patches(tensor, config.patch).flatten(0, 1).double().numpy()
        count, total, products = count + len(flat), total + flat.sum(0), products + flat.T @ flat
    if count == 0:
        raise ColadaError("no pictures to fit a codec to, expected some")
    mean = total / count
    values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    values, vectors = values[::-1], vectors[:, ::-1]
    differing = int((values > 1e-9 * max(values[0], 1.0)).sum())
    if differing < config.channels:
        raise ColadaError(
            f"the pictures' patches differ in {differing} ways, expected at least channels={config.channels}"
        )
    values, vectors = values[: config.channels], vectors[:, : config.channels]
    largest = vectors[np.abs(vectors).argmax(0), np.arange(config.channels)]
    deviation = np.sqrt(values) / 255
    scale = deviation**config.whitening
    scale *= np.sqrt(np.mean((deviation / scale) ** 2))
    codec = PatchPCA(config)
    codec.mean.copy_(torch.from_numpy(mean / 255))
    codec.components.copy_(torch.from_numpy(vectors * np.sign(largest)))
    codec.scale.copy_(torch.from_numpy(scale))
    return codec


def read_codec(directory: Path) -> Codec:
    """Return the picture codec of a model directory.

    Raises:
        ColadaError: if it has none, or a file of it is wrong.
    """
    if not (directory / IMAGE_DIR).is_dir():
        raise ColadaError(f"{directory} has no pictures: {IMAGE_DIR}/ is missing")
    config = read_codec_config(directory)
    return read_weights(lambda: new_codec(config), directory / IMAGE_DIR, torch.float32, "cpu").eval()


def read_codec_config(directory: Path) -> CodecConfig:
    """Return the configuration in a model directory's ``cola_image``; raises ColadaError naming file, key."""
    file = directory / IMAGE_DIR / "config.json"
    return CodecConfig.from_dict(read_json_object(file), str(file))


def new_codec(config: CodecConfig) -> Codec:
    """Return a codec of this kind, of which nothing is fitted or learnt."""
    return PatchPCA(config) if config.kind == "patch_pca" else ConvVAE(config)


def codec_parameters(config: CodecConfig) -> int:
    """Return how many parameters a codec has that is learnt; a linear one has none."""
    with unallocated():
        return parameters_of(new_codec(config))


def check_codec(codec: CodecConfig | None, dit: DiTConfig, origin: str = "model") -> None:
    """Raise ColadaError if a codec, or none, and a DiT cannot be parts of one model."""
    if codec is None:
        if dit.img_channels:
            raise ColadaError(
                f"{origin}: cola_dit img_channels={dit.img_channels}, but {IMAGE_DIR}/ is missing"
            )
        return
    for name, stored, expected in (
        ("channels", codec.channels, dit.img_channels),
        ("grid", list(codec.grid), dit.img_grid),
    ):
        if stored != expected:
            raise ColadaError(
                f"{origin}: {IMAGE_DIR} {name}={stored} contradicts cola_dit img_{name}={expected}"
            )
