"""Codecs: fitted exactly, both ways as the algebra says, and of what quality the documentation says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from colada.errors import ColadaError
from colada.networks.checkpoint import write_model
from colada.pictures.codec import (
    Codec,
    ConvVAE,
    PatchPCA,
    fit,
    patches,
    read_codec,
    unpatch,
)
from colada.pictures.config import CodecConfig
from colada.pictures.reader import read
from colada.pictures.shapes import example
from experiments.pictures.measures import psnr

TRAINED_ON = 1000
VAE = CodecConfig(kind="conv_vae", size=16, patch=4, channels=4, width=8)


def scenes(seed: int, count: int, unseen: bool | None = False) -> Tensor:
    return torch.from_numpy(np.stack([example(seed, n, unseen=unseen).picture for n in range(count)]))


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return scenes(0, TRAINED_ON)


@pytest.fixture(scope="module")
def codec(pictures: Tensor) -> PatchPCA:
    return fit(pictures.split(300), CodecConfig())


def test_patches_are_in_reading_order_and_put_together_again() -> None:
    pixels = torch.rand(2, 6, 6, 3)
    cut = patches(pixels, 2)
    assert cut.shape == (2, 9, 12)
    for row in range(3):
        for column in range(3):
            patch = pixels[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(cut[:, 3 * row + column], patch.reshape(2, 12), rtol=0, atol=0)
    torch.testing.assert_close(unpatch(cut, 2, (3, 3)), pixels, rtol=0, atol=0)


def test_the_fit_is_the_singular_value_decomposition_s(pictures: Tensor, codec: PatchPCA) -> None:
    flat = patches(pictures, 8).flatten(0, 1).double().numpy() / 255
    mean = flat.mean(0)
    _, singular, rows = np.linalg.svd(flat - mean, full_matrices=False)
    np.testing.assert_allclose(codec.mean, mean, atol=1e-6)
    overlap = np.abs(rows[:20] @ codec.components.double().numpy()[:, :20])
    np.testing.assert_allclose(overlap, np.eye(20), atol=1e-3)
    deviation = singular[:64] / len(flat) ** 0.5
    half = codec.scale.double().numpy() / deviation**0.5
    np.testing.assert_allclose(half, half[0], rtol=1e-4)


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_of_the_fitted_pictures_have_mean_0_and_mean_square_1(
    pictures: Tensor, whitening: float
) -> None:
    latents = fit([pictures], CodecConfig(whitening=whitening)).encode(pictures).double()
    assert latents.shape == (TRAINED_ON, 16, 64)
    torch.testing.assert_close(latents.square().mean().item(), 1.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(latents.mean((0, 1)), torch.zeros(64).double(), rtol=0, atol=1e-3)
    deviation = latents.flatten(0, 1).std(0)
    expected = deviation[0] * (deviation / deviation[0])
    assert bool((deviation.diff() < 1e-4).all()) or whitening == 1, expected
    if whitening == 1:
        torch.testing.assert_close(deviation, torch.ones(64).double(), rtol=1e-3, atol=0)


def test_decoding_gives_the_nearest_picture_that_the_components_span(
    pictures: Tensor, codec: PatchPCA
) -> None:
    pixels = pictures[:8].double() / 255
    components, mean = codec.components.double(), codec.mean.double()
    spanned = unpatch((patches(pixels, 8) - mean) @ components @ components.T + mean, 8, (4, 4))
    torch.testing.assert_close(
        codec.decode(codec.encode(pictures[:8])).double(),
        (spanned.clamp(0, 1) * 255).round(),
        rtol=0,
        atol=1,
    )
    # What is encoded again does not move: the map back and forth is a projection.
    latents = torch.randn(4, 16, 64) * 0.1
    torch.testing.assert_close(codec.latents_of(codec.pixels_of(latents)), latents, rtol=0, atol=1e-4)


def test_equal_pictures_give_equal_codecs_in_whatever_batches(pictures: Tensor, codec: PatchPCA) -> None:
    other = fit([batch.numpy() for batch in pictures.flip(0).split(77)], CodecConfig())
    for name, tensor in codec.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_quality_and_robustness_are_as_documented(codec: PatchPCA) -> None:
    examples = [example(99, number, unseen=None) for number in range(60)]
    pictures = torch.from_numpy(np.stack([item.picture for item in examples]))
    latents = codec.encode(pictures)
    assert psnr(pictures, codec.decode(latents)) > 29
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.2):
        coded = codec.decode(latents + share * noise)
        right = [
            str(read(picture)) == item.answer for picture, item in zip(coded.numpy(), examples, strict=True)
        ]
        assert sum(right) >= 59


def test_psnr_is_of_the_mean_square_error() -> None:
    black = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    assert psnr(black, torch.full_like(black, 255)) == 0
    assert psnr(black, torch.full_like(black, 51)) == pytest.approx(-10 * np.log10(0.04))


# --- convolutional -----------------------------------------------------------------------------


def small_vae() -> ConvVAE:
    torch.manual_seed(0)
    return ConvVAE(VAE)


def test_the_picture_vae_s_loss_is_error_and_divergence() -> None:
    codec = small_vae()
    pixels, noise = torch.rand(3, 16, 16, 3), torch.randn(3, 16, 4)
    loss, terms = codec.loss(pixels, noise, kl_weight=0.25)
    mean, logvar = codec.posterior(pixels)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    prior = torch.distributions.Normal(0, 1)
    kl = torch.distributions.kl_divergence(posterior, prior).sum((1, 2)).mean()
    error = 0.0
    for picture, row, spread, one in zip(pixels, mean, logvar, noise, strict=True):
        output = codec.reconstruct((row + (spread / 2).exp() * one)[None])[0]
        error += ((output - picture) ** 2).sum().item() / 3
    assert float(terms["kl"]) == pytest.approx(kl.item(), rel=1e-4)
    assert float(terms["error"]) == pytest.approx(error, rel=1e-4)
    assert loss.item() == pytest.approx(error + 0.25 * kl.item(), rel=1e-4)


def test_the_picture_vae_learns_and_its_latents_are_calibrated() -> None:
    codec = small_vae()
    pictures = scenes(0, 32)[:, ::2, ::2].contiguous()
    optimiser = torch.optim.Adam(codec.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(40):
        loss, terms = codec.loss(pictures / 255, torch.randn(32, 16, 4, generator=generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(float(terms["error"]))
    assert errors[-1] < errors[0] / 4
    codec.calibrate(pictures)
    latents = codec.encode(pictures)
    assert latents.shape == (32, 16, 4)
    torch.testing.assert_close(latents.square().mean().item(), 1.0, rtol=1e-4, atol=0)
    torch.testing.assert_close(latents.mean((0, 1)), torch.zeros(4), rtol=0, atol=1e-5)
    assert psnr(pictures, codec.decode(latents)) > 14


@pytest.mark.parametrize(("row", "column"), [(0, 3), (2, 1), (3, 0)])
def test_a_latent_of_the_picture_vae_lies_where_its_patch_does(row: int, column: int) -> None:
    codec = small_vae()
    for module in codec.modules():  # Norms are over all places, so that every pixel has a part in all.
        for name, part in module.named_children():
            if isinstance(part, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    pixels = torch.rand(1, 16, 16, 3, requires_grad=True)
    codec.posterior(pixels)[0][0, 4 * row + column].square().sum().backward()
    assert pixels.grad is not None
    pull = pixels.grad.abs().sum(-1)[0].unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum((1, 3))
    place = torch.arange(4)
    far = torch.maximum((place - row).abs()[:, None], (place - column).abs()) > 1
    assert pull[~far].mean() > 2 * pull[far].mean()


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["patch_pca", "conv_vae"])
def test_a_codec_is_saved_and_read_as_it_was(kind: str, codec: PatchPCA, tmp_path: Path) -> None:
    saved: Codec = codec if kind == "patch_pca" else small_vae()
    write_model(tmp_path / "model", {"cola_image": saved})
    read_again = read_codec(tmp_path / "model")
    assert read_again.config == saved.config
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, read_again.state_dict()[name]), name
    config = json.loads((tmp_path / "model/cola_image/config.json").read_text())
    assert config.pop("architectures") == ["ColaImageCodec"]
    if kind == "patch_pca":
        assert config == {
            "model_type": "cola_image_codec",
            "kind": "patch_pca",
            "size": 32,
            "patch": 8,
            "channels": 64,
        }


def test_a_model_without_pictures_says_so(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match="has no pictures: cola_image/ is missing"):
        read_codec(tmp_path)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"kind": "pca"}, "kind='pca', expected 'patch_pca' or 'conv_vae'"),
        ({"patch": 5}, "patch=5, expected a divisor of size=32"),
        ({"channels": 193}, "channels=193, expected at most 192, the numbers of a patch"),
        ({"channels": 0}, "channels=0, expected a positive number"),
        ({"size": 2048}, "size=2048, expected at most 1024"),
        ({"width": 8}, "width=8, expected 0 for kind='patch_pca', else a multiple of 8"),
        ({"kind": "conv_vae"}, "width=0, expected 0 for kind='patch_pca', else a multiple of 8"),
        ({"kind": "conv_vae", "width": 8, "size": 30, "patch": 6}, "patch=6, expected a power of 2"),
    ],
)
def test_configurations_that_contradict_themselves(over: dict[str, object], message: str) -> None:
    with pytest.raises(ColadaError, match=message):
        CodecConfig.from_dict(over)


def test_what_cannot_be_coded_is_refused(codec: PatchPCA) -> None:
    with pytest.raises(
        ColadaError, match=r"shape \(2, 16, 16, 3\) and type torch.uint8, expected uint8 \(B, 32, 32, 3\)"
    ):
        codec.encode(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(ColadaError, match="type torch\\.float32"):
        codec.encode(torch.zeros(2, 32, 32, 3))
    with pytest.raises(ColadaError, match=r"latents of shape \(2, 64\), expected \(B, 16, 64\)"):
        codec.decode(torch.zeros(2, 64))
    with pytest.raises(ColadaError, match="no pictures to fit"):
        fit([], CodecConfig())
    with pytest.raises(ColadaError, match="differ in 0 ways, expected at least channels=64"):
        fit([torch.full((4, 32, 32, 3), 7, dtype=torch.uint8)], CodecConfig())
