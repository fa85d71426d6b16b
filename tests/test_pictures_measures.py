"""The measurements of docs/pictures.md: their commands, on a few scenes."""

from __future__ import annotations

import shlex
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from colada.errors import ColadaError
from colada.models.cola import ColaDLM
from colada.models.load import load_cola
from colada.pictures.codec import ConvVAE
from colada.pictures.config import CodecConfig
from colada.pictures.load import load_picture
from colada.pictures.reader import judge, read
from colada.pictures.shapes import HELD_OUT, example, held_out, parse
from colada.report.table import Table
from colada.text.transcript import Completion
from colada.train.recipe import load_recipe
from experiments.pictures import drawn, measures
from experiments.pictures.__main__ import main
from experiments.pictures.drawn import (
    ABLATIONS,
    DRAWN,
    colour_or_shape,
    comparison_table,
    describing_table,
    diversity_table,
    drawing_row,
    drawing_table,
    gallery,
    of_held_out,
    round_trip_table,
    seen,
    spread,
    sweep_table,
)
from experiments.pictures.joined import beside
from helpers import tiny_dit, tiny_vae


def cells(output: str) -> list[list[str]]:
    """The rows of a Markdown table, without titles."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_reader_is_right_of_true_pictures_and_chance_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reader", "--count", "20", "--markdown"]) == 0
    rows = cells(capsys.readouterr().out)
    assert len(rows) == 4
    assert all(row[1].startswith("1.000 [0.8") for row in rows)
    assert all(float(row[2].split()[0]) < 0.15 for row in rows)


def test_codecs_keep_more_with_more_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    untrained = ConvVAE(CodecConfig(kind="conv_vae", width=8, channels=8))
    dit = tiny_dit(img_channels=8, img_grid=[4, 4])
    ColaDLM(tiny_vae(), dit, image=untrained).save(tmp_path / "model")
    arguments = ["codec", "--count", "12", "--fitted-on", "1000", "--model", str(tmp_path / "model")]
    assert main([*arguments, "--markdown"]) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[1] for row in rows] == ["16 × 64", "16 × 48", "16 × 32", "64 × 16", "64 × 24", "16 × 8"]
    variance, decibels = [float(row[3]) for row in rows], [float(row[4]) for row in rows]
    assert 1 > variance[0] > variance[1] > variance[2] > 0.9
    assert decibels[0] > decibels[1] > decibels[2] > 24
    assert float(rows[0][5]) > 0.9
    assert decibels[5] < 20  # It has learnt nothing.


def test_the_bundled_model_spells_captions() -> None:
    texts = [scene.caption for scene in measures.scenes(20)]
    ((count, _, tokens, captions),) = measures.captions_table(load_cola(), texts).rows
    assert count == "20"
    assert tokens.startswith("1.000")
    assert captions.startswith("1.000")


def test_a_sheet_of_scenes_is_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL", reason="pictures are read by Pillow: colada-lm[pictures]")
    out = tmp_path / "sheet.png"
    assert main(["sheet", str(out), "--count", "3", "--columns", "2", "--show"]) == 0
    kinds = [change.kind for change in load_picture(out, 66).changes]
    assert kinds == ["scaled"]  # From 4 × (2 × 32 + 2).
    assert example(0, 0).caption in capsys.readouterr().out
    assert main(["sheet", str(out), "--source", "shapes:onne"]) == 2


# --- what models draw and say ------------------------------------------------------------------


class Perfect:
    """Draws and describes scenes as they are; of some captions, another's."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong = wrong

    def draw(self, captions: list[str], **settings: Any) -> list[Any]:
        pictures = known()
        drawn = [pictures[text] if text in pictures else true_picture(text) for text in captions]
        return [*[np.full_like(one, 237) for one in drawn[: self.wrong]], *drawn[self.wrong :]]

    def describe(self, pictures: list[Any], **settings: Any) -> list[Completion]:
        return [Completion(str(read(picture)), (), "end", 0) for picture in pictures]


@cache
def known() -> dict[str, Any]:
    """Pictures of the first scenes that are measured, by their captions and answers."""
    scenes = [one for things in (None, 1, 2, 3) for one in seen(20, things)]
    scenes += [one for name in HELD_OUT for one in of_held_out(name, 10)]
    return {text: one.picture for one in scenes for text in (one.caption, one.answer)}


@cache
def true_picture(caption: str) -> Any:
    """The first of some scenes that is what a caption says; drawn anew for each caption."""
    wanted = parse(caption)
    for number in range(10**6):
        one = example(3, number, len(wanted.things), None)
        if judge(one.picture, wanted).right:
            return one.picture
    raise AssertionError(caption)


def test_what_is_drawn_right_is_counted_and_what_is_empty_is_not() -> None:
    examples = seen(12, 1)
    table = Table(DRAWN)
    drawing_row(table, "all", Perfect(3).draw([one.caption for one in examples]), examples)
    text = table.markdown()
    assert text.count("0.750 [") == 5  # Right, count, things, sizes and relations of nine in twelve.
    assert text.count("0.250 [") == 1  # A colour is missing where nothing is drawn.
    assert text.count("0.000 [") == 2  # No shape is wrong, nothing is swapped.


def test_a_wrong_shape_is_told_from_a_missing_colour() -> None:
    one = example(0, 0)._replace(caption="a red circle left of a blue square")
    for caption, expected in (
        ("a red circle left of a blue square", (False, False)),
        ("a red square left of a blue square", (False, True)),
        ("a blue circle left of a red square", (False, True)),
        ("a red circle left of a green square", (True, False)),
        ("a red circle", (True, False)),
    ):
        assert colour_or_shape(true_picture(caption), one) == expected, caption


def test_the_table_of_drawings_has_all_sets_and_pools_what_was_never_seen() -> None:
    rows = drawing_table(cast(ColaDLM, Perfect()), 10, False, {}).rows
    names = [row[0] for row in rows]
    assert names[:4] == ["1 or 2 things", "1 thing", "2 things", "3 things"]
    assert names[4:] == [
        *(f"unseen: {name}" for name in HELD_OUT),
        "unseen: all",
        "chance: another's caption",
    ]
    assert all(row[1].startswith("1.000") for row in rows[:-1])
    assert rows[-2][1] == measures.share(30, 30)
    assert rows[-1][1].startswith("0.0")


def test_a_sweep_is_of_other_captions_than_the_tables() -> None:
    asked = set[str]()

    class Listening(Perfect):
        def draw(self, captions: list[str], **settings: Any) -> list[Any]:
            asked.update(captions)
            return [example(0, 0).picture for _ in captions]

    rows = sweep_table(cast(ColaDLM, Listening()), 3, False).rows
    assert asked == {one.caption for one in seen(3, first=measures.VALIDATION)}
    assert [len(row) for row in rows] == [7] * 4


def test_drawings_of_a_caption_differ_as_true_pictures_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "SEEDS", 2)
    rows = diversity_table(cast(ColaDLM, Perfect()), 1, False, {}).rows
    assert [row[0] for row in rows] == ["1 thing, 2 seeds", "2 things, 2 seeds"]
    assert all(row[2].startswith("1.000") for row in rows)
    assert all(float(row[3]) == 0 < float(row[4]) for row in rows)  # One picture, whatever the seed.


def test_a_gallery_says_of_each_drawing_what_is_wrong_with_it() -> None:
    figure = gallery(cast(ColaDLM, Perfect(1)), 4, 3, False, {})
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert titles == [*(one.caption for one in seen(4)), "", ""]
    assert said.count("right") == 3
    assert len(said) == 4


def test_held_out_scenes_hold_their_combination() -> None:
    for name in HELD_OUT:
        assert {held_out(parse(one.answer).things) for one in of_held_out(name, 3)} == {name}


def test_answers_and_round_trips_of_one_who_reads_are_all_right() -> None:
    reader = cast(ColaDLM, Perfect())
    table = describing_table(reader, 20, False, {})
    assert table.markdown().count("1.000 [") == 3
    assert table.rows[1][1].startswith(("0.050 [", "0.100 ["))  # Always the commonest answer.
    assert round_trip_table(reader, 10, False, {}).markdown().count("1.000 [") == 1


def test_spread_is_nothing_of_equal_pictures_and_one_of_black_and_white() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert spread([black, black]) == 0
    assert spread([black, white]) == 1


def test_ablations_are_runs_that_the_recipe_takes_and_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ablations"]) == 0
    first, *trained, last = map(shlex.split, capsys.readouterr().out.splitlines())
    assert len(trained) == 1 + len(ABLATIONS)
    for words in trained:
        sets = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
        load_recipe(Path(words[2]), sets)
    assert last[-1 - len(trained) : -1] == [f"{words[4]}/model" for words in trained]
    monkeypatch.chdir(tmp_path)
    assert main(first[3:]) == 0
    bundled, fresh = load_cola(), load_cola(first[-1])
    assert bundled.shares_vae(fresh)
    assert not torch.equal(bundled.dit.txt_out.proj.weight, fresh.dit.txt_out.proj.weight)


@pytest.mark.parametrize("dual", [0, 1])
def test_the_pictures_of_one_model_stand_beside_the_text_of_another(dual: int) -> None:
    vae, codec = tiny_vae(), ConvVAE(CodecConfig(kind="conv_vae", width=8, channels=8))
    text = ColaDLM(vae, tiny_dit(1))
    pictures = ColaDLM(vae, tiny_dit(2, img_channels=8, img_grid=[4, 4], dual_layers=dual), image=codec)
    both = beside(text, pictures).dit
    state, of_pictures = both.state_dict(), pictures.dit.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in text.dit.state_dict().items())
    assert torch.equal(state["img_in.proj.weight"], of_pictures["img_in.proj.weight"])
    for layer in range(2):
        name = f"blocks.{layer}.image.mlp.proj_in.weight"
        source = name if layer < dual else name.replace(".image", "")
        assert torch.equal(state[name], of_pictures[source])
    with pytest.raises(ColadaError, match="the second model has no pictures"):
        beside(pictures, text)
    with pytest.raises(ColadaError, match="different Text VAEs"):
        beside(ColaDLM(tiny_vae(5), tiny_dit(1)), pictures)


def test_models_are_compared_by_the_same_captions() -> None:
    models = {"all": cast(ColaDLM, Perfect()), "some": cast(ColaDLM, Perfect(1))}
    rows = comparison_table(models, 4, False).rows
    assert [row[0] for row in rows] == [f"{name}, guidance {n}" for name in models for n in (1, 3)]
    assert [row[1].split()[0] for row in rows] == ["1.000", "1.000", "0.750", "0.750"]
