"""What a GPU's training rows go through, shown on a CPU: block masks, and FlexAttention's compilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from colada.networks import layers
from colada.networks.layers import attend
from colada.networks.packing import Layout
from colada.train.kinds import JointSection
from colada.train.losses import joint_loss, prior_loss, vae_loss
from helpers import tiny_dit, tiny_vae
from test_cuda import DIT, VAE, conversations


def rows_on_a_gpu(rows: int, length: int, seed: int | None = None) -> Layout:
    """Rows with a block mask, one noisy copy; with a seed, of samples that end anywhere."""
    sample = None
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randint(3, (rows, length), generator=generator).sort(1).values
    return Layout._of_rows(rows, length, 4, 1, sample, torch.device("cpu"), True)


def attend_twice(layout: Layout) -> None:
    """As the layers of one pass do: all cells ask, and in the last layer the noisy ones alone."""
    q, k, v = torch.randn(3, len(layout), 2, 16, generator=torch.Generator().manual_seed(0))
    attend(q, k, v, layout)
    attend(q[layout.noisy], k, v, layout)


@pytest.fixture
def compiled() -> Iterator[CompileCounter]:
    """FlexAttention, compiled anew, by a compiler that counts."""
    counter = CompileCounter()
    torch.compiler.reset()
    function = torch.compile(flex_attention, dynamic=False, backend=counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_compiled_flex", lambda: function)
        yield counter
    torch.compiler.reset()


def test_flexattention_is_compiled_once_a_shape_and_not_once_a_batch(compiled: CompileCounter) -> None:
    """Two for each number of rows, with samples or not; thirteen numbers exceed torch's own limit of 8."""
    for rows in range(1, 14):
        for _ in range(3):
            attend_twice(rows_on_a_gpu(rows, 32))
        assert compiled.frame_count == 2 * rows
    before = compiled.frame_count
    for seed in range(5):
        attend_twice(rows_on_a_gpu(2, 32, seed))
    assert compiled.frame_count == before + 2


def test_more_shapes_than_are_compiled_are_an_error_and_not_dense_scores(
    compiled: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "FLEX_SHAPES", 4)
    for rows in (1, 2):
        attend_twice(rows_on_a_gpu(rows, 32))
    with pytest.raises(FailOnRecompileLimitHit):
        attend_twice(rows_on_a_gpu(3, 32))
    assert compiled.frame_count == 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("loss", ["stage 1", "frozen", "joint"])
def test_the_losses_of_block_masks_are_those_of_dense_masks(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward only: FlexAttention has no backward pass on a CPU; tests/test_cuda.py has the gradients."""
    batch, noise = conversations()
    vae, dit, reference = tiny_vae(**VAE, log_snr=2.0), tiny_dit(**DIT), tiny_vae(1, **VAE, log_snr=2.0)
    weights, masks = JointSection(), []

    @torch.no_grad()
    def found() -> dict[str, Tensor]:
        if loss == "stage 1":
            made = vae_loss(vae, batch, noise, weights)
        elif loss == "frozen":
            made = prior_loss(vae, dit, batch, noise, 0)
        else:
            made = joint_loss(vae, dit, reference, batch, noise, weights, 0)
        return {"total": made.total, **made.terms}

    dense = found()
    real = Layout._of_rows.__func__  # type: ignore[attr-defined]

    def with_block_masks(cls: type[Layout], *arguments: Any) -> Layout:
        *before, flex, alone = arguments if len(arguments) == 8 else (*arguments, None)
        assert not flex
        layout: Layout = real(cls, *before, True, alone)
        masks.append(layout)
        return layout

    monkeypatch.setattr(Layout, "_of_rows", classmethod(with_block_masks))
    monkeypatch.setattr(layers, "_compiled_flex", lambda: flex_attention)
    by_blocks = found()
    assert masks
    for name, value in dense.items():
        torch.testing.assert_close(by_blocks[name], value, rtol=1e-5, atol=1e-6, msg=name)
