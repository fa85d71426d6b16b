import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.networks import layers
from colada.networks.config import DecoderConfig, DiTConfig, TextVAEConfig
from colada.networks.decoder import Decoder
from colada.networks.dit import DiT
from colada.networks.packing import block_causal, two_copy
from colada.networks.vae import TextVAE
from colada.train.cost import (
    Placement,
    Work,
    block_causal_pairs,
    cola_phase,
    decoder_flops,
    decoder_memory,
    memory_per_rank,
    parameter_counts,
    scaled,
    training_flops,
    two_copy_pairs,
)
from colada.train.decoder_losses import MaskNoise, decoder_loss, draw_masks
from colada.train.peak import mfu, peak_flops
from colada.train.plan import Plan, configs_of, plan_run, resolve
from colada.train.recipe import Recipe, load_recipe
from helpers import tiny_dit, tiny_dit_config, tiny_vae, tiny_vae_config
from runs import DEBUG

ROWS = 3


def recipe(*overrides: str) -> Recipe:
    return load_recipe(DEBUG, overrides)


def counted(compute: Callable[[], Tensor], backward: bool = False) -> int:
    """FLOPs of the matrix products that run, attention's as dense batched products among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = compute()
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


def ids(config: TextVAEConfig, length: int) -> Tensor:
    return torch.randint(config.vocab_size, (ROWS * length,), generator=torch.Generator().manual_seed(0))


def encode(vae: TextVAE, length: int) -> Tensor:
    posterior = vae.encode(ids(vae.config, length), [length] * ROWS)
    assert posterior.logvar is not None
    return posterior.mean + posterior.logvar


def decode(vae: TextVAE, latents: int, learn: bool = False) -> Tensor:
    z0 = torch.randn(ROWS * latents, vae.config.latent_dim, requires_grad=learn)
    return vae.decode(z0, [latents] * ROWS)


def dense(layers: int, width: int, cells: int) -> int:
    """FLOPs of attention that computes all pairs of each row."""
    return 4 * ROWS * layers * width * cells**2


def visible(layers: int, width: int, mask: Tensor) -> int:
    return 4 * ROWS * layers * width * int(mask.sum())


def run_dit(dit: DiT, latents: int, copies: int, per_block: bool = True, learn: bool = False) -> Tensor:
    """The pass of a training step: t = 0 in the clean copy, a timestep of its own in each noisy block."""
    block = dit.config.block_size
    clean = torch.zeros(ROWS, latents - block)
    drawn = 1 + torch.randperm(ROWS * copies * (latents // block)).view(ROWS, copies, -1).float()
    times = (drawn if per_block else drawn[..., :1].expand_as(drawn)).repeat_interleave(block, 2)
    timestep = torch.cat([clean, times.flatten(1)], 1).flatten()
    z_t = torch.randn(len(timestep), dit.config.txt_in_channels, requires_grad=learn)
    return dit(z_t, timestep, dit.two_copy_layout(ROWS, latents, copies))


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_pairs_against_a_loop_over_cells(blocks: int, copies: int) -> None:
    size = 4
    length = blocks * size
    # Cells (copy, block), copy 0 clean and without its last block, as the paper describes them.
    cells = [(0, i // size) for i in range(length - size)]
    cells += [(1 + copy, i // size) for copy in range(copies) for i in range(length)]
    pairs = 0
    for copy, block in cells:
        for key_copy, key_block in cells:
            if copy == 0:
                pairs += key_copy == 0 and key_block <= block
            else:
                pairs += (key_copy == 0 and key_block < block) or (key_copy == copy and key_block == block)
    assert two_copy_pairs(blocks, size, copies) == pairs == int(two_copy(length, size, copies).sum())
    assert block_causal_pairs(blocks, size) == int(block_causal(length, length, size).sum())


@pytest.mark.parametrize(
    ("over", "blocks"),
    [
        ({}, 1),
        ({}, 6),
        ({"patch_size": 2}, 3),
        ({"act": "gelu", "use_variation": True}, 2),
        ({"encoder_num_blocks": 1, "decoder_num_blocks": 3}, 2),
    ],
)
def test_text_vae_flops_against_counted_products(over: dict[str, Any], blocks: int) -> None:
    vae = tiny_vae(**over)
    config = vae.config
    latents = blocks * config.block_size
    length = latents * config.patch_size
    parts = training_flops(config, tiny_dit_config(), Work("vae", ROWS, length, masked=False))
    mask = block_causal(latents, latents, config.block_size)

    def useful(products: int, layers: int) -> int:
        return products - dense(layers, config.dim, latents) + visible(layers, config.dim, mask)

    forward = useful(counted(lambda: encode(vae, length)), config.encoder_num_blocks)
    assert parts["encoder"] == 3 * forward
    assert training_flops(config, tiny_dit_config(), Work("dit", ROWS, length))["encoder"] == forward
    forward = useful(counted(lambda: decode(vae, latents)), config.decoder_num_blocks)
    assert parts["decoder"] + parts["head"] == 3 * forward
    hidden = torch.zeros(ROWS * length, config.dim)
    assert parts["head"] == 3 * counted(lambda: vae.decoder.logits(hidden))


@pytest.mark.parametrize(
    ("over", "blocks", "copies", "per_block"),
    [
        ({}, 1, 1, True),
        ({}, 5, 1, True),
        ({}, 4, 3, True),
        ({}, 4, 2, False),
        ({"patch_size": 2, "expand_ratio": 3}, 4, 1, True),
        ({"heads": 2, "num_layers": 3}, 2, 1, True),  # heads * head_dim is not the width
    ],
)
def test_dit_flops_against_counted_products(
    over: dict[str, Any], blocks: int, copies: int, per_block: bool
) -> None:
    dit = tiny_dit(**over)
    config = dit.config
    latents = blocks * config.block_size
    work = Work("dit", ROWS, latents, copies=copies, per_block=per_block)
    parts = training_flops(tiny_vae_config(), config, work)
    mask = two_copy(latents // config.patch_size, config.block_size // config.patch_size, copies)
    width = config.heads * config.head_dim
    products = counted(lambda: run_dit(dit, latents, copies, per_block))
    attention = dense(config.num_layers, width, len(mask))
    forward = products - attention + visible(config.num_layers, width, mask)
    assert parts["DiT"] + parts["AdaLN"] == 3 * forward
    # The timestep path by itself: what is left if positions stay and their timesteps become one.
    distinct = ROWS * copies * (blocks if per_block else 1) + (blocks > 1)
    layout = dit.two_copy_layout(ROWS, latents, copies)
    one = counted(lambda: dit(torch.zeros(len(layout) * config.patch_size, 8), torch.zeros(()), layout))
    assert parts["AdaLN"] == 3 * (products - one) * distinct // (distinct - 1)


def test_a_backward_pass_is_two_forward_passes() -> None:
    # In one block all pairs are visible, so dense attention is the useful one. Every matrix's input has a
    # gradient here but the timestep features, which saves the MLP's first matrix one of its three products.
    dit, vae = tiny_dit(), tiny_vae()
    latents = 4
    parts = training_flops(vae.config, dit.config, Work("both", ROWS, latents))
    saved = 2 * ROWS * dit.emb_in.proj_in.weight.numel()
    total = counted(lambda: run_dit(dit, latents, 1, learn=True), backward=True)
    assert total == parts["DiT"] + parts["AdaLN"] - saved
    assert counted(lambda: encode(vae, latents), backward=True) == parts["encoder"]
    assert counted(lambda: decode(vae, latents, True), backward=True) == parts["decoder"] + parts["head"]


def test_which_parts_a_step_has() -> None:
    vae, dit = tiny_vae_config(), tiny_dit_config()
    one = training_flops(vae, dit, Work("vae", 8, 16))
    assert set(one) == {"encoder", "decoder", "head", "masked stream"}
    assert one["masked stream"] == one["encoder"] + one["decoder"] + one["head"]
    frozen = training_flops(vae, dit, Work("dit", 8, 16, prefixes=0.25))
    assert set(frozen) == {"encoder", "prefixes", "DiT", "AdaLN"}
    assert frozen["prefixes"] == frozen["encoder"] / 4
    joint = training_flops(vae, dit, Work("both", 8, 16))
    assert set(joint) == {*one, "reference encoder", "DiT", "AdaLN"}
    assert {name: joint[name] for name in one} == one
    assert joint["reference encoder"] == frozen["encoder"] == one["encoder"] / 3
    assert joint["DiT"] == frozen["DiT"]
    alone = training_flops(vae, dit, Work("decoder", 8, 16, masked=False))
    assert alone == {**{name: one[name] for name in ("decoder", "head")}, "encoder": frozen["encoder"]}
    further = training_flops(vae, dit, Work("dit", 8, 16, consistency=True))
    assert further["consistency"] == (further["DiT"] + further["AdaLN"]) / 3


def test_a_row_is_whole_blocks() -> None:
    with pytest.raises(ColadaError, match=r"work: length=18, expected a multiple of .* = 4"):
        training_flops(tiny_vae_config(), tiny_dit_config(), Work("vae", 8, 18))


def test_parameters_of_the_released_model() -> None:
    counts = parameter_counts(TextVAEConfig(), DiTConfig())
    assert counts == {"Text VAE": 501_871_574, "DiT": 1_829_875_728}


# --- memory ------------------------------------------------------------------------------------


def state_bytes(optimiser: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's buffers, without its step counters."""
    buffers = [x for state in optimiser.state.values() for name, x in state.items() if name != "step"]
    return sum(buffer.nbytes for buffer in buffers)


@pytest.mark.parametrize("muon", [False, True])
def test_weights_gradients_and_optimiser_against_real_ones(muon: bool) -> None:
    vae, dit = tiny_vae(), tiny_dit()
    networks = nn.ModuleDict({"vae": vae, "dit": dit})
    in_blocks = [*vae.encoder.blocks, *vae.decoder.blocks, *dit.blocks]
    modules = [m for block in in_blocks for name, m in block.named_modules() if not name.startswith("ada")]
    matrices = [m.weight for m in modules if isinstance(m, nn.Linear)] if muon else []
    rest = [p for p in networks.parameters() if all(p is not matrix for matrix in matrices)]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest)]
    if muon:
        optimisers.append(torch.optim.Muon(matrices))
    (encode(vae, 8).sum() + decode(vae, 8).sum() + run_dit(dit, 8, 1).sum()).backward()
    for optimiser in optimisers:
        optimiser.step()
    work, placement = Work("both", ROWS, 8), Placement(ROWS, muon=muon, ema=True)
    parts = memory_per_rank(vae.config, dit.config, work, placement)
    weights = sum(p.nbytes for p in networks.parameters())
    assert parts["weights"] == parts["average"] == weights
    assert parts["gradients"] == sum(p.grad.nbytes for p in networks.parameters() if p.grad is not None)
    assert parts["optimiser"] == sum(map(state_bytes, optimisers))
    assert parts["frozen networks"] == sum(p.nbytes for p in vae.parameters())
    sharded = memory_per_rank(vae.config, dit.config, work, Placement(ROWS, 8, muon=muon, ema=True))
    for name in ("weights", "gradients", "optimiser", "average", "frozen networks"):
        assert sharded[name] == parts[name] / 8
    for name in ("activations", "logits"):
        assert sharded[name] == parts[name]


def test_what_a_frozen_text_vae_and_the_first_stage_need() -> None:
    vae, dit = tiny_vae(), tiny_dit()
    text, prior = (sum(p.nbytes for p in network.parameters()) for network in (vae, dit))
    frozen = memory_per_rank(vae.config, dit.config, Work("dit", ROWS, 8), Placement(ROWS))
    assert (frozen["weights"], frozen["frozen networks"]) == (prior, text)
    assert "logits" not in frozen
    first = memory_per_rank(vae.config, dit.config, Work("vae", ROWS, 8), Placement(ROWS, bfloat16=False))
    assert first["weights"] == text
    assert "frozen networks" not in first  # The DiT comes later.
    assert not {"working copy", "average"} & set(first)


def test_the_gathered_part_of_sharded_networks() -> None:
    dit = tiny_dit()
    blocks = sum(p.numel() for p in dit.blocks.parameters())
    one = sum(p.numel() for p in dit.blocks[0].parameters())
    outside = sum(p.numel() for p in dit.parameters()) - blocks
    for bfloat16, size in ((True, 2), (False, 4)):
        placement = Placement(ROWS, 4, bfloat16=bfloat16)
        parts = memory_per_rank(tiny_vae_config(), dit.config, Work("dit", ROWS, 8), placement)
        assert parts["working copy"] == size * (one + outside)


def kept_bytes(network: nn.Module, compute: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, other than parameters."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = compute()
    total = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert out.requires_grad
    return total


def activations(work: Work, vae: TextVAEConfig, dit: DiTConfig) -> float:
    return memory_per_rank(vae, dit, work, Placement(ROWS, bfloat16=False))["activations"]


@pytest.mark.parametrize("over", [{}, {"expand_ratio": 4}, {"heads": 2}, {"num_layers": 6}])
def test_activations_of_the_dit_against_what_autograd_keeps(over: dict[str, int]) -> None:
    dit = tiny_dit(**over)
    estimate = activations(Work("dit", ROWS, 32), tiny_vae_config(), dit.config)
    assert estimate == pytest.approx(kept_bytes(dit, lambda: run_dit(dit, 32, 1)), rel=0.25)


@pytest.mark.parametrize("over", [{}, {"ffn_dim": 192}, {"act": "silu"}, {"post_norm": False}])
def test_activations_of_the_text_vae_against_what_autograd_keeps(over: dict[str, Any]) -> None:
    vae = tiny_vae(**{"encoder_num_blocks": 3, "decoder_num_blocks": 3, "vocab_size": 300, **over})
    z0 = torch.randn(ROWS * 32, vae.config.latent_dim)

    def halves() -> Tensor:
        hidden = vae.decoder(z0, vae.layout([32] * ROWS))
        return encode(vae, 32).sum() + hidden.sum()

    work = Work("vae", ROWS, 32, masked=False)
    estimate = activations(work, vae.config, tiny_dit_config())
    assert estimate == pytest.approx(kept_bytes(vae, halves), rel=0.25)
    masked = activations(Work("vae", ROWS, 32), vae.config, tiny_dit_config())
    assert masked == 2 * estimate


@pytest.mark.parametrize("network", ["vae", "dit"])
def test_activations_in_bfloat16_against_what_autograd_keeps(
    monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    # On a GPU autocast computes norms in float32, and no scores are kept; the CPU has to be made to.
    norm = F.layer_norm
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(layers, "_scores_attention", lambda *qkv_mask: attention(*qkv_mask))
    monkeypatch.setattr(F, "layer_norm", lambda x, *args, **kwargs: norm(x.float(), *args, **kwargs))
    vae, dit = tiny_vae(), tiny_dit(num_layers=4)

    def compute(length: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            if network == "dit":
                return run_dit(dit, length, 1)
            z0 = torch.randn(ROWS * length, vae.config.latent_dim)
            return encode(vae, length).sum() + vae.decoder(z0, vae.layout([length] * ROWS)).sum()

    def estimate(length: int) -> float:
        work = Work("vae", ROWS, length, masked=False) if network == "vae" else Work("dit", ROWS, length)
        return memory_per_rank(vae.config, dit.config, work, Placement(ROWS))["activations"]

    # The difference of two lengths is without the copies of the weights.
    trained = vae if network == "vae" else dit
    long, short = (kept_bytes(trained, partial(compute, length)) for length in (64, 32))
    assert estimate(64) - estimate(32) == pytest.approx(long - short, rel=0.25)


def test_logits_in_float32_are_kept_once_and_have_a_gradient_as_large() -> None:
    config = tiny_vae_config(vocab_size=3000)
    logits = torch.randn(ROWS * 8, config.vocab_size, requires_grad=True)
    kept = kept_bytes(nn.Module(), lambda: F.cross_entropy(logits, torch.zeros(ROWS * 8).long()))
    parts = memory_per_rank(
        config, tiny_dit_config(), Work("vae", ROWS, 8, masked=False), Placement(ROWS, bfloat16=False)
    )
    assert parts["logits"] == pytest.approx(kept + logits.nbytes, rel=0.01)


def test_checkpointing_keeps_less_and_only_of_the_dit() -> None:
    vae, dit = tiny_vae_config(), tiny_dit_config(num_layers=12)
    for work in (Work("vae", ROWS, 32), Work("dit", ROWS, 32)):
        plain, less = (
            memory_per_rank(vae, dit, work, Placement(ROWS, checkpointing=c)) for c in (False, True)
        )
        changed = {name for name in plain if plain[name] != less[name]}
        assert changed == (set() if not work.dit_learns else {"activations"})
        assert less["activations"] <= plain["activations"]


def test_checkpointing_against_what_autograd_keeps() -> None:
    dit = tiny_dit(num_layers=12)
    config = dit.config
    placement = Placement(ROWS, bfloat16=False, checkpointing=True)
    estimate = memory_per_rank(tiny_vae_config(), config, Work("dit", ROWS, 32), placement)["activations"]
    one, two = (
        activations(Work("dit", ROWS, 32), tiny_vae_config(), tiny_dit_config(num_layers=layers))
        for layers in (1, 2)
    )
    whole = kept_bytes(dit, lambda: run_dit(dit, 32, 1))
    for block in dit.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    inputs = kept_bytes(dit, lambda: run_dit(dit, 32, 1))
    assert inputs < whole / 4
    assert estimate - (two - one) == pytest.approx(inputs, rel=0.25)


# --- device and plan ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.float16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA GB200", torch.bfloat16, 2500e12),
        ("NVIDIA B200", torch.bfloat16, 2250e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165e12),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        # Without a number of their own: other cards, slices, types.
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("NVIDIA A1000", torch.bfloat16, None),
    ],
)
def test_peaks_of_known_devices(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr("colada.train.peak._measured_rate", lambda device, dtype: 1.0)
    found = peak_flops.__wrapped__(torch.device("cuda"), dtype)
    assert found == ((1.0, "measured") if peak is None else (peak, "data sheet"))


def test_the_peak_of_a_cpu_is_measured_once() -> None:
    peak_flops.cache_clear()
    begin = time.perf_counter()
    peak, origin = peak_flops(torch.device("cpu"), torch.float32)
    assert time.perf_counter() - begin < 2  # Half a second, on a machine that does nothing else.
    assert origin == "measured"
    assert peak_flops(torch.device("cpu"), torch.float32) == (peak, origin)
    # No product of this size beats it by much: it is a peak.
    a = torch.ones(512, 512)
    begin = time.perf_counter()
    for _ in range(5):
        a @ a
    assert 1e8 < 5 * 2 * 512**3 / (time.perf_counter() - begin) < 3 * peak


def test_mfu() -> None:
    assert mfu(flops=6e15, seconds=2.0, peak=1e15, ranks=4) == 0.75


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (1_829_875_728, "", "1.83 B"),
        (501_871_574, "", "502 M"),
        (4.2e15, "FLOP", "4.20 PFLOP"),
        (12.34 * 2**30, "B", "12.3 GiB"),
        (1023, "B", "1023 B"),
        (5e18, "", "5000000 T"),
    ],
)
def test_readable_numbers(value: float, unit: Any, text: str) -> None:
    assert scaled(value, unit) == text


def test_a_plan_adds_up_and_prints_what_it_holds() -> None:
    vae, dit = tiny_vae_config(), tiny_dit_config()
    one, two = Work("vae", 8, 16), Work("dit", 4, 32, copies=2)
    phases = (
        cola_phase("vae", 10, vae, dit, one, Placement(8)),
        cola_phase("prior", 5, vae, dit, two, Placement(2, 2)),
    )
    whole, four = (Plan.of("cola", parameter_counts(vae, dit), phases, ranks) for ranks in (1, 4))
    cards = [plan.lines()[-1] for plan in (whole, four)]
    assert [title for title, _ in cards] == [
        f"{own} at 40% MFU" for own in ("one 80 GB H100", "4 80 GB H100s")
    ]
    hours = [float(said.removeprefix("fits, ").removesuffix(" h")) for _, said in cards]
    assert hours[0] == pytest.approx(4 * hours[1], rel=0.05)  # Two digits are shown.
    values = whole.to_dict()
    assert values["tokens"] == 10 * 8 * 16 + 5 * 4 * 32
    flops = [sum(training_flops(vae, dit, work).values()) for work in (one, two)]
    assert values["flops"] == 10 * flops[0] + 5 * flops[1]
    assert values["parameters"]["total"] == sum(parameter_counts(vae, dit).values())
    for phase in values["phases"]:
        for name in ("flops_per_step", "memory_per_rank"):
            parts = dict(phase[name])
            assert parts.pop("total") == sum(parts.values())
    lines = whole.lines()
    assert ("  FLOPs per step", scaled(flops[0], "FLOP")) in lines
    assert ("  FLOPs per step", scaled(flops[1], "FLOP")) in lines
    assert ("prior", "5 steps") in lines
    assert lines[-3:-1] == [("tokens", "1.92 K"), ("FLOPs", scaled(values["flops"], "FLOP"))]
    names = [name.strip() for name, _ in lines]
    assert {"DiT", "AdaLN", "optimiser", "activations", "logits"} <= set(names)


# --- baselines, and what they are matched to -----------------------------------------------------

ARCHS = ("ar", "llada")


@pytest.mark.parametrize("objective", ARCHS)
def test_useful_flops_of_a_decoder_are_those_that_run(objective: str) -> None:
    rows, length = 3, 16
    config = DecoderConfig(
        objective=objective, vocab_size=40, dim=32, num_layers=2, num_heads=4, ffn_dim=48, init_std=0.1
    )
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(0))
    batch = Batch(torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(0)))
    noise = MaskNoise()
    if objective == "llada":
        drawn = draw_masks([torch.Generator().manual_seed(i) for i in range(rows)], length, 0.0)
        noise = MaskNoise(torch.full((rows,), 0.5), drawn.order, drawn.length)  # just half of the tokens
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder_loss(decoder, batch, noise).total.backward()
    parts = decoder_flops(config, rows, length)
    # Causal attention runs dense: all pairs where half are useful.
    pairs = length**2 - (length * (length + 1) // 2 if objective == "ar" else length**2)
    invisible = 3 * rows * 4 * config.num_layers * config.dim * pairs
    assert counter.get_total_flops() == pytest.approx(sum(parts.values()) + invisible, rel=1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_baseline_has_the_parameters_and_the_flops_of_cola(arch: str) -> None:
    cola, other = plan_run(recipe()).cost, plan_run(recipe(f"model.arch={arch}")).cost
    assert other.total_parameters == pytest.approx(cola.total_parameters, rel=0.03)
    assert other.total_flops == pytest.approx(cola.total_flops, rel=0.01)
    assert {name.partition(":")[0] for name in cola.flops} == {"vae", "prior"}
    config = configs_of(resolve(recipe(f"model.arch={arch}")))["decoder"]
    assert isinstance(config, DecoderConfig)
    network = sum(
        parameter.numel() for name, parameter in Decoder(config).named_parameters() if "wte" not in name
    )
    assert other.narrow_flops == 6 * network * other.tokens
    assert other.to_dict()["flops"]["total"] == other.total_flops


def test_joint_training_counts_its_reference_encoder() -> None:
    parts = plan_run(recipe("stages.prior.kind=joint")).cost.flops
    assert parts["prior: reference encoder"] > 0
    assert parts["prior: decoder"] > 0


def test_what_a_recipe_names_stays_as_it_is() -> None:
    given = "model.decoder={dim: 64, num_layers: 1, num_heads: 2, ffn_dim: 64}"
    own = resolve(recipe("model.arch=ar", given, "stages.decoder.steps=7"))
    assert own.stages["decoder"].steps == 7
    assert own.model.decoder == {"dim": 64, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}
    assert resolve(own) == own
    rates = [
        resolve(recipe(f"model.arch={arch}", "stages.decoder.llada_lr=5e-4")).stages["decoder"].lr
        for arch in ARCHS
    ]
    assert rates == [recipe().stages["prior"].lr, 5e-4]


def test_what_is_left_out_follows_from_cola() -> None:
    own = resolve(recipe("model.arch=llada", "model.decoder.block_size=8", "stages.decoder.batch=3"))
    cola = plan_run(recipe()).cost
    assert own.model.decoder["block_size"] == 8
    config = configs_of(own)["decoder"]
    assert isinstance(config, DecoderConfig)
    assert config.parameters == pytest.approx(cola.total_parameters, rel=0.03)
    assert (own.stages["decoder"].batch, own.stages["decoder"].length) == (3, own.stages["prior"].length)
    assert own.stages["decoder"].ema == own.stages["prior"].ema
    # A recipe for a cluster, planned on one machine.
    assert plan_run(recipe("run.replicas=2")).cost.total_flops == cola.total_flops
    with pytest.raises(ColadaError, match=r"stages.decoder.steps=0 with no steps of Cola DLM's stages"):
        resolve(recipe("model.arch=ar", "stages.vae.steps=0", "stages.prior.steps=0"))


def test_a_named_objective_must_be_the_architectures() -> None:
    with pytest.raises(ColadaError, match=r"model.decoder.objective='llada', expected 'ar'"):
        resolve(recipe("model.arch=ar", "model.decoder={objective: llada}"))


def test_activations_of_a_decoder_against_what_autograd_keeps() -> None:
    config = DecoderConfig(vocab_size=40, dim=64, num_layers=6, num_heads=4, ffn_dim=160)
    decoder, kept = Decoder(config), dict[int, int]()
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def measured(length: int) -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(torch.zeros(2 * length, dtype=torch.long), decoder.layout([length] * 2))
        return sum(size for address, size in kept.items() if address not in own)

    estimates = [
        decoder_memory(config, length, Placement(2, bfloat16=False))["activations"] for length in (64, 32)
    ]
    found = measured(64) - measured(32)
    assert estimates[0] - estimates[1] == pytest.approx(found, rel=0.25)
