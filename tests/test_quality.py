"""The cheap judges of small models: each by hand, or by the plain generation loop."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import typer
from typer.testing import CliRunner

from colada.data.rows import Batch, StreamRows
from colada.flow import T, z0_from_velocity
from colada.models.autoregressive import AutoregressiveLM
from colada.models.load import load
from colada.networks.config import DecoderConfig
from colada.networks.decoder import Decoder
from colada.train.recipe import load_recipe
from experiments import common, model_card
from experiments.ablations import VARIANTS, folder
from experiments.ablations import app as ablations
from experiments.quality import Trigrams, figures, guesses_by_noise, named_child, pronouns
from helpers import tiny_model


def test_trigrams_by_hand() -> None:
    judge = Trigrams([["a", "b", "a", "b", "c"]], strength=1.0)
    # Three words: 1/3 each before anything is counted. a: 2 of 5. b after a: 2 of 2. c after a b: 1 of 1.
    a = (2 + 1 / 3) / (5 + 1)
    b = (2 + (2 + 1 / 3) / 6) / (2 + 1)
    c = (1 + (1 + (1 + 1 / 3) / 6) / (2 + 1)) / (2 + 1)
    assert judge.nats_per_word([["a", "b", "c"]]) == pytest.approx(-math.log(a * b * c) / 3)
    assert judge.nats_per_word([["a", "b"], ["a"]]) == pytest.approx(-math.log(a * b * a) / 3)
    assert judge.nats_per_word([["zebra"]]) == pytest.approx(-math.log((1 / 3) / 6))


def test_figures_are_of_words() -> None:
    texts = [["a", "a", "b"], ["x", "a"]]
    found = figures(texts, Trigrams([["a", "b"]]), {"a", "b"})
    assert (found["words"], found["known"], found["repeated"]) == (5, 4 / 5, 1 / 3)
    assert found["distinct2"] == 1.0


def test_pronouns_by_hand() -> None:
    openings = ["There was a little girl named Sam.", "A Boy ran.", "A boy and a girl met.", "A girl sang."]
    assert [named_child(own) for own in openings] == ["girl", "boy", None, "girl"]
    texts = [["she", "and", "his", "dog"], ["she", "saw", "him"], ["she"], ["the", "end"]]
    found = pronouns(openings, texts)
    # The third names both, the last has no pronoun.
    assert found == {"texts": 2, "first": 1 / 2, "all": 2 / 4}
    assert pronouns([], []) == {"texts": 0, "first": 0.0, "all": 0.0}


@torch.inference_mode()
def test_guesses_by_noise_are_those_of_one_block_after_clean_ones() -> None:
    """The conditional guess of a block follows the clean blocks before it; the unconditional one none."""
    model = tiny_model(vae={"vocab_size": 50, "scaling_factor": 1.7, "shifting_factor": 0.2})
    taken = torch.randint(1, 50, (2, 12), generator=torch.Generator().manual_seed(3))
    rows = SimpleNamespace(length=12, row=lambda number: Batch(taken[number : number + 1]))
    count, a = 2, 0.7
    (found,) = guesses_by_noise(model, cast(StreamRows, rows), count, {"guidance": 3.0}, [a])
    q = model.vae.encode(taken.flatten(), [12] * count)
    assert q.logvar is not None
    noise, z1 = torch.randn(2, count, 12, 8, generator=torch.Generator().manual_seed(0))
    z0 = model.vae.normalise(q.mean + (q.logvar / 2).exp() * noise.view(-1, 8)).view(count, 12, 8)
    z = (1 - a) * z0 + a * z1

    def guess(row: int, start: int, history: int) -> torch.Tensor:
        packed = torch.cat([z0[row, start - history : start], z[row, start : start + 4]])
        times = torch.cat([torch.zeros(history), torch.full((4,), T * a)])
        layout = model.dit.layout([len(packed)])
        velocity = model.dit.velocity(packed, times, layout)[-4:]
        return z0_from_velocity(packed[-4:], velocity, torch.tensor(a))

    conditional = torch.stack(
        [torch.cat([guess(row, start, start) for start in (0, 4, 8)]) for row in range(count)]
    )
    rms = conditional.square().mean().sqrt().item()
    assert found["rms_conditional"] == pytest.approx(rms, rel=1e-4)
    assert found["rms_data"] == pytest.approx(z0.square().mean().sqrt().item(), rel=1e-5)
    assert found["rms_guided"] > found["rms_conditional"]
    logits = model.vae.decode(conditional.flatten(0, 1), [12] * count)
    right = (logits.argmax(-1) == taken.flatten()).float().mean().item()
    assert found["conditional"] == pytest.approx(right)


def test_the_model_card_of_the_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(common, "NEW_TOKENS", 8)
    config = DecoderConfig(vocab_size=6144, dim=16, num_layers=1, num_heads=2, ffn_dim=16, objective="ar")
    AutoregressiveLM(Decoder(config), load().tokenizer).save(tmp_path / "judge")
    judge = str(tmp_path / "judge")
    draw = random.Random(0)
    names = [("girl", "Lily", "She"), ("boy", "Tom", "He")]
    with (tmp_path / "stories.jsonl").open("w") as file:
        for number in range(400):
            child, name, pronoun = draw.choice(names)
            opening = f"Once upon a time there was a little {child} named {name} with {number} very red toys."
            text = f"{opening} {pronoun} ran to the big park with mom and the dog and played all day."
            file.write(json.dumps({"text": text}) + "\n")
    app = typer.Typer()
    app.command()(model_card.main)
    small = ["--prompts", "2", "--tokens", "8", "--rows", "1", "--samples", "1", "--set", "steps=2"]
    small += ["--judge", judge, "--beside", judge]
    result = CliRunner().invoke(app, ["--data", str(tmp_path), "--include", "*.jsonl", *small])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["settings"]["steps"] == 2
    assert record["reconstruction_accuracy"] > 0.9
    assert [row["a"] for row in record["guesses_by_noise"]] == [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert record["guesses_by_noise"][0]["noisy"] > record["guesses_by_noise"][-1]["noisy"]
    assert record["real_continuations"]["known"] > 0.9
    assert record["pronouns"]["real"]["first"] == 1.0
    assert len(record["samples"]) == 1
    lines = record["frontier"]["points"]
    beside = len(common.TEMPERATURES)
    assert [own["settings"].get("guidance") for own in lines] == [*common.GUIDANCE, *[None] * beside]
    assert [own["settings"]["temperature"] for own in lines[-beside:]] == list(common.TEMPERATURES)
    assert lines[-1]["model"] == judge
    assert all(own["perplexity"] > 1 and "records" not in own for own in (*lines, record["frontier"]["real"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_ablation_is_a_recipe(variant: str) -> None:
    recipe = Path(__file__).parents[1] / "recipes/study.yaml"
    base, changed = load_recipe(recipe), load_recipe(recipe, VARIANTS[variant])
    assert (changed == base) == (not VARIANTS[variant])
    assert folder("Width 16, with the shift of 64") == "width-16-with-the-shift-of-64"
    assert len({folder(own) for own in VARIANTS}) == len(VARIANTS)


def test_the_ablations_table_has_means_and_errors_over_seeds(tmp_path: Path) -> None:
    rows = [
        {"variant": "base", "seed": seed, "guidance": 3.0, "known": known, "distinct2": 0.5, "trigram": 6.0}
        for seed, known in enumerate((0.97, 0.99))
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(ablations, ["table", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| base | 3.0 | 2 | 98.0 ± 1.0 | 0.500 ± 0.000 | 6.000 ± 0.000 |" in result.stdout
