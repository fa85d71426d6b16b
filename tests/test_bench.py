"""Measuring generation: the counted cost, the peers' equality, who is timed when, what is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import machine, measure, table
from benchmarks.generation import job as job_module
from benchmarks.generation import levers, libraries, peers
from benchmarks.generation.__main__ import bench_app
from benchmarks.generation.apart import Apart
from benchmarks.generation.cost import Cost, blocks_of, generation_cost, limit, prompt_latents
from benchmarks.generation.job import Job, Write
from benchmarks.generation.levers import EXACT, Lever, measure_levers, next_blocks, own_prompts
from benchmarks.generation.peers import LIBRARIES, matched_parameters
from benchmarks.generation.run import (
    engine_serve,
    full_batch,
    measure_cell,
    measure_mixed,
    mixed_requests,
    random_prompts,
    sweep,
    take_turn,
)
from benchmarks.machine import Rates, copy_bandwidth, fastest, machine_name, matmul_rate
from benchmarks.measure import Spread
from benchmarks.models import SIZES, random_model, size_configs
from colada.errors import ColadaError
from colada.generate.engine.engine import Engine, cache_bytes
from colada.generate.settings import TextRequest
from colada.models import cola as model_module
from colada.models.autoregressive import AutoregressiveLM
from colada.models.cola import ColaDLM
from colada.networks.config import DecoderConfig, DiTConfig, TextVAEConfig
from colada.networks.decoder import Decoder
from colada.networks.dit import DiT
from colada.networks.packing import block_causal
from colada.networks.vae import TextVAE
from helpers import tiny_model

CPU = torch.device("cpu")
RATES = Rates(bandwidth=1e9, matmul=1e9)


# --- cost ----------------------------------------------------------------------------------------


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
    readable = peers.readable(model, guidance, 0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        readable(random_prompts(job, 50, 0), job, lambda index, ids: None)
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
    ours = sum(part.flops for part in generation_cost(vae, dit, job, 4).values())
    assert ours == counted - adaln - unread - hidden


def test_bytes_by_hand() -> None:
    model = tiny_model()
    vae, dit = model.vae.config, model.dit.config
    parts = generation_cost(vae, dit, Job(3, 8, 8, steps=5), 2)
    prior = linear_entries(model.dit) - adaln_entries(model.dit)
    output = linear_entries(model.dit.txt_out)
    head = linear_entries(model.vae.decoder.final_layer)
    decoder = linear_entries(model.vae.decoder) - head
    # Keys and values of 2 layers of width 32 in both networks: 128 numbers a position.
    assert parts["prompt"].bytes == 2 * (
        linear_entries(model.vae.encoder) + prior - output + 3 * 8 * 128 + decoder + 3 * 8 * 128
    )
    # Two blocks of 5 steps, which read 8 and 12 positions; the append in between writes 4.
    # AdaLN is a row of 14 vectors a step.
    passes = 10 * (prior + 14 * 32) + 5 * 3 * (8 + 12) * 128
    assert parts["transport"].bytes == 2 * (passes + 3 * 4 * 128)
    # Each block is decoded, and written to the decoder's KV cache.
    assert parts["decoder"].bytes == 2 * (2 * (decoder + head) + 3 * (8 + 4 + 12 + 4) * 128)


def test_the_released_size() -> None:
    vae, dit = TextVAEConfig(block_size=16), DiTConfig(block_size=16)
    with torch.device("meta"):
        text, prior = TextVAE(vae), DiT(dit)
    decoder = text.decoder
    assert cache_bytes(text, prior, 1) == 4 * 108 * 1024
    first = generation_cost(vae, dit, Job(1, 0, 16, steps=1), 2)
    read = linear_entries(prior) - adaln_entries(prior) + (6 * 24 + 2) * 2048
    assert first["transport"].bytes == 2 * read
    assert first["decoder"].bytes == 2 * linear_entries(decoder) + 16 * 24 * 1024
    assert first["prompt"] == Cost()


def test_the_limit_adds_up_what_each_part_takes_at_least() -> None:
    parts = {"products": Cost(6e9, 1e9), "memory": Cost(1e9, 8e9)}
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


# --- peers ---------------------------------------------------------------------------------------


def written(peer: peers.Peer, prompts: Sequence[Sequence[int]], job: Job) -> list[list[int]]:
    """What a peer writes for each prompt."""
    texts: list[list[int]] = [[] for _ in prompts]
    peer(prompts, job, lambda index, ids: texts[index].extend(ids))
    return texts


@pytest.mark.parametrize("context", [0, 4, 7])
def test_the_readable_loop_writes_the_engines_tokens(context: int) -> None:
    model = tiny_model(generation={"steps": 9, "solver": "ab2", "temperature": 1.0})
    job = Job(2, context, 10, steps=3)
    prompts = random_prompts(job, 50, 3)
    engine, readable = (written(make(model, 3.0, 7), prompts, job) for make in (peers.engine, peers.readable))
    assert engine == readable
    assert [len(ids) for ids in engine] == [10, 10]


def test_the_ar_peer_matches_what_generates() -> None:
    model = tiny_model()
    everything = sum(p.numel() for network in (model.dit, model.vae) for p in network.parameters())
    encoder = sum(p.numel() for p in model.vae.encoder.parameters())
    assert matched_parameters(model) == everything - encoder


def test_the_ar_peer_writes_what_a_job_asks_for() -> None:
    model = random_model(*size_configs("tiny", layers=1, width=64), CPU, torch.float32, 0)
    peer = peers.make_peers(model, ["ar"], 7.0, 0)["ar"]
    assert isinstance(peer, Apart)
    turn = peer.turn([[1, 2, 3], [4, 5, 6]], Job(2, 3, 6), 4)
    assert 0 < turn.first < turn.seconds
    with pytest.raises(ColadaError, match="0 tokens were generated, expected 6"):
        peer.turn([], Job(1, 3, 6), 4)
    peer.close()


def test_what_fails_in_a_peers_process_is_said_here() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no such library'"):
        Apart(
            CPU,
            peers.decoder_peer,
            "no such library",
            DecoderConfig(dim=64, num_heads=1),
            torch.float32,
            CPU,
            0,
        )


@pytest.mark.usefixtures("quick")
def test_a_distilled_model_is_a_row(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "teacher")
    inside = {"guidance": 5.0, "steps": [2], "grids": [[1, 0.5, 0]]}
    tiny_model(dit={"distilled": inside}).save(tmp_path / "student")
    words = [
        "--model",
        str(tmp_path / "teacher"),
        "--distilled",
        str(tmp_path / "student"),
        "--peers",
        "none",
    ]
    file = tmp_path / "speed.json"
    sizes = ["--batch", "1", "--context", "8", "--steps", "2", "-n", "4", "--repeats", "1"]
    assert command("speed", *words, *sizes, "--json", str(file)) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["peer"] for row in rows] == ["limit", "engine", "distilled"]
    engine, student = (row["tokens/s"]["median"] for row in rows[1:])
    assert rows[1]["distilled is"]["median"] == pytest.approx(student / engine)
    assert rows[2]["engine is"]["median"] == pytest.approx(engine / student)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIBRARIES)
def test_other_libraries_write_the_ar_baselines_tokens(name: str) -> None:
    """Also those that begin and end a text where that is left to a library."""
    pytest.importorskip(LIBRARIES[name], reason="not installed: pip install -r benchmarks/requirements.txt")
    config = DecoderConfig(
        vocab_size=97, dim=128, num_layers=3, num_heads=2, ffn_dim=192, init_std=0.2, bos_token_id=5
    )
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(0))
    job = Job(8, 9, 120)
    prompts = random_prompts(job, 97, 0)
    expected = [list(done.tokens) for done in AutoregressiveLM(decoder).generate(prompts, 120, end_ids=())]
    assert {5, 96} <= {token for ids in expected for token in ids}
    assert written(libraries.MAKERS[name](decoder), prompts, job) == expected


def test_an_exported_decoder_is_a_llama(tmp_path: Path) -> None:
    """Read back by the names and halves that a Llama has: logits by hand equal the decoder's."""
    config = DecoderConfig(vocab_size=11, dim=8, num_layers=1, num_heads=2, ffn_dim=6, rope_theta=100.0)
    decoder = Decoder(config).double()
    decoder.init_weights(torch.Generator().manual_seed(1))
    libraries.export_llama(decoder, tmp_path, spare=2)
    w = {name: t.double() for name, t in load_file(tmp_path / "model.safetensors").items()}
    keys = json.loads((tmp_path / "config.json").read_text())
    assert (keys["vocab_size"], keys["eos_token_id"]) == (13, 12)
    ids = torch.tensor([3, 1, 4])
    angles = torch.arange(3)[:, None] * keys["rope_theta"] ** (-torch.arange(2) / 2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None].to(torch.complex128)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + keys["rms_norm_eps"]).sqrt() * w[name]

    def rotated(x: Tensor) -> Tensor:
        both = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([both.real, both.imag], -1)

    layer = "model.layers.0."
    x = w["model.embed_tokens.weight"][ids]
    h = norm(x, f"{layer}input_layernorm.weight")
    q, k, v = ((h @ w[f"{layer}self_attn.{n}_proj.weight"].T).view(3, 2, 4) for n in ("q", "k", "v"))
    scores = torch.einsum("ihd,jhd->hij", rotated(q), rotated(k)) / 2
    scores = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1)
    x = x + torch.einsum("hij,jhd->ihd", scores, v).reshape(3, 8) @ w[f"{layer}self_attn.o_proj.weight"].T
    h = norm(x, f"{layer}post_attention_layernorm.weight")
    gate, up = (h @ w[f"{layer}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    x = x + (gate * gate.sigmoid() * up) @ w[f"{layer}mlp.down_proj.weight"].T
    logits = norm(x, "model.norm.weight") @ w["lm_head.weight"].T
    torch.testing.assert_close(
        logits[:, :11].float(), decoder(ids, decoder.layout([3])), rtol=1e-4, atol=1e-5
    )
    assert not logits[:, 11:].any()


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


def paced(clock: Clock, name: str, log: list[str], paces: Iterator[float]) -> peers.Peer:
    """Delivers a block of 4 tokens a sample after every ``pace`` seconds of the turn."""

    def peer(prompts: peers.Prompts, job: Job, write: Write) -> None:
        log.append(name)
        pace = next(paces)
        for _ in range(job.new_tokens // 4):
            clock.pass_by(pace)
            for index in range(job.batch):
                write(index, (0,) * 4)

    return peer


def test_peers_take_turns_and_ratios_are_of_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch, job_module), list[str]()
    entrants = {
        "engine": paced(clock, "engine", log, iter([50.0, 1.0, 2.0, 4.0])),
        "readable": paced(clock, "readable", log, iter([70.0, 3.0, 8.0, 4.0])),
        "ar": paced(clock, "ar", log, iter([70.0, 1.0, 1.0, 1.0])),
    }
    model, job = tiny_model(), Job(2, 8, 12, steps=2)
    cell = measure_cell(model, entrants, job, RATES, repeats=3, warm_up=1)
    assert log == ["engine", "readable", "ar"] * 4
    assert [turn.seconds for turn in cell.turns["engine"]] == [3, 6, 12]
    cost = generation_cost(model.vae.config, model.dit.config, job, 4)
    least, flops = limit(cost, RATES), sum(part.flops for part in cost.values())
    best, engine, readable, ar = cell.rows()
    assert (best["peer"], best["tokens/s"]) == ("limit", 24 / least)
    assert engine["tokens/s"] == Spread(24 / 6, 24 / 12, 24 / 3)
    assert (engine["first, ms"], engine["block, ms"]) == (Spread(2e3, 1e3, 4e3), Spread(2e3, 1e3, 4e3))
    # Turn by turn 3, 4 and 1; the ratio of the medians would be 2.
    assert readable["engine is"] == Spread(3, 1, 4)
    assert ar["engine is"] == Spread(0.5, 0.25, 1)
    assert engine["% limit"] == pytest.approx(100 * least / 6)
    assert engine["% products"] == pytest.approx(100 * flops / 6 / RATES.matmul)
    assert ar["% limit"] is None


def test_a_prompts_tail_shortens_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, job_module)

    def peer(prompts: peers.Prompts, job: Job, write: Write) -> None:
        for tokens in (1, 4, 4):
            clock.pass_by(2.0)
            write(0, (0,) * tokens)

    cell = measure_cell(tiny_model(), {"engine": peer}, Job(1, 7, 9, steps=2), RATES, repeats=1, warm_up=0)
    assert cell.turns["engine"][0].first == 2
    assert cell.rows()[1]["block, ms"] == Spread(2e3, 2e3, 2e3)


def test_who_does_not_fit_leaves_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch, job_module), list[str]()

    def too_large(prompts: peers.Prompts, job: Job, write: Write) -> None:
        log.append("readable")
        raise torch.OutOfMemoryError

    entrants = {"engine": paced(clock, "engine", log, iter([1.0, 1.0])), "readable": too_large}
    cell = measure_cell(tiny_model(), entrants, Job(1, 8, 4, steps=2), RATES, repeats=1, warm_up=1)
    assert log == ["engine", "readable", "engine"]
    assert (list(cell.turns), cell.out_of_memory) == (["engine"], ["readable"])
    assert cell.rows()[1]["block, ms"] is None


def test_too_few_tokens_are_no_measurement() -> None:
    with pytest.raises(ColadaError, match="2 tokens were generated, expected 8"):
        take_turn(lambda prompts, job, write: write(0, (1, 2)), [[], []], Job(2, 0, 4), 4, CPU)


def test_the_sweep_has_every_combination() -> None:
    jobs = sweep([1, 8], [16, 32], [4, 16], 20, True)
    assert [(job.batch, job.context, job.steps) for job in jobs] == list(product([1, 8], [16, 32], [4, 16]))
    assert {(job.new_tokens, job.guided) for job in jobs} == {(20, True)}


# --- mixed lengths -------------------------------------------------------------------------------


def test_mixed_requests_are_the_seeds_and_around_the_lengths_given() -> None:
    job = Job(1, 20, 8)
    requests = mixed_requests(400, job, 50, seed=3)
    assert requests == mixed_requests(400, job, 50, seed=3) != mixed_requests(400, job, 50, seed=4)
    assert {len(request.prompt) for request in requests} == set(range(10, 31))
    assert {request.max_new_tokens for request in requests} == set(range(4, 13))
    assert [len(one.prompt) for one in mixed_requests(2, Job(1, 0, 1), 50, 0)] == [0, 0]
    full = full_batch([TextRequest([1] * 3, 4, {}), TextRequest([1] * 6, 9, {})], 5, 50, 0)
    assert [(len(one.prompt), one.max_new_tokens) for one in full] == [(4, 6)] * 5


def test_the_ideal_is_the_rate_of_a_full_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, measure)
    seconds = iter([99.0, 99.0, 2.0, 12.0, 3.0, 15.0])

    def serve(requests: Sequence[TextRequest], slots: int) -> int:
        clock.pass_by(next(seconds))
        return sum(request.max_new_tokens for request in requests)

    requests = [TextRequest([1, 2], new, {}) for new in (6, 10, 8, 8, 8, 8, 8, 8, 8, 8)]
    row = measure_mixed(serve, requests, 2, CPU, vocab_size=50, repeats=2, warm_up=1)
    # A full batch is 2 requests of 8 tokens, the mixed ones are 80 tokens: five times as long, at best.
    shares = [100 * 5 * 2 / 12, 100 * 5 * 3 / 15]
    assert row["% ideal"] == Spread(sum(shares) / 2, *shares)
    assert row["tokens/s"] == Spread((80 / 12 + 80 / 15) / 2, 80 / 15, 80 / 12)
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
    lengths = [([1] * 4, 8), ([1] * 7, 1), ([], 11), ([2] * 9, 3)]
    requests = [TextRequest(ids, new, {}) for ids, new in lengths]
    assert engine_serve(tiny_model(), 2, 3.0, 0)(requests, 2) == 23
    assert widths == [2, 2, 2, 1]


@pytest.fixture
def bucketed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way on a CPU: passes are padded, caches to 32 latents and more."""
    for module in (levers, model_module):
        monkeypatch.setattr(module, "Engine", partial(Engine, bucket=32))


@pytest.mark.usefixtures("bucketed")
@pytest.mark.parametrize("slots", [1, 3])
def test_mixed_requests_are_served_where_the_cache_comes_in_buckets(slots: int) -> None:
    requests = mixed_requests(4, Job(1, 12, 6), 50, seed=1)
    tokens = sum(request.max_new_tokens for request in requests)
    assert engine_serve(tiny_model(), 2, 3.0, 0)(requests, slots) == tokens


@pytest.mark.usefixtures("bucketed")
def test_every_prompt_of_a_lever_is_measured_where_the_cache_comes_in_buckets() -> None:
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
        Lever("half", {"steps": 4, "solver": "ab2", "schedule": "uniform", "guidance_interval": (0.6, 1.0)}),
    ]
    exact, few, half = measure_levers(tiny_model, chosen, count=6, context=8, repeats=2, seed=0)
    assert (exact["error"], exact["% same"], exact["±"]) == (0, 100, 0)
    assert few["error"] > 0.01
    assert [row["passes"] for row in (exact, few, half)] == [512, 4, 2 + 2 + 1 + 1]
    assert half["time, s"].least > 0


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


SMALL = ["speed", "--layers", "1", "--width", "64", "--block-size", "4", "--steps", "2", "-n", "10"]


@pytest.mark.usefixtures("quick")
def test_a_record_has_all_that_was_measured_and_becomes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "speed.json"
    options = ["--batch", "1,2", "--context", "6", "--repeats", "2", "--mixed", "3", "--json", str(file)]
    assert command(*SMALL, *options) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out
    assert {"engine", "readable", "ar"} <= {line.split()[0] for line in out.splitlines() if line.strip()}
    assert "batch 2, context 6, 2 steps" in out
    assert "3 mixed requests, 2 at once" in out
    record = json.loads(file.read_text())
    assert [row["peer"] for row in record["rows"]] == 2 * ["limit", "engine", "readable", "ar"]
    for cell, best in zip(record["cells"], record["rows"][::4], strict=True):
        model = size_configs("tiny", 4, 1, 64)
        least = limit(generation_cost(*model, Job(**cell["job"]), 4), RATES)
        assert best["tokens/s"] == pytest.approx(cell["job"]["batch"] * 10 / least)
        assert all(len(turns) == 2 for turns in cell["turns"].values())
    for row in record["rows"]:
        if row["peer"] != "limit":
            assert 0 < row["tokens/s"]["least"] <= row["tokens/s"]["median"] <= row["tokens/s"]["most"]
    assert [one["slots"] for one in record["mixed"]] == [1, 2]
    assert (record["settings"]["dtype"], record["settings"]["seed"]) == ("float32", 0)
    assert record["rates"]["matmul"] == 1e9
    assert {"torch", "colada", "device"} <= set(record["made_with"])
    table.main([file])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[4].strip() for line in lines if line.startswith("| 1")] == [
        "limit",
        "engine",
        "readable",
        "ar",
    ]
    assert " GB " not in lines[2]  # Nothing was measured of it.
    table.main([file, file], tmp_path / "speed.html")
    drawn = (tmp_path / "speed.html").read_text()
    assert all(name in drawn for name in ("engine", "readable", "limit", "batch 2, context 6", "rates1"))


def test_numbers_have_three_digits_and_spreads_their_range() -> None:
    numbers = (1234.5, 12.34, 1.234, 0.1234, 0.0000012, 0.0)
    assert list(map(measure.number, numbers)) == ["1,234", "12.3", "1.23", "0.123", "1.2e-06", "0"]
    assert measure.cell(Spread(2, 1, 3), "{0}/{1}") == "2.00/1.00–3.00"
    rows = [{"a": "x", "b": None, "c": {"median": 2, "least": 1, "most": 3}}]
    assert measure.table(rows).markdown().splitlines()[::2] == ["| a | c |", "| x | 2.00 (1.00–3.00) |"]


@pytest.mark.usefixtures("quick")
def test_a_saved_model_without_peers(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "model")
    options = ["--batch", "1", "--context", "8", "--steps", "2", "-n", "4", "--repeats", "1"]
    file = str(tmp_path / "speed.json")
    assert (
        command("speed", "--model", str(tmp_path / "model"), "--peers", "none", *options, "--json", file) == 0
    )
    (_, engine) = json.loads(Path(file).read_text())["rows"]
    assert (engine["peer"], engine["block, ms"]) == ("engine", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "arr"], "'arr', expected some of readable, ar, .*mean 'ar'"),
        (["--peers", "ar,ar"], "'ar' is there twice"),
        (["--peers", ""], "--peers : ''"),
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
        (["--json", "nowhere/speed.json"], "there is no directory nowhere"),
    ],
)
def test_bad_options(arguments: list[str], said: str) -> None:
    with pytest.raises(ColadaError, match=said) as caught:
        command("speed", *arguments)
    assert "\n" not in str(caught.value)


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.LIBRARIES, "ctranslate2", "no_such_module")
    with pytest.raises(ColadaError, match="ctranslate2 is not installed: pip install -r benchmarks/"):
        command("speed", "--size", "tiny", "--peers", "ctranslate2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ColadaError, match="device='cuda' cannot be used"):
        command(*SMALL, "--device", "cuda")


@pytest.mark.parametrize("option", ["--repeats", "--new-tokens", "--mixed"])
def test_nothing_to_measure(option: str) -> None:
    with pytest.raises(typer.BadParameter.__bases__[0]):
        command("speed", option, "0")


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_a_record_over_what_is_no_file_is_refused_before_anything_is_measured(
    tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "speed.json"
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(ColadaError, match="no regular file"):
        command("speed", "--size", "tiny", "--json", str(place))


def test_a_file_without_rows_is_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(typer.Exit):
        table.main([tmp_path / "other.json"])
    assert "no rows, expected a file that a benchmark wrote" in capsys.readouterr().err
