"""The ledger against counts made another way, and baselines against what they are matched to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from colada.data.rows import Batch
from colada.errors import ColadaError
from colada.networks.decoder import Decoder
from colada.networks.decoder_config import DecoderConfig
from colada.train.decoder_losses import MaskDraws, decoder_loss, draw_masks
from colada.train.decoder_plan import decoder_flops, decoder_memory
from colada.train.dry_run import decoder_config_of, plan_run, resolve
from colada.train.ledger import ledger
from colada.train.plan import Placement
from colada.train.recipe import Recipe, load_recipe

ARCHS = ("ar", "llada")
DEBUG = Path(__file__).parent.parent / "recipes" / "debug.yaml"


def recipe(*overrides: str) -> Recipe:
    return load_recipe(DEBUG, overrides)


@pytest.mark.parametrize("objective", ARCHS)
def test_useful_flops_of_a_decoder_are_those_that_run(objective: str) -> None:
    rows, length = 3, 16
    config = DecoderConfig(
        objective=objective, vocab_size=40, dim=32, num_layers=2, num_heads=4, ffn_dim=48, init_std=0.1
    )
    decoder = Decoder(config)
    decoder.init_weights(torch.Generator().manual_seed(0))
    batch = Batch(torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(0)))
    draws = MaskDraws()
    if objective == "llada":
        drawn = draw_masks([torch.Generator().manual_seed(i) for i in range(rows)], length, 0.0)
        draws = MaskDraws(torch.full((rows,), 0.5), drawn.order, drawn.length)  # just half of the tokens
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder_loss(decoder, batch, draws).total.backward()
    parts = decoder_flops(config, rows, length)
    # Causal attention runs dense: all pairs where half are useful.
    pairs = length**2 - (length * (length + 1) // 2 if objective == "ar" else length**2)
    invisible = 3 * rows * 4 * config.num_layers * config.dim * pairs
    assert counter.get_total_flops() == pytest.approx(sum(parts.values()) + invisible, rel=1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_baseline_has_the_parameters_and_the_flops_of_cola(arch: str) -> None:
    cola, other = ledger(recipe()), ledger(recipe(f"model.arch={arch}"))
    assert other.total_parameters == pytest.approx(cola.total_parameters, rel=0.03)
    assert other.total_flops == pytest.approx(cola.total_flops, rel=0.01)
    assert cola.total_flops == plan_run(recipe(), 1).flops
    assert {name.partition(":")[0] for name in cola.flops} == {"stage 1", "stage 2, frozen Text VAE"}
    config = decoder_config_of(resolve(recipe(f"model.arch={arch}")))
    network = sum(
        parameter.numel() for name, parameter in Decoder(config).named_parameters() if "wte" not in name
    )
    assert other.narrow_flops == 6 * network * other.tokens
    assert other.to_dict()["flops"]["total"] == other.total_flops


def test_joint_training_counts_its_reference_encoder() -> None:
    parts = ledger(recipe("stage2.vae=joint")).flops
    assert parts["stage 2, joint: reference encoder"] > 0
    assert parts["stage 2, joint: decoder"] > 0


def test_what_a_recipe_names_stays_as_it_is() -> None:
    given = "model.decoder={dim: 64, num_layers: 1, num_heads: 2, ffn_dim: 64}"
    own = resolve(recipe("model.arch=ar", given, "baseline.steps=7"))
    assert own.baseline.steps == 7
    assert own.model.decoder == {"dim": 64, "num_layers": 1, "num_heads": 2, "ffn_dim": 64}
    assert resolve(own) == own
    rates = [resolve(recipe(f"model.arch={arch}", "baseline.llada_lr=5e-4")).baseline.lr for arch in ARCHS]
    assert rates == [recipe().stage2.lr, 5e-4]


def test_what_is_left_out_follows_from_cola() -> None:
    own = resolve(recipe("model.arch=llada", "model.decoder.block_size=8", "baseline.batch=3"))
    cola = ledger(recipe())
    assert own.model.decoder["block_size"] == 8
    assert decoder_config_of(own).parameters == pytest.approx(cola.total_parameters, rel=0.03)
    assert (own.baseline.batch, own.baseline.length) == (3, own.stage2.length)
    assert own.baseline.ema == own.stage2.ema
    # A recipe for a cluster, planned on one machine.
    assert plan_run(recipe("run.replicas=2"), 1).flops == cola.total_flops
    with pytest.raises(ColadaError, match=r"baseline.steps=0 with no steps of stage1 and stage2"):
        resolve(recipe("model.arch=ar", "stage1.steps=0", "stage2.steps=0"))


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
