"""What a stage of pictures is told: laws of timesteps, shares, weights, lengths, prompts, positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colada.data.rows import Batch
from colada.flow import T
from colada.networks.dit import DiT
from colada.networks.packing import Layout
from colada.text.tokenizer import Tokenizer
from colada.train.export import system_of
from colada.train.pairs import open_pairs
from colada.train.pictures import PictureNoise, PicturesStage, TaskNoise
from colada.train.stages import VALIDATION_ROW, make_stage
from faults import TEXTS
from runs import recipe
from test_pictures_training import PICTURES

ROWS = range(VALIDATION_ROW, VALIDATION_ROW + 250)
LAW = ["loc=-0.4", "scale=1.3", "picture_loc=1.5", "picture_scale=0.6", "caption_dropout=0.3"]
PROMPTS = ["", "what is it?", "a fox under the bridge"]


def stage_of(*settings: str) -> PicturesStage:
    """A stage over fresh networks, with gates and outputs open."""
    made = recipe(*PICTURES, *(f"stages.pictures.{setting}" for setting in settings))
    system = system_of(made, Tokenizer.train(TEXTS, 300, fewer=True), None)
    stage = make_stage(system, "pictures", nn.ModuleDict)
    assert isinstance(stage, PicturesStage)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in stage.networks.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return stage


@pytest.fixture(scope="module")
def drawn() -> TaskNoise:
    """Noise of 500 pairs."""
    return stage_of(*LAW, f"prompts={PROMPTS}").draw(ROWS)


def distance(timesteps: Tensor, loc: float, scale: float) -> float:
    """How far an empirical distribution is from the logit-normal one: Kolmogorov's distance, √n times."""
    law = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(torch.tensor(loc).double(), scale), torch.distributions.SigmoidTransform()
    )
    quantiles = law.cdf((timesteps.double() / T).flatten().sort().values)
    ends = torch.arange(len(quantiles) + 1) / len(quantiles)
    apart = torch.maximum((quantiles - ends[:-1]).abs(), (quantiles - ends[1:]).abs())
    return float(apart.max()) * len(quantiles) ** 0.5


def of_blocks(pairs: PictureNoise, size: int) -> Tensor:
    """The timesteps of all blocks of text, without padding."""
    assert pairs.timestep is not None
    assert pairs.lengths is not None
    blocks = pairs.timestep.flatten(0, 1).unflatten(1, (-1, size))
    assert bool((blocks == blocks[..., :1]).all())  # One a block.
    there = torch.arange(blocks.shape[1]) < pairs.lengths.flatten()[:, None] // size
    return blocks[..., 0][there]


def test_timesteps_of_pictures_and_of_text_have_laws_of_their_own(drawn: TaskNoise) -> None:
    assert drawn.draw is not None
    assert drawn.describe is not None
    pictures = drawn.draw.picture_timestep
    assert pictures is not None
    captions, answers = of_blocks(drawn.draw, 4), of_blocks(drawn.describe, 4)
    assert len(pictures.flatten()) == 500
    assert min(len(captions), len(answers)) > 1000
    # Of a million samples of the law, one is further away than 2.69.
    assert distance(pictures, 1.5, 0.6) < 2.69
    assert distance(pictures, -0.4, 1.3) > 10
    for timesteps in (captions, answers):
        assert distance(timesteps, -0.4, 1.3) < 2.69
        assert distance(timesteps, 1.5, 0.6) > 10


def test_the_share_of_pictures_without_captions_is_the_dropout(drawn: TaskNoise) -> None:
    assert drawn.draw is not None
    alone = drawn.draw.alone
    assert alone is not None
    assert alone.dtype == torch.bool
    deviation = (0.3 * 0.7 / alone.numel()) ** 0.5
    assert float(alone.double().mean()) == pytest.approx(0.3, abs=4 * deviation)
    for dropout, expected in ((0, False), (1, True)):
        pairs = stage_of(f"caption_dropout={dropout}").draw(ROWS[:4]).draw
        assert pairs is not None
        assert pairs.alone is not None
        assert bool((pairs.alone == expected).all())


def test_each_prompt_is_drawn_as_often(drawn: TaskNoise) -> None:
    pairs, tokenizer = drawn.describe, Tokenizer.train(TEXTS, 300, fewer=True)
    assert pairs is not None
    assert pairs.prompts is not None
    assert pairs.prompt_lengths is not None
    whole = max(len(tokenizer.encode(prompt)) for prompt in PROMPTS)
    whole = -(-whole // 4) * 4
    assert pairs.prompts.shape == (250, 2, whole)
    seen = 0
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt) if prompt else []
        padded = torch.tensor(ids + [tokenizer.pad_id] * (whole - len(ids)))
        which = (pairs.prompts == padded).all(-1)
        assert bool((pairs.prompt_lengths[which] == -(-len(ids) // 4) * 4).all())
        share, deviation = float(which.double().mean()), (2 / 9 / 500) ** 0.5
        assert share == pytest.approx(1 / 3, abs=4 * deviation)
        seen += int(which.sum())
    assert seen == 500


@pytest.mark.parametrize("most", [5, 8])
def test_captions_and_answers_are_cut_to_their_length(most: int) -> None:
    stage = stage_of(f"caption_length={most}")
    drawn, pairs = stage.draw(ROWS[:3]), open_pairs(stage.recipe)
    assert pairs is not None
    assert pairs.validation is not None
    tokenizer = stage.system.tokenizer
    for number in range(6):
        row, place = divmod(number, 2)
        pair = pairs.validation.pair(number)
        # Of an answer, the last token is its end.
        caption = tokenizer.encode(pair.caption)[:most]
        answer = [*tokenizer.encode(pair.answer)[: most - 1], tokenizer.eos_id]
        for noise, ids in ((drawn.draw, caption), (drawn.describe, answer)):
            assert noise is not None
            assert noise.text is not None
            assert noise.lengths is not None
            assert len(ids) == most
            assert noise.text[row, place].tolist() == ids + [tokenizer.pad_id] * (8 - most)
            assert int(noise.lengths[row, place]) == 8


@pytest.mark.parametrize("space", ["velocity", "z0"])
def test_the_weight_of_captions_is_of_their_term_alone(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, rows = stage_of(f"space={space}"), Batch(torch.zeros(3, 16, dtype=torch.int64))
    noise = TaskNoise(draw=stage.draw(ROWS[:3]).draw)
    counts, totals, terms, gradients = stage.count(rows, noise), [], [], []
    for weight in (1.0, 0.25, 3.0):
        section = stage.section.model_copy(update={"caption_weight": weight})
        monkeypatch.setattr(stage, "section", section)
        stage.networks.zero_grad()
        loss = stage.loss(stage.networks, rows, noise, counts, 0)
        loss.total.backward()
        totals.append(float(loss.total.detach()))
        terms.append(loss.terms)
        gradients.append(torch.cat([one.grad.flatten() for one in stage.networks.parameters()]))  # type: ignore[union-attr]
    assert terms[0] == terms[1] == terms[2]
    captions = (totals[2] - totals[0]) / 2
    assert captions > 0.01
    assert totals[1] == pytest.approx(totals[0] - 0.75 * captions, rel=1e-5)
    if space == "velocity":
        assert captions == pytest.approx(float(terms[0]["caption_flow"]), rel=1e-4)
        assert totals[0] - captions == pytest.approx(float(terms[0]["picture_flow"]), rel=1e-4)
    of_captions = (gradients[2] - gradients[0]) / 2
    torch.testing.assert_close(gradients[1], gradients[0] - 0.75 * of_captions, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("axial", [True, False])
def test_rows_and_columns_turn_positions_unless_told_otherwise(axial: bool) -> None:
    dit = stage_of(*([] if axial else ["axial=false"])).system.networks["dit"]
    assert isinstance(dit, DiT)
    assert dit.config.img_axial == axial
    assert dit.config.to_dict().get("img_axial", False) == axial
    dit.img_pos.zero_()  # Then nothing else tells latents of a picture apart.
    latents = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    layout = Layout.one_block([torch.zeros(16, dtype=torch.int64)], 4, [0], [torch.ones(16).bool()])
    output, moved = (dit(one, torch.tensor(500.0), layout) for one in (latents, latents[order]))
    assert torch.allclose(moved, output[order], rtol=0, atol=1e-5) != axial
