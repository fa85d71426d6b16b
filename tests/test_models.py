"""The models beside the package: they do what their card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from colada.models.likelihood import measure
from colada.models.load import load, load_cola
from colada.pictures.reader import judge
from colada.pictures.shapes import parse
from experiments.pictures.drawn import seen

PICTURES, JUDGE = (Path(__file__).parent.parent / "models" / name for name in ("pictures", "judge"))
needs_pictures, needs_judge = (
    pytest.mark.skipif(not directory.is_dir(), reason="models/ is in a clone alone")
    for directory in (PICTURES, JUDGE)
)


@needs_pictures
def test_unseen_captions_are_drawn_right_and_pictures_described_word_for_word() -> None:
    model, scenes = load_cola(PICTURES), seen(40)
    drawn = model.draw([scene.caption for scene in scenes], seed=0, steps=8)
    right = sum(
        judge(picture, parse(scene.caption)).right for picture, scene in zip(drawn, scenes, strict=True)
    )
    assert right >= 26  # Of a share of .84 fewer come once in two thousand times; by chance, none.
    said = model.describe([scene.picture for scene in scenes], seed=0, steps=8)
    exact = sum(answer.text.strip() == scene.answer for answer, scene in zip(said, scenes, strict=True))
    assert exact >= 36


@needs_pictures
def test_the_model_that_draws_reads_and_writes_the_bundled_models_latents() -> None:
    bundled, model = load_cola(), load_cola(PICTURES)
    assert model.shares_vae(bundled)
    assert model.dit.config.dual_layers == model.dit.config.num_layers  # Text has weights of its own.
    (done,) = model.generate(["Once upon a time"], 24, seed=0)
    assert done.text.startswith((",", " there"))


@needs_judge
def test_the_judge_finds_a_story_likelier_than_the_same_words_in_another_order() -> None:
    story = "Once upon a time there was a little girl. She had a red ball, and she liked to play in the park."
    words = story.split()
    mixed = " ".join(words[::3] + words[1::3] + words[2::3])
    told, shuffled = measure(load(JUDGE), [story, mixed])
    assert -told.log_likelihood / told.tokens < 3.2  # Its mean on validation text.
    assert told.log_likelihood > 0.6 * shuffled.log_likelihood
