"""``colada draw`` and ``colada describe``: files, pipes, sheets, terminals, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from colada.cli.info import describe as information
from colada.errors import ColadaWarning
from colada.generate.noise import NOISE_RULES, Noise
from colada.locate import BUNDLED
from colada.models.cola import ColaDLM
from colada.models.load import load_cola
from colada.pictures.codec import fit
from colada.pictures.config import CodecConfig
from colada.pictures.show import png, sheet
from colada.pictures.sources import open_source
from colada.text.tokenizer import Tokenizer
from commands import main
from helpers import tiny_dit, tiny_vae
from test_cli import run_in_terminal


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with pictures, and the bundled model's tokenizer."""
    directory = tmp_path_factory.mktemp("pictures") / "model"
    tokenizer = Tokenizer.from_file(BUNDLED / "tokenizer.json")
    pictures = np.stack([open_source("shapes:").pair(number).picture for number in range(60)])
    settings = {"steps": 2}
    config = CodecConfig(
        patch=16, channels=8, drawing=settings, describing=settings, words=["a", "red", "circle"]
    )
    vae = tiny_vae(vocab_size=tokenizer.vocab_size, pad_token_id=None)
    dit = tiny_dit(1, img_channels=8, img_grid=[2, 2], prediction="z0", dual_layers=1)
    ColaDLM(vae, dit, tokenizer, image=fit([pictures], config)).save(directory)
    return directory


@pytest.fixture(scope="module")
def model(saved: Path) -> ColaDLM:
    return load_cola(saved)


def read(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_a_caption_is_drawn_into_a_file(saved: Path, model: ColaDLM, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert main(["draw", "a red circle", "-m", saved, "-o", out, "--scale", 2, "--seed", 3, "-g", 2]) == 0
    (picture,) = model.draw("a red circle", seed=3, guidance=2.0)
    np.testing.assert_array_equal(read(out.read_bytes()), picture.repeat(2, 0).repeat(2, 1))


def test_a_sheet_has_captions_in_turn_and_seeds_in_order(
    saved: Path, model: ColaDLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"a red circle\n\na circle\n"))
    monkeypatch.setattr("sys.stdin", stdin)
    out = tmp_path / "OUT.PNG"
    assert main(["draw", "--grid", "2x3", "-m", saved, "-o", out, "--scale", 1, "--seed", 7]) == 0
    drawn = model.draw(["a red circle", "a circle"] * 3, seed=7)
    np.testing.assert_array_equal(read(out.read_bytes()), sheet(drawn, 3))


def test_a_pipe_gets_a_png(saved: Path, capfdbinary: Any) -> None:
    assert main(["draw", "a red circle", "-m", saved, "-o", "-", "--scale", 1]) == 0
    assert read(capfdbinary.readouterr().out).shape == (32, 32, 3)


@pytest.mark.filterwarnings("always::colada.errors.ColadaWarning")
def test_words_that_were_never_learnt_are_said_and_drawn(saved: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.png"
    assert main(["draw", "a red Unicorn, a dog", "-m", saved, "-o", out]) == 0
    note = "in none that the model has learnt from: 'unicorn', 'dog'\n"
    assert capsys.readouterr().err == f"note: caption 'a red Unicorn, a dog': {note}"
    assert out.is_file()


def test_a_terminal_sees_the_picture_form(saved: Path) -> None:
    screen, output = run_in_terminal(["draw", "a red circle", "-m", saved, "--steps", 3], 80, 24)
    rows = [row for row in screen.text.splitlines() if "▀" in row]
    assert [row.count("▀") for row in rows] == [32] * 16
    assert "a red circle" in screen.text
    assert "step 3/3" in output


@pytest.mark.parametrize(
    ("term", "grid", "message"),
    [
        ("xterm", "1x4", "a sheet of 134 columns, more than the terminal's 80: give -o FILE"),
        ("dumb", "1x1", "a terminal that shows no pictures: give -o FILE"),
    ],
)
def test_what_a_terminal_cannot_show_is_not_drawn_for_nobody(
    term: str, grid: str, message: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in (("TERM", term), ("COLUMNS", "80"), ("LINES", "24")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["draw", "a red circle", "-m", saved, "--grid", grid]) == 2
    assert message in capsys.readouterr().err


def test_pictures_are_described_and_what_was_changed_is_said(
    saved: Path, model: ColaDLM, tmp_path: Path, capsys: Any
) -> None:
    picture = open_source("shapes:").pair(0).picture
    (tmp_path / "a.png").write_bytes(png(picture))
    Image.fromarray(np.pad(picture.repeat(2, 0).repeat(2, 1), ((0, 0), (3, 3), (0, 0)))).save(
        tmp_path / "b.gif"
    )
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.gif")]
    assert main(["describe", *paths, "-m", saved, "-n", 6, "--prompt", "what is it?", "--json"]) == 0
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    with pytest.warns(ColadaWarning, match="b.gif: cropped"):
        expected = model.describe(paths, 6, prompt="what is it?")
    assert [answer["text"] for answer in answers] == [one.text for one in expected]
    assert [answer["picture"] for answer in answers] == paths
    assert answers[0]["changes"] == []
    assert "cropped from 70 × 64 to its middle 64 × 64" in answers[1]["changes"]
    assert err.startswith(f"note: {paths[1]}: cropped")
    assert main(["describe", paths[0], "-m", saved, "-n", 6, "--prompt", "what is it?"]) == 0
    assert capsys.readouterr().out == answers[0]["text"] + "\n"


def test_a_picture_that_cannot_be_described_loses_nothing_of_the_others(
    saved: Path, model: ColaDLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = [open_source("shapes:").pair(number).picture for number in range(3)]
    for name, content in zip("aceb", [*map(png, pictures), b"no picture at all"], strict=True):
        (tmp_path / f"{name}.png").write_bytes(content)
    names = [f"{name}.png" for name in "abcde"]  # The second is broken, the fourth missing.
    own = ["-m", saved, "-n", 6, "--seed", 5]
    answers = model.describe(pictures, 6, seed=[5, 7, 9])
    whole = [f"{name}.png: {one.text}" for name, one in zip("ace", answers, strict=True)]
    said = [
        "error: d.png: no such file, expected a picture",
        "error: b.png is no picture, expected one of PNG",
    ]
    assert main(["describe", *names, *own]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == whole
    assert [line[: len(start)] for line, start in zip(err.splitlines(), said, strict=False)] == said
    assert err.splitlines()[2:] == ["error: 2 of 5 pictures failed"]
    assert main(["describe", *names, *own, "--json"]) == 2
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["picture"] for record in records] == names
    assert [record["seed"] for record in records] == [5, 6, 7, 8, 9]
    assert [record.get("error", "") for record in records][3] == said[0].removeprefix("error: ")
    assert [f"{one['picture']}: {one['text']}" for one in records if "text" in one] == whole
    # What fails while it is described is one picture's too.
    draw = NOISE_RULES["per-sample"]

    def noise(seed: int, shape: tuple[int, int], device: torch.device) -> Noise:
        return lambda block, k: draw(seed, shape, device)(block, k) * (torch.nan if seed == 7 else 1)

    monkeypatch.setitem(NOISE_RULES, "per-sample", noise)
    assert main(["describe", "a.png", "a.png", "c.png", "e.png", *own]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == whole[0]
    assert [line.split(":")[0] for line in out.splitlines()] == ["a.png", "a.png", "e.png"]
    assert "error: c.png: " in err
    assert "not finite" in err
    assert err.endswith("error: 1 of 4 pictures failed\n")
    # Without any, no model is loaded.
    monkeypatch.setattr("colada.cli.pictures.load_cola", None)
    assert main(["describe", "x.png", "y.png", *own]) == 2
    missing = [f"error: {name}.png: no such file, expected a picture" for name in "xy"]
    assert capsys.readouterr().err.splitlines() == [*missing, "error: 2 of 2 pictures failed"]


def test_info_knows_what_is_of_pictures(saved: Path, model: ColaDLM) -> None:
    info = information(saved)
    parts, networks = info["parameters"], (model.vae, model.dit)
    assert parts["total"] == sum(p.numel() for network in networks for p in network.parameters())
    own = [p for name, p in model.dit.named_parameters() if "img_" in name or ".image." in name]
    assert parts["DiT for pictures"] == sum(p.numel() for p in own)
    assert info["cola_image"]["patch"] == 16
    assert "DiT for pictures" not in information()["parameters"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["draw", "a circle", "-o", "x.png"], "has no pictures: img_channels=0"),
        (["describe", "FILE"], "has no pictures: img_channels=0"),
        (["draw", "a circle", "-m", "MODEL"], "standard output is no terminal: give -o FILE"),
        (["draw", "a", "-o", "x.png", "--grid", "4"], "grid='4', expected rows x columns"),
        (["draw", "a", "-o", "x.png", "--grid", "99x99"], "at most 4096 drawings"),
        (["draw", "a", "-o", "x.png", "--scale", "0"], "scale=0"),
        (["draw", "a", "-o", "x.png", "--steps", "0"], "steps=0"),
        # Of a model that is not there nothing is said: no picture could be written.
        (["draw", "a", "-o", "x.jpg", "-m", "nowhere"], "--out x.jpg, expected a name that ends in .png"),
        (
            ["draw", "a", "-o", "a/x.png.webp", "-m", "nowhere"],
            "--out a/x.png.webp, expected a name that ends",
        ),
        (["draw", "a", "-o", "no/where/x.png", "-m", "MODEL"], "no/where"),
        (["describe", "nothing.png"], "nothing.png: no such file"),
        (["describe", "BROKEN", "-m", "MODEL"], "is no picture"),
        (["describe", "FILE", "-n", "0"], "max_new_tokens=0"),
    ],
)
def test_what_is_refused_in_one_line(
    args: list[str], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole.png").write_bytes(png(np.zeros((32, 32, 3), np.uint8)))
    (tmp_path / "broken.png").write_bytes(b"no picture at all")
    names = {"MODEL": str(saved), "FILE": "whole.png", "BROKEN": "broken.png"}
    assert main([names.get(arg, arg) for arg in args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))
