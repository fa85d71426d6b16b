"""Measuring generation: the counted work, the opponents' equality, who is timed when, what is reported."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.generation import contestants, levers, machine, mixed, run
from benchmarks.generation.__main__ import bench_app
from benchmarks.generation.ar import ar, matched_parameters
from benchmarks.generation.levers import EXACT, Lever, measure_levers, next_blocks, own_prompts
from benchmarks.generation.machine import Rates, copy_bandwidth, fastest, machine_name, matmul_rate
from benchmarks.generation.mixed import Request, engine_serve, full_batch, measure_mixed, mixed_requests
from benchmarks.generation.models import SIZES, random_model, size_configs
from benchmarks.generation.plain import PlainGenerator
from benchmarks.generation.run import Spread, measure_cell, random_prompts, sweep, take_turn
from benchmarks.generation.work import (
    Job,
    Work,
    blocks_of,
    generation_work,
    history_bytes,
    limit,
    prompt_latents,
)
from colada.errors import ColadaError
from colada.generate.engine.engine import Engine
from colada.generate.reference import BlockGenerator, sample_noise
from colada.models import cola as model_module
from colada.models.cola import ColaDLM
from colada.networks.config import DiTConfig, TextVAEConfig
from colada.networks.dit import DiT
from colada.networks.packing import block_causal
from colada.networks.vae import TextVAE
from colada.text.transcript import Chunk
from helpers import tiny_model

CPU = torch.device("cpu")
RATES = Rates(bandwidth=1e9, matmul=1e9)


# --- work ----------------------------------------------------------------------------------------


def linear_entries(network: nn.Module) -> int:
    return sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d))


def adaln_entries(dit: DiT) -> int:
    per_block = sum(linear_entries(block.ada) for block in dit.blocks)  # type: ignore[arg-type]
    return per_block + linear_entries(dit.emb_in) + linear_entries(dit.txt_out_ada)


def counted_flops(model: ColaDLM, job: Job, guidance: float) -> tuple[int, int, int]:
    """FLOPs of the reference by torch's count, those of AdaLN, and those of outputs nobody reads."""
    timesteps, outputs = 0, 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal timesteps, outputs
        if module is model.dit.emb_in:
            timesteps += len(inputs[0])
        else:
            outputs += len(inputs[0])

    hooks = [part.register_forward_pre_hook(note) for part in (model.dit.emb_in, model.dit.txt_out)]
    stream = contestants.reference(model, guidance, 0)(random_prompts(job, 50, 0), job)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for _ in stream:
            pass
    for hook in hooks:
        hook.remove()
    config = model.dit.config
    cells = config.block_size // config.patch_size
    prefix, _ = prompt_latents(model.vae.config, job.context)
    useful = 0
    for number in range(blocks_of(model.vae.config, job)):
        guided = job.guided and prefix + number > 0
        useful += job.steps * job.batch * cells * (2 if guided else 1)
    unread = 2 * (outputs - useful) * model.dit.txt_out.proj.weight.numel()
    return counter.get_total_flops(), 2 * timesteps * adaln_entries(model.dit), unread


@pytest.mark.parametrize("context", [0, 3, 8, 10])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("patches", [(1, 1), (2, 1), (1, 2)])
def test_flops_are_those_of_the_reference_without_what_is_avoidable(
    context: int, guidance: float, patches: tuple[int, int]
) -> None:
    model = tiny_model(vae={"patch_size": patches[0]}, dit={"patch_size": patches[1]})
    job = Job(2, context, 13, steps=3, guided=guidance != 1)
    counted, adaln, unread = counted_flops(model, job, guidance)
    vae, dit = model.vae.config, model.dit.config
    # The products of scores that a mask hides are counted by torch, and are not useful.
    prefix, tail = prompt_latents(vae, context)
    hidden = 0
    for length, block, layers, width in (
        (prefix + (4 if tail else 0), 4, vae.encoder_num_blocks, vae.dim),
        (prefix, 4, vae.decoder_num_blocks, vae.dim),
        (prefix // patches[1], 4 // patches[1], dit.num_layers, dit.heads * dit.head_dim),
    ):
        visible = int(block_causal(length, length, block).sum())
        hidden += 4 * layers * width * job.batch * (length**2 - visible)
    ours = sum(part.flops for part in generation_work(vae, dit, job, 4).values())
    assert ours == counted - adaln - unread - hidden


def test_bytes_by_hand() -> None:
    model = tiny_model()
    vae, dit = model.vae.config, model.dit.config
    parts = generation_work(vae, dit, Job(3, 8, 8, steps=5), 2)
    prior = linear_entries(model.dit) - adaln_entries(model.dit)
    output = linear_entries(model.dit.txt_out)
    head = linear_entries(model.vae.decoder.final_layer)
    decoder = linear_entries(model.vae.decoder) - head
    # Keys and values of 2 layers of width 32 in both networks: 128 numbers a position.
    assert parts["prompt"].bytes == 2 * (
        linear_entries(model.vae.encoder) + prior - output + 3 * 8 * 128 + decoder + 3 * 8 * 128
    )
    # Two blocks of 5 steps, which read 8 and 12 positions; the commit in between writes 4.
    # AdaLN is a row of 14 vectors a step.
    passes = 10 * (prior + 14 * 32) + 5 * 3 * (8 + 12) * 128
    assert parts["transport"].bytes == 2 * (passes + 3 * 4 * 128)
    # Each block is decoded, and written to the decoder's history.
    assert parts["decoder"].bytes == 2 * (2 * (decoder + head) + 3 * (8 + 4 + 12 + 4) * 128)


def test_the_released_size() -> None:
    vae, dit = TextVAEConfig(block_size=16), DiTConfig(block_size=16)
    assert history_bytes(vae, dit, 2) == 216 * 1024
    with torch.device("meta"):
        decoder, prior = TextVAE(vae).decoder, DiT(dit)
    first = generation_work(vae, dit, Job(1, 0, 16, steps=1), 2)
    read = linear_entries(prior) - adaln_entries(prior) + (6 * 24 + 2) * 2048
    assert first["transport"].bytes == 2 * read
    assert first["decoder"].bytes == 2 * linear_entries(decoder) + 16 * 24 * 1024
    assert first["prompt"] == Work()


def test_the_limit_adds_up_what_each_part_takes_at_least() -> None:
    parts = {"products": Work(6e9, 1e9), "memory": Work(1e9, 8e9)}
    assert limit(parts, Rates(bandwidth=4e9, matmul=2e9)) == 3 + 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0, 1, 1), "batch=0"),
        ((1, -1, 1), "context=-1"),
        ((1, 1, 0), "new_tokens=0"),
        ((1, 1, 1, 0), "steps=0"),
    ],
)
def test_impossible_jobs(values: tuple[int, ...], said: str) -> None:
    with pytest.raises(ColadaError, match=said):
        Job(*values)


# --- opponents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 3, 8, 10])
@pytest.mark.parametrize(("guidance", "prediction"), [(1.0, "velocity"), (3.0, "z0"), (3.0, "velocity")])
@pytest.mark.parametrize("patches", [(1, 1), (2, 1), (1, 2)])
def test_the_plain_path_equals_the_reference(
    context: int, guidance: float, prediction: str, patches: tuple[int, int]
) -> None:
    model = tiny_model(
        vae={"patch_size": patches[0]}, dit={"patch_size": patches[1], "prediction": prediction}
    )
    context *= math.lcm(*patches)  # Whole latents, and whole patches of the DiT.
    prompts = random_prompts(Job(3, context, 1), 50, seed=1)
    seeds = [5, 9, 2]
    engine = BlockGenerator(model.vae, model.dit, steps=4)
    blocks = PlainGenerator(model.vae, model.dit, 4, guidance).blocks(prompts, 3, seeds, 0)
    with torch.inference_mode():
        noises = [sample_noise(seed, (4, 8), CPU) for seed in seeds]
        samples = engine.start(prompts, noises, seeds, [guidance] * 3, 0)
        for latents, ids in blocks:
            for _ in engine.next_block(samples):
                pass
            done = [sample.block for sample in samples if sample.block is not None]
            expected = torch.stack([block.latents for block in done])
            assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert ids.tolist() == [block.ids for block in done]


def test_the_plain_path_takes_prompts_of_one_length() -> None:
    model = tiny_model()
    with pytest.raises(ColadaError, match=r"\[1, 2\] tokens, expected one length"):
        next(PlainGenerator(model.vae, model.dit, 2, 1.0).blocks([[1], [1, 2]], 1, [0, 1], 0))


@pytest.mark.parametrize("context", [0, 4, 7])
def test_all_contestants_stream_the_same_tokens(context: int) -> None:
    model = tiny_model(generation={"steps": 9, "solver": "ab2", "temperature": 1.0})
    job = Job(2, context, 10, steps=3)
    prompts = random_prompts(job, 50, 3)
    makers = (contestants.engine, contestants.reference, contestants.plain)
    streams = [
        [replace(chunk, completion=None) for chunk in make(model, 3.0, 7)(prompts, job)] for make in makers
    ]
    assert streams[0] == streams[1] == streams[2]
    tokens = [sum(len(chunk.tokens) for chunk in streams[0] if chunk.index == index) for index in (0, 1)]
    assert tokens == [10, 10]


def test_the_ar_opponent_matches_what_generates() -> None:
    model = tiny_model()
    everything = sum(p.numel() for network in (model.dit, model.vae) for p in network.parameters())
    encoder = sum(p.numel() for p in model.vae.encoder.parameters())
    assert matched_parameters(model) == everything - encoder


def test_the_ar_opponent_writes_what_a_job_asks_for() -> None:
    model = random_model(*size_configs("tiny", layers=1, width=64), CPU, torch.float32, 0)
    job = Job(2, 3, 6)
    chunks = list(ar(model, 7.0, 0)([[1, 2, 3], [4, 5, 6]], job))
    assert [sum(len(chunk.tokens) for chunk in chunks if chunk.index == own) for own in (0, 1)] == [6, 6]
    turn = take_turn(ar(model, 7.0, 0), [[1, 2, 3], [4, 5, 6]], job, 4, CPU)
    assert 0 < turn.first < turn.seconds


# --- random models -------------------------------------------------------------------------------


def test_sizes() -> None:
    for size in SIZES:
        vae, dit = size_configs(size)
        assert (vae.latent_dim, vae.block_size) == (dit.txt_in_channels, dit.block_size)
    assert size_configs("2.3b")[1] == DiTConfig(block_size=16)
    tiny, small = size_configs("tiny")[1], size_configs("small")[1]
    assert [(dit.num_layers, dit.txt_dim) for dit in (tiny, small)] == [(6, 256), (12, 768)]
    changed = size_configs("tiny", 4, layers=3, width=128)[1]
    assert (changed.num_layers, changed.txt_dim, changed.heads, changed.block_size) == (3, 128, 2, 4)
    with pytest.raises(ColadaError, match="width=100, expected a multiple of head_dim=64"):
        size_configs("tiny", width=100)


def test_random_weights_are_the_seeds_and_all_have_an_effect() -> None:
    vae, dit = size_configs("tiny", 4, layers=1, width=64)
    one, same, other = (random_model(vae, dit, CPU, torch.bfloat16, seed) for seed in (1, 1, 2))
    for name in ("vae", "dit"):
        first, again, second = (getattr(model, name).state_dict() for model in (one, same, other))
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not all(torch.equal(first[key], second[key]) for key in first)
        assert all(bool(tensor.any()) for tensor in first.values())
        assert {p.dtype for p in getattr(one, name).parameters()} == {torch.bfloat16}


# --- the machine ---------------------------------------------------------------------------------


def test_rates_are_amounts_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.5, 4.0, 1.0])
    monkeypatch.setattr(machine, "fastest", lambda run, device: (run(), next(times))[1])
    assert copy_bandwidth(CPU, 1000) == 2 * 1000 / 0.5
    # 2 * 2 * 3 * 4 FLOPs in 4 s, 2 * 5 * 6 * 7 in 1 s.
    assert matmul_rate(CPU, torch.float32, [(2, 3, 4), (5, 6, 7)]) == 420


def test_the_fastest_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, machine)
    durations = iter([9.0, 3.0, 2.0, 5.0])  # The first is no measurement.
    assert fastest(lambda: clock.pass_by(next(durations)), CPU, seconds=0.0, least=3) == 2


def test_the_machine_has_a_name() -> None:
    assert machine_name(CPU).endswith((" thread", " threads"))


# --- turns ---------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when told to, as ``time.perf_counter`` of a module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def paced(clock: Clock, name: str, log: list[str], paces: Iterator[float]) -> contestants.Contestant:
    """Delivers a block of 4 tokens a sample after every ``pace`` seconds of the turn."""

    def contestant(prompts: contestants.Prompts, job: Job) -> Iterator[Chunk]:
        log.append(name)
        pace = next(paces)
        for number in range(job.new_tokens // 4):
            clock.pass_by(pace)
            for index in range(job.batch):
                yield Chunk(index, number, None, "", (0,) * 4)

    return contestant


def test_contestants_take_turns_and_ratios_are_of_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch, run), list[str]()
    entrants = {
        "engine": paced(clock, "engine", log, iter([50.0, 1.0, 2.0, 4.0])),
        "plain": paced(clock, "plain", log, iter([70.0, 3.0, 8.0, 4.0])),
        "ar": paced(clock, "ar", log, iter([70.0, 1.0, 1.0, 1.0])),
    }
    model, job = tiny_model(), Job(2, 8, 12, steps=2)
    cell = measure_cell(model, entrants, job, RATES, repeats=3, warm_up=1)
    assert log == ["engine", "plain", "ar"] * 4
    engine = cell.results["engine"]
    assert [turn.seconds for turn in engine.turns] == [3, 6, 12]
    assert engine.rate == Spread(24 / 6, 24 / 12, 24 / 3)
    assert (engine.first, engine.block) == (Spread(2, 1, 4), Spread(2, 1, 4))
    # Turn by turn 3, 4 and 1; the ratio of the medians would be 2.
    assert cell.speedups["plain"] == Spread(3, 1, 4)
    assert cell.speedups["ar"] == Spread(0.5, 0.25, 1)
    work = generation_work(model.vae.config, model.dit.config, job, 4)
    assert cell.least_seconds == limit(work, RATES)
    assert engine.of_limit is not None
    assert engine.of_matmul is not None
    assert engine.of_limit.median == cell.least_seconds / 6
    assert engine.of_matmul.median == cell.total.flops / 6 / RATES.matmul
    assert cell.results["ar"].of_limit is None


def test_a_prompts_tail_shortens_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, run)

    def contestant(prompts: contestants.Prompts, job: Job) -> Iterator[Chunk]:
        for number, tokens in enumerate((1, 4, 4)):
            clock.pass_by(2.0)
            yield Chunk(0, number, None, "", (0,) * tokens)

    cell = measure_cell(
        tiny_model(), {"engine": contestant}, Job(1, 7, 9, steps=2), RATES, repeats=1, warm_up=0
    )
    assert cell.results["engine"].first.median == 2
    assert cell.results["engine"].block == Spread(2, 2, 2)


def test_who_does_not_fit_leaves_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch, run), list[str]()

    def too_large(prompts: contestants.Prompts, job: Job) -> Iterator[Chunk]:
        log.append("plain")
        raise torch.OutOfMemoryError

    entrants = {"engine": paced(clock, "engine", log, iter([1.0, 1.0])), "plain": too_large}
    cell = measure_cell(tiny_model(), entrants, Job(1, 8, 4, steps=2), RATES, repeats=1, warm_up=1)
    assert log == ["engine", "plain", "engine"]
    assert (list(cell.results), cell.out_of_memory, cell.speedups) == (["engine"], ("plain",), {})
    assert cell.results["engine"].block is None


def test_too_few_tokens_are_no_measurement() -> None:
    def lazy(prompts: contestants.Prompts, job: Job) -> Iterator[Chunk]:
        yield Chunk(0, 0, None, "", (1, 2))

    with pytest.raises(ColadaError, match="2 tokens were generated, expected 8"):
        take_turn(lazy, [[], []], Job(2, 0, 4), 4, CPU)


def test_the_sweep_has_every_combination() -> None:
    jobs = list(sweep([1, 8], [16, 32], [4, 16], 20, True))
    assert [(job.batch, job.context, job.steps) for job in jobs] == list(product([1, 8], [16, 32], [4, 16]))
    assert {(job.new_tokens, job.guided) for job in jobs} == {(20, True)}


# --- mixed lengths -------------------------------------------------------------------------------


def test_mixed_requests_are_the_seeds_and_around_the_lengths_given() -> None:
    requests = mixed_requests(400, 20, 8, 50, seed=3)
    assert requests == mixed_requests(400, 20, 8, 50, seed=3) != mixed_requests(400, 20, 8, 50, seed=4)
    assert {len(request.ids) for request in requests} == set(range(10, 31))
    assert {request.new_tokens for request in requests} == set(range(4, 13))
    assert [len(one.ids) for one in mixed_requests(2, 0, 1, 50, 0)] == [0, 0]
    full = full_batch([Request((1,) * 3, 4), Request((1,) * 6, 9)], 5, 50, 0)
    assert [(len(one.ids), one.new_tokens) for one in full] == [(4, 6)] * 5


def test_the_ideal_is_the_rate_of_a_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, mixed)
    seconds = iter([99.0, 99.0, 2.0, 12.0, 3.0, 15.0])

    def serve(requests: Sequence[Request], slots: int) -> int:
        clock.pass_by(next(seconds))
        return sum(request.new_tokens for request in requests)

    requests = [Request((1, 2), new) for new in (6, 10, 8, 8, 8, 8, 8, 8, 8, 8)]
    found = measure_mixed(serve, requests, 2, CPU, vocab_size=50, repeats=2, warm_up=1)
    # A full batch is 2 requests of 8 tokens, the mixed ones are 80 tokens: five times as long, at best.
    assert (found.tokens, found.ideal) == (80, Spread(12.5, 10, 15))
    assert found.seconds == Spread(13.5, 12, 15)
    assert found.share == Spread((10 / 12 + 1) / 2, 10 / 12, 1)
    with pytest.raises(ColadaError, match="0 tokens were generated, expected 16"):
        measure_mixed(lambda *_: 0, requests, 2, CPU, vocab_size=50, repeats=1, warm_up=0)


def test_the_engine_keeps_its_slots_full(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    next_block = Engine.next_block

    def noted(self: Engine) -> Iterator[Any]:
        yield from next_block(self)
        widths.append(len(self.under_way))

    monkeypatch.setattr(Engine, "next_block", noted)
    # 2, 1, 3 and 1 blocks of 4: the tail of the second prompt takes 3 tokens of its only block.
    requests = [Request((1,) * 4, 8), Request((1,) * 7, 1), Request((), 11), Request((2,) * 9, 3)]
    assert engine_serve(tiny_model(), 2, 3.0, 0)(requests, 2) == 23
    assert widths == [2, 2, 2, 1]


@pytest.fixture
def bucketed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way on a CPU: passes are padded, histories to 32 latents and more."""
    for module in (levers, model_module):
        monkeypatch.setattr(module, "Engine", partial(Engine, bucket=32))


@pytest.mark.usefixtures("bucketed")
@pytest.mark.parametrize("slots", [1, 3])
def test_mixed_requests_are_served_where_history_comes_in_buckets(slots: int) -> None:
    requests = mixed_requests(4, 12, 6, 50, seed=1)
    assert engine_serve(tiny_model(), 2, 3.0, 0)(requests, slots) == sum(own.new_tokens for own in requests)


@pytest.mark.usefixtures("bucketed")
def test_every_prompt_of_a_lever_is_measured_where_history_comes_in_buckets() -> None:
    model = tiny_model()
    settings = {"steps": 2, "solver": "euler", "schedule": "uniform"}
    prompts = [tuple(range(1, 2 + number)) for number in range(12)]
    latents, ids, _ = next_blocks(model, prompts, 3.0, settings, seed=0)
    assert len(latents) == len(ids) == 12


# --- levers ---------------------------------------------------------------------------------------


def test_levers_are_priced_against_the_exact_flow() -> None:
    chosen = [
        Lever("exact", EXACT),
        Lever("few", {"steps": 2, "solver": "euler", "schedule": "uniform"}),
        Lever("half", {"steps": 4, "solver": "ab2", "schedule": "uniform", "interval": (0.6, 1.0)}),
    ]
    exact, few, half = measure_levers(tiny_model, chosen, count=6, context=8, repeats=2, seed=0)
    assert (exact.error, exact.agreement, exact.agreement_error) == (0, 1, 0)
    assert few.error > 0.01
    assert [price.passes for price in (exact, few, half)] == [512, 4, 2 + 2 + 1 + 1]
    assert half.seconds.least > 0


def test_own_prompts_are_seeded_and_as_long_as_asked() -> None:
    model = tiny_model()
    prompts = own_prompts(model, 70, 5, 3)
    assert [len(ids) for ids in prompts] == [5] * 70
    assert prompts[66] == model.generate([[]], 5, seed=69)[0].tokens


# --- the command ---------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    return typer.main.get_command(bench_app).main(list(arguments), standalone_mode=False) or 0


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine is taken to be of these rates."""
    monkeypatch.setattr(machine, "measure_rates", lambda *_: RATES)


SMALL = ["generate", "--layers", "1", "--width", "64", "--block-size", "4", "--steps", "2", "-n", "10"]


@pytest.mark.usefixtures("quick")
def test_json_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "1,2", "--context", "6", "--repeats", "2", "--mixed", "3", "--json"]
    assert command(*SMALL, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert [cell["job"]["batch"] for cell in found["cells"]] == [1, 2]
    for cell in found["cells"]:
        assert list(cell["results"]) == ["engine", "plain", "reference", "ar"]
        assert set(cell["speedups"]) == {"plain", "reference", "ar"}
        work, tokens = cell["work"].values(), cell["job"]["batch"] * 10
        assert cell["flops_per_token"] == pytest.approx(sum(part["flops"] for part in work) / tokens)
        assert cell["limit_tokens_per_second"] == pytest.approx(tokens / cell["least_seconds"])
        for name, result in cell["results"].items():
            assert len(result["turns"]) == 2
            rate = result["rate"]
            assert 0 < rate["least"] <= rate["median"] <= rate["most"]
            if name == "ar":
                assert result["of_limit"] is None  # the limit is of another model's work
                continue
            assert result["of_limit"]["median"] == pytest.approx(
                rate["median"] * cell["least_seconds"] / tokens
            )
    assert [one["slots"] for one in found["mixed"]] == [1, 2]
    assert (found["dtype"], found["seed"], found["rates"]["matmul"]) == ("float32", 0, 1e9)
    assert {"torch", "colada"} <= set(found["made_with"])


@pytest.mark.usefixtures("quick")
def test_tables_fit_a_terminal_of_eighty_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plot = tmp_path / "speed.svg"
    options = ["--batch", "2", "--context", "4", "--repeats", "1", "--mixed", "2", "--plot", str(plot)]
    assert command(*SMALL, *options) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.startswith("wrote")) <= 80
    assert "…" not in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert {"engine", "plain", "reference"} <= set(rows)
    assert "batch 2, context 4, 2 steps" in out
    assert "2 mixed requests, 2 at once" in out
    drawn = plot.read_text()
    assert all(name in drawn for name in ("engine", "plain", "reference", "limit", "batch 2, context 4"))


@pytest.mark.usefixtures("quick")
def test_a_saved_model_without_opponents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save(tmp_path)
    options = ["--batch", "1", "--context", "8", "--steps", "2", "-n", "4", "--repeats", "1", "--json"]
    assert command("generate", "--model", str(tmp_path), "--opponents", "none", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["cells"][0]["results"]) == ["engine"]
    assert found["cells"][0]["results"]["engine"]["block"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--opponents", "plane"], "'plane', expected some of plain, reference, ar, none.*mean 'plain'"),
        (["--opponents", "plain,plain"], "'plain' is there twice"),
        (["--opponents", ""], "--opponents : ''"),
        (["--size", "smal"], "size='smal', expected one of .*mean 'small'"),
        (["--width", "100"], "width=100"),
        (["--batch", ""], "--batch : '', expected whole numbers of at least 1"),
        (["--batch", "1,0"], "--batch 1,0: '0'"),
        (["--context", "16,x"], "--context 16,x: 'x', expected whole numbers of at least 0"),
        (["--steps", "-4"], "--steps -4: '-4'"),
        (["--size", "tiny", "--dtype", "float8"], "dtype='float8'"),
        (["--size", "tiny", "--device", "gpu"], "device='gpu'"),
        (["--model", "there", "--layers", "2"], "--model there and --layers 2, expected one of them"),
        (["--revision", "main", "--size", "tiny"], "--revision main and --size tiny, expected one of them"),
        (["--plot", "speed.gif"], "speed.gif: suffix '.gif', expected one of .png"),
        (["--plot", "nowhere/speed.png"], "there is no directory nowhere"),
    ],
)
def test_bad_options(arguments: list[str], said: str) -> None:
    with pytest.raises(ColadaError, match=said) as caught:
        command("generate", *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ColadaError, match="device='cuda' cannot be used"):
        command(*SMALL, "--device", "cuda")


@pytest.mark.parametrize("option", ["--repeats", "--new-tokens", "--mixed"])
def test_nothing_to_measure(option: str) -> None:
    with pytest.raises(typer.BadParameter.__bases__[0]):
        command("generate", option, "0")


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_a_plot_over_what_is_no_file_is_refused_before_anything_is_measured(
    tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "speed.svg"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(ColadaError, match="no regular file"):
        command("generate", "--size", "tiny", "--plot", str(place))
