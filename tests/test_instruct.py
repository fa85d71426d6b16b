"""Instruction tuning: what of a row is learnt, what share of rows is text of before, and tasks as data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import make_stories
from colada.data.rows import batch
from colada.data.sources import Source
from colada.errors import ColadaError
from colada.text.chat import DEFAULT_TEMPLATE
from colada.text.tokenizer import IM_END, Tokenizer
from colada.train.export import system_of
from colada.train.inputs import Inputs, prepare_inputs
from colada.train.kinds import InstructSection
from colada.train.recipe import Recipe, source_weights
from colada.train.stages import make_stage
from colada.train.trainer import Interrupted, Trainer
from runs import STORIES, At, assert_same_run, recipe

LENGTH = 64
TASKS = f"{{path: {STORIES}, format: tasks, tasks: [sums, greeting, questions], samples: 40}}"
INSTRUCT = [
    f"data.sources=[{TASKS}, {{path: {STORIES}}}]",
    "data.packing=samples",
    "stages.vae.steps=2",
    "stages.vae.length=64",
    "stages.prior.kind=instruct",
    f"stages.prior.length={LENGTH}",
    "stages.prior.steps=4",
    "stages.prior.copies=2",
    "run.sample_every=0",
    "run.validate_every=0",
]


@pytest.fixture(scope="module")
def made() -> Recipe:
    return recipe(*INSTRUCT)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([make_stories.STORIES.read_text()], 300)


@pytest.fixture(scope="module")
def inputs(made: Recipe, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    cache = tmp_path_factory.mktemp("shards")
    return prepare_inputs(made, tokenizer, DEFAULT_TEMPLATE, cache, lambda line: None)


def test_the_loss_begins_after_the_role_header_and_ends_with_the_block_of_the_end_token(
    made: Recipe, inputs: Inputs, tokenizer: Tokenizer
) -> None:
    header, end = tokenizer.encode("<|im_start|>assistant\n"), tokenizer.id_of(IM_END)
    section = made.stages["prior"]
    answers = 0
    for number in range(40):
        row = inputs.rows("train", section, 0, 4).row(number)
        assert row.trained is not None
        assert row.sample is not None
        ids, trained, sample = row.ids[0].tolist(), row.trained[0].tolist(), row.sample[0].tolist()
        for own in sorted(set(sample) - {-1}):
            at = [n for n, of in enumerate(sample) if of == own]
            learnt = [n for n in at if trained[n]]
            if learnt == at:
                continue  # Text of before.
            answers += 1
            first = learnt[0]
            assert ids[first - len(header) : first] == header
            assert learnt == list(range(first, at[-1] + 1))
            assert (at[-1] + 1) % 4 == 0
            closing = ids[first:].index(end) + first if end in ids[first : at[-1] + 1] else at[-1]
            assert closing // 4 == at[-1] // 4  # Padding to the end of the block is learnt too, and no more.
    assert answers > 20


def test_a_share_of_the_rows_is_text_of_before(made: Recipe, inputs: Inputs) -> None:
    sources = made.data.sources
    assert source_weights(made.stages["prior"], sources) == pytest.approx([0.75, 0.25])
    assert source_weights(
        InstructSection(replay=0.1), [*sources, Source(path="x", weight=3)]
    ) == pytest.approx([0.9, 0.025, 0.075])
    alone = [Source(path="x"), Source(path="y", weight=2)]
    assert source_weights(InstructSection(replay=0.1), alone) == [1, 2]
    rows = inputs.rows("train", made.stages["prior"], 0, 4)
    some = batch(rows, range(400))
    assert some.trained is not None
    assert some.sample is not None
    text = (some.trained == (some.sample >= 0)).all(1)
    assert 0.2 < float(text.float().mean()) < 0.3


def test_prompts_are_dropped_for_so_many_blocks(made: Recipe, tokenizer: Tokenizer) -> None:
    system = system_of(made, tokenizer)
    stage = make_stage(system, "prior", lambda networks: torch.nn.ModuleDict(networks))
    alone = stage.draw(range(300)).alone  # type: ignore[attr-defined]
    assert alone.shape == (300, 2, LENGTH // 4)
    assert float(alone.float().mean()) == pytest.approx(0.1, abs=0.01)


def test_a_run_that_is_stopped_ends_in_the_same_weights(made: Recipe, tmp_path: Path) -> None:
    Trainer(made, tmp_path / "whole").run()
    with pytest.raises(Interrupted):
        Trainer(made, tmp_path / "resumed", At("prior", 2)).run()
    Trainer(made, tmp_path / "resumed").run()
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{path: x, format: tasks, tasks: [wrods]}", r"task='wrods', expected one of 'words'.*did you mean"),
        ("{path: x, format: tasks, tasks: [story_questions]}", "without questions, expected the file"),
        ("{path: x, tasks: [words]}", "with format='text', expected 'tasks'"),
        ("{hub: a/b, format: tasks}", "expected a path alone"),
        ("{path: x, format: preferences}", "sources of format preferences, expected some of text"),
    ],
)
def test_sources_that_cannot_be_are_refused(source: str, said: str) -> None:
    with pytest.raises(ColadaError, match=said):
        recipe(f"data.sources=[{source}]", "data.packing=samples")
