"""What only a GPU can show; skipped, with a reason, where there is none."""

from __future__ import annotations

import pytest
import torch

from colada.objectives import FlowSettings, JointWeights, VAEWeights, stage1_loss, stage2_joint_loss
from helpers import tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = [[5, 6, 7, 8, 9], [], [11, 12]]


def test_generation_on_the_gpu_equals_the_cpu() -> None:
    on_cpu = tiny_model().generate(PROMPTS, 13, guidance=3.0, seed=4)
    on_gpu = tiny_model().to("cuda").generate(PROMPTS, 13, guidance=3.0, seed=4)
    assert [done.tokens for done in on_gpu] == [done.tokens for done in on_cpu]


def test_generation_runs_in_bfloat16() -> None:
    model = tiny_model().to("cuda", torch.bfloat16)
    assert [len(done.tokens) for done in model.generate(PROMPTS, 13, guidance=3.0)] == [13, 13, 13]


def test_both_losses_have_the_same_gradients_on_the_gpu() -> None:
    def gradients(device: str) -> list[torch.Tensor]:
        model, reference = tiny_model().to(device), tiny_model(seed=1).to(device)
        ids = torch.arange(32, device=device).view(2, 16)
        generator = torch.Generator().manual_seed(0)
        first = stage1_loss(model.vae, ids, VAEWeights(), generator)
        second = stage2_joint_loss(
            model.vae,
            model.dit,
            reference.vae,
            ids,
            0,
            FlowSettings(prefix_share=0.5),
            VAEWeights(),
            JointWeights(),
            generator,
        )
        (first.total + second.total).backward()
        networks = (model.vae, model.dit)
        return [p.grad.cpu() for net in networks for p in net.parameters() if p.grad is not None]

    for ours, theirs in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
