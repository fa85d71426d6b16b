"""The models beside the package: they do what their card says."""

from __future__ import annotations

from pathlib import Path

import pytest

from colada.models.load import load_cola
from colada.pictures.reader import judge
from colada.pictures.shapes import parse
from experiments.pictures.drawn import seen

PICTURES = Path(__file__).parent.parent / "models" / "pictures"
pytestmark = pytest.mark.skipif(not PICTURES.is_dir(), reason="models/ is in a clone alone")


def test_unseen_captions_are_drawn_right_and_pictures_described_word_for_word() -> None:
    model, scenes = load_cola(PICTURES), seen(40)
    drawn = model.draw([scene.caption for scene in scenes], seed=0, steps=8)
    right = sum(
        judge(picture, parse(scene.caption)).right for picture, scene in zip(drawn, scenes, strict=True)
    )
    assert right >= 24  # Of a share of .8 fewer come once in a thousand times; by chance, none.
    said = model.describe([scene.picture for scene in scenes], seed=0, steps=8)
    exact = sum(answer.text.strip() == scene.answer for answer, scene in zip(said, scenes, strict=True))
    assert exact >= 36
