"""What only a GPU can show; skipped, with a reason, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit

from colada.cli.parity import run_case
from colada.data.rows import FILLING, Batch
from colada.models.load import load
from colada.networks import layers
from colada.train.flow_matching import flow_errors
from colada.train.kinds import FlowTerms, JointSection, TextVAETerms
from colada.train.losses import joint_loss, vae_loss
from colada.train.noise import StepNoise, draw_noise
from colada.train.parallel import compile_blocks
from colada.train.trainer import MODEL, Trainer
from helpers import tiny_dit, tiny_model, tiny_vae
from runs import metrics, recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROMPTS = [[5, 6, 7, 8, 9], [], [11, 12]]
# FlexAttention computes no heads narrower than 16.
VAE, DIT = {"num_heads": 2}, {"head_dim": 16}
WIDE_HEADS = ["model.vae.dim=32", "model.vae.num_heads=2", "model.dit.head_dim=16"]


def test_generation_on_the_gpu_equals_the_cpu() -> None:
    on_cpu = tiny_model().generate(PROMPTS, 13, guidance=3.0, seed=4)
    on_gpu = tiny_model().to("cuda").generate(PROMPTS, 13, guidance=3.0, seed=4)
    assert [done.tokens for done in on_gpu] == [done.tokens for done in on_cpu]


def test_generation_runs_in_bfloat16() -> None:
    model = tiny_model().to("cuda", torch.bfloat16)
    assert [len(done.tokens) for done in model.generate(PROMPTS, 13, guidance=3.0)] == [13, 13, 13]


def test_replayed_graphs_change_nothing_and_are_kept_between_calls() -> None:
    on_cpu, on_gpu = tiny_model(), tiny_model().to("cuda")
    for seed in range(3):
        expected = [done.tokens for done in on_cpu.generate(PROMPTS, 21, guidance=3.0, seed=seed)]
        assert [done.tokens for done in on_gpu.generate(PROMPTS, 21, guidance=3.0, seed=seed)] == expected
    (engine,) = on_gpu._kept
    assert engine.graphs is not None
    assert engine.graphs.captures == 2  # with the append of the block before, and without


def test_requests_of_every_kind_share_a_gpu() -> None:
    settings = [
        {"steps": 2, "guidance": 1.0},
        {"steps": 5, "solver": "ab2"},
        {"steps": 3, "temperature": 1.0},
    ]
    on_cpu, session = tiny_model(), tiny_model().to("cuda").session(capacity=256, slots=2)
    for seed, (prompt, own) in enumerate(zip(PROMPTS, settings, strict=True)):
        session.submit(prompt, 13, seed=seed, **own)
    completions = [chunk.completion for chunk in session.chunks() if chunk.completion is not None]
    completions.sort(key=lambda done: done.seed)
    for seed, (prompt, own, done) in enumerate(zip(PROMPTS, settings, completions, strict=True)):
        assert done.tokens == on_cpu.generate([prompt], 13, seed=seed, **own)[0].tokens


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Equal but for rounding, relative to the largest number of all."""
    largest = max(float(tensor.abs().max()) for tensor in theirs)
    assert largest > 0
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_flow_errors_of_block_masks_equal_those_of_dense_masks(copies: int, samples: bool) -> None:
    # Rows of several tiles of 128 cells; on the CPU the mask is dense.
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(2, 96, 8, generator=generator)
    noise = torch.randn(2, copies, 96, 8, generator=generator)
    timestep = 1000 * torch.rand(2, copies, 24, generator=generator).repeat_interleave(4, 2)
    sample = torch.tensor([[0] * 40 + [1] * 56, [0] * 84 + [FILLING] * 12]) if samples else None

    def found(device: str) -> list[Tensor]:
        dit, leaf = tiny_dit(**DIT).to(device), z0.to(device).requires_grad_()
        own = None if sample is None else sample.to(device)
        errors = flow_errors(dit, leaf, noise.to(device), timestep.to(device), None, own)
        return [errors.detach(), *torch.autograd.grad(errors.mean(), [leaf, *dit.parameters()])]

    on_gpu, on_cpu = found("cuda"), found("cpu")
    same(on_gpu[:1], on_cpu[:1])
    same(on_gpu[1:], on_cpu[1:])


def conversations() -> tuple[Batch, StepNoise]:
    """Two rows of samples, one with a prompt that ends in a block, and some filling."""
    ids = torch.arange(128).view(2, 64) % 49 + 1
    sample = torch.tensor([[0] * 40 + [1] * 24, [0] * 52 + [FILLING] * 12])
    trained = sample != FILLING
    trained[0, :10] = False
    settings = FlowTerms(copies=2, prefix_share=0.05)
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    return Batch(ids, sample, trained), draw_noise(
        generators, tiny_vae(**VAE).config, 64, TextVAETerms(), settings
    )


def test_both_losses_have_the_same_gradients_on_the_gpu() -> None:
    batch, noise = conversations()

    def found(device: str) -> list[Tensor]:
        vae, dit = tiny_vae(**VAE).to(device), tiny_dit(**DIT).to(device)
        reference, place = tiny_vae(1, **VAE).to(device), torch.device(device)
        rows, drawn = batch.to(place), noise.to(place)
        first = vae_loss(vae, rows, drawn, TextVAETerms())
        second = joint_loss(vae, dit, reference, rows, drawn, JointSection(), 0)
        total = first.total + second.total
        return [total.detach(), *torch.autograd.grad(total, [*vae.parameters(), *dit.parameters()])]

    on_gpu, on_cpu = found("cuda"), found("cpu")
    same(on_gpu[:1], on_cpu[:1])
    same(on_gpu[1:], on_cpu[1:])


@pytest.mark.parametrize("compiled", [False, True])
def test_losses_under_autocast_are_near_those_in_float32(compiled: bool) -> None:
    batch, noise = conversations()
    place = torch.device("cuda")
    rows, drawn = batch.to(place), noise.to(place)

    def found(precision: torch.dtype, compiled: bool) -> tuple[float, list[Tensor]]:
        vae, dit, reference = (
            own.to(place) for own in (tiny_vae(**VAE), tiny_dit(**DIT), tiny_vae(1, **VAE))
        )
        if compiled:
            compile_blocks(dit)
        with torch.autocast("cuda", precision, enabled=precision == torch.bfloat16):
            loss = joint_loss(vae, dit, reference, rows, drawn, JointSection(), 0).total
        return float(loss.detach()), list(torch.autograd.grad(loss, [*vae.parameters(), *dit.parameters()]))

    loss, gradients = found(torch.bfloat16, compiled)
    exact, plain = found(torch.float32, False)
    assert loss == pytest.approx(exact, rel=2e-2)
    ours, theirs = (torch.cat([own.flatten().float() for own in many]) for many in (gradients, plain))
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, 0)) > 0.99


def test_micro_batches_of_many_sizes_are_no_dense_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """More shapes than torch compiles by itself: beyond its limit it would fall back without a word."""
    dit = tiny_dit(**DIT).to("cuda")
    for rows in range(1, 13):
        z0 = torch.randn(rows, 64, 8, device="cuda")
        timestep = torch.full((rows, 1, 64), 500.0, device="cuda")
        flow_errors(dit, z0, torch.randn_like(z0)[:, None], timestep).mean().backward()
    monkeypatch.setattr(layers, "FLEX_SHAPES", 2)
    with pytest.raises(FailOnRecompileLimitHit):
        flow_errors(dit, z0[:, :32], torch.randn_like(z0)[:, None, :32], timestep[:, :, :32])


@pytest.mark.parametrize("setting", ["seed=0", "stages.prior.kind=joint", "run.compile=true"])
def test_a_run_on_the_gpu_has_the_losses_of_one_on_the_cpu_and_resumes(tmp_path: Path, setting: str) -> None:
    made = [*WIDE_HEADS, "stages.vae.micro_batch=3", "stages.prior.micro_batch=3", setting]

    def losses(device: str) -> list[float]:
        return [record["loss"] for record in metrics(tmp_path / device) if record["split"] == "train"]

    for device in ("cpu", "cuda"):
        Trainer(recipe(*made, f"run.device={device}"), tmp_path / device).run()
    whole = losses("cuda")
    assert whole == pytest.approx(losses("cpu"), rel=1e-3)
    Trainer(recipe(*made, "run.device=cuda"), tmp_path / "cuda", resume="prior-00000004").run()
    assert losses("cuda") == pytest.approx(whole, rel=1e-4)
    model = load(tmp_path / "cuda" / MODEL, device="cuda")
    assert len(model.generate(["Once"], 9)[0].tokens) == 9


def test_the_fixtures_hold_on_the_gpu(parity_cases: list[Path]) -> None:
    for directory in parity_cases:
        errors = run_case(directory, "cuda")
        assert errors.pop("tokens_equal")
        # Sums are in another order than the reference's.
        assert max(errors.values()) < 1e-4, directory


def test_a_server_on_the_gpu_answers_as_the_cpu_writes() -> None:
    import asyncio

    serving = pytest.importorskip("serving", reason="the extra `serve` is not installed")
    body = {"max_tokens": 40, "ignore_eos": True, "stream": True}
    bodies = [{**body, "prompt": "ab" * number, "seed": number} for number in range(24)]
    with serving.running({"bytes": serving.byte_model().to("cuda")}) as server:

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*[serving.ask(server.port, "/v1/completions", one) for one in bodies])

        answers = asyncio.run(all_of_them())
        server.empty()
    on_cpu = serving.byte_model()
    for one, answer in zip(bodies, answers, strict=True):
        serving.check_answer(answer, one, serving.alone(on_cpu, one))
