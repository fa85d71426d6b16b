"""Any picture file, and pictures with captions from folders, tables, packages and generated scenes."""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pictures need Pillow: colada-lm[pictures]")
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from colada.errors import ColadaError
from colada.pictures.load import Loaded, decode_picture, load_picture
from colada.pictures.shapes import example
from colada.pictures.sources import PictureFiles, Scenes, open_source
from experiments.pictures import twemoji

FRAMES = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
WHITE = "laid on white where it is transparent"
REDUCED = "reduced from 16 bits a channel to 8"
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)


def png(pixels: Any, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def changes(loaded: Loaded) -> list[str]:
    return [str(change) for change in loaded.changes]


def stored_png(kind: int, depth: int, rows: Sequence[bytes], width: int, transparent: bytes = b"") -> bytes:
    """A PNG of a kind (0 grey, 2 colours) and a depth, as Pillow writes none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", transparent) if transparent else b""]
    body = b"".join(b"\0" + row for row in rows)
    parts += [chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_png(colour: Sequence[int], transparent: Sequence[int] = ()) -> bytes:
    """A PNG of 4 × 4 pixels with 16 bits of each of one or three channels."""
    row, of_all = (
        struct.pack(f">{len(colour)}H", *colour) * 4,
        struct.pack(f">{len(transparent)}H", *transparent),
    )
    return stored_png(2 if len(colour) == 3 else 0, 16, [row] * 4, 4, of_all)


def deep_tiff(
    colour: Sequence[int], order: str = "<", meaning: int = 2, bits: int = 16, planes: bool = False
) -> bytes:
    """A TIFF of 4 × 4 pixels of one colour, not compressed, of 12 or 16 bits a channel."""
    strips = [struct.pack(f"{order}{len(colour)}H", *colour) * 16]
    if planes:
        strips = [struct.pack(order + "H", value) * 16 for value in colour]
    if bits == 12:
        strips = [(colour[0] << 12 | colour[0]).to_bytes(3, "big") * 8]
    content, places = b"", []
    for strip in strips:
        places.append(8 + len(content))
        content += strip
    tags = {256: [4], 257: [4], 258: [bits] * len(colour), 259: [1], 262: [meaning], 273: places}
    tags |= {277: [len(colour)], 278: [4], 279: [len(strip) for strip in strips], 284: [1 + planes]}
    listed = b""
    for tag, values in tags.items():
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:  # More than one do not fit in the list itself.
            packed, content = struct.pack(order + "I", 8 + len(content)), content + packed
        listed += struct.pack(order + "HHI", tag, 4, len(values)) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(content))
    return head + content + struct.pack(order + "H", len(tags)) + listed + bytes(4)


def netpbm(magic: str, most: int, colour: Sequence[int]) -> bytes:
    """A PGM (P2 in letters, P5) or PPM (P3, P6) of 4 × 4 pixels of one colour."""
    head = f"{magic} # {most + 300}\n4 4\n{most}\n".encode()
    if magic in ("P2", "P3"):
        return head + " ".join(map(str, list(colour) * 16)).encode() + b"\n"
    return head + struct.pack(f">{len(colour)}{'H' if most > 255 else 'B'}", *colour) * 16


# --- one picture -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_a_picture_of_the_right_size_is_as_it_is(kind: str, tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(png(PIXELS, kind, **({"lossless": True} if kind == "WEBP" else {})))
    loaded = load_picture(tmp_path / "picture", 32)
    np.testing.assert_array_equal(loaded.picture, PIXELS)
    assert loaded.changes == ()


def test_the_middle_square_is_scaled_by_area_and_said() -> None:
    wide = np.zeros((64, 100, 3), np.uint8)
    wide[:, 18:82] = np.repeat(np.repeat(PIXELS, 2, 0), 2, 1)
    wide[::2, ::2] //= 2
    expected = wide[:, 18:82].reshape(32, 2, 32, 2, 3).mean((1, 3))
    loaded = decode_picture(png(wide), 32, "wide.png")
    np.testing.assert_allclose(loaded.picture, expected, atol=1)
    assert changes(loaded) == [
        "cropped from 100 × 64 to its middle 64 × 64",
        "scaled from 64 × 64 to 32 × 32",
    ]


@pytest.mark.parametrize(
    ("data", "colour", "said"),
    [
        (png(np.full((1, 1, 3), 7, np.uint8)), (7, 7, 7), ["scaled from 1 × 1 to 4 × 4"]),
        (
            png(Image.new("RGBA", (4, 4), (255, 0, 0, 51))),
            (255, 204, 204),
            [WHITE],
        ),
        (png(Image.new("RGBA", (4, 4), (255, 0, 0, 255))), (255, 0, 0), []),
        (png(np.full((4, 4), 90, np.uint8)), (90, 90, 90), []),
        (png(Image.new("1", (4, 4), 1)), (255, 255, 255), []),
        (
            png(Image.new("P", (4, 4), 0), transparency=0),
            (255,) * 3,
            [WHITE],
        ),
        (png(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), []),
        (png(np.full((4, 4), 257 * 80, np.uint16)), (80,) * 3, [REDUCED]),
        # The upper byte of 1000 is 3, the nearest one 4.
        (deep_png([1000, 500, 65535]), (3, 1, 255), [REDUCED]),
        (deep_png([1000]), (3,) * 3, [REDUCED]),
        (deep_png([1000], transparent=[1000]), (255,) * 3, [REDUCED, WHITE]),
        (deep_png([1000], transparent=[1001]), (3,) * 3, [REDUCED]),
        (deep_tiff([1000], meaning=1), (3,) * 3, [REDUCED]),
        (deep_tiff([1000], ">", meaning=1), (3,) * 3, [REDUCED]),
        (deep_tiff([1000], meaning=0), (252,) * 3, [REDUCED]),
        (deep_tiff([1000], bits=12, meaning=1), (62,) * 3, ["reduced from 12 bits a channel to 8"]),
        (deep_tiff([1000, 500, 65535]), (3, 1, 255), [REDUCED]),
        (deep_tiff([1000, 500, 65535], ">"), (3, 1, 255), [REDUCED]),
        (deep_tiff([65535, 500, 0, 1000], meaning=5), (0, 251, 252), [REDUCED]),
        (netpbm("P5", 65535, [1000]), (4,) * 3, [REDUCED]),
        (netpbm("P2", 65535, [1000]), (4,) * 3, [REDUCED]),
        (netpbm("P6", 65535, [1000, 500, 65535]), (4, 2, 255), [REDUCED]),
        (netpbm("P3", 1023, [1000, 1, 1023]), (249, 0, 255), ["reduced from 10 bits a channel to 8"]),
        (netpbm("P5", 1023, [1000]), (249,) * 3, ["reduced from 10 bits a channel to 8"]),
        (netpbm("P6", 255, [100, 50, 255]), (100, 50, 255), []),
        (netpbm("P5", 100, [50]), (128,) * 3, []),
        (stored_png(0, 2, [b"\x55"] * 4, 4), (85,) * 3, []),
        (stored_png(0, 2, [b"\x55"] * 4, 4, b"\0\1"), (255,) * 3, [WHITE]),
        (stored_png(0, 4, [b"\x33\x33"] * 4, 4, b"\0\3"), (255,) * 3, [WHITE]),
        (stored_png(0, 4, [b"\x33\x33"] * 4, 4, b"\0\4"), (51,) * 3, []),
        (
            png(
                Image.new("RGB", (4, 4), "lime"),
                "GIF",
                save_all=True,
                append_images=FRAMES,
            ),
            (0, 255, 0),
            ["taken from an animation as the first of 3 frames"],
        ),
    ],
    ids=[
        "1-pixel",
        "alpha",
        "opaque",
        "grey",
        "bits",
        "palette",
        "cmyk",
        "16-bit grey",
        "16-bit",
        "16-bit dark grey",
        "16-bit transparent grey",
        "16-bit grey beside a transparent one",
        "16-bit grey tiff",
        "16-bit grey big-endian tiff",
        "16-bit inverted tiff",
        "12-bit tiff",
        "16-bit tiff",
        "16-bit big-endian tiff",
        "16-bit cmyk tiff",
        "16-bit pgm",
        "16-bit plain pgm",
        "16-bit ppm",
        "10-bit plain ppm",
        "10-bit pgm",
        "ppm",
        "7-bit pgm",
        "2-bit grey",
        "2-bit transparent grey",
        "4-bit transparent grey",
        "4-bit grey beside a transparent one",
        "animated",
    ],
)
def test_every_kind_of_picture(data: bytes, colour: tuple[int, ...], said: list[str]) -> None:
    loaded = decode_picture(data, 4, "picture")
    np.testing.assert_array_equal(loaded.picture, np.full((4, 4, 3), colour))
    assert changes(loaded) == said


def test_a_photograph_is_turned_as_its_camera_was() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by 90° to the right.
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    loaded = decode_picture(png(half, exif=exif), 32, "photo.png")
    np.testing.assert_array_equal(loaded.picture, np.rot90(half, -1))
    assert changes(loaded) == ["turned upright"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "p is no picture, expected one of PNG, JPEG"),
        (b"hello", "p is no picture, expected one of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "p is no picture"),
        (png(PIXELS)[:-1000], "p is a broken picture"),
        (png(PIXELS, "JPEG")[:300], "p is a broken picture"),
        (png(PIXELS)[:20], "p is (no|a broken) picture"),
        (png(np.zeros((8200, 8200), bool)), "p has 8200 × 8200 pixels, expected at most 67108864"),
        (png(np.zeros((20000, 20000), bool)), "p has more than 67108864 pixels, expected a smaller picture"),
        (
            png(np.full((4, 4), 0.5, np.float32), "TIFF"),
            "p has pixels of floating point, expected 8 or 16 bits",
        ),
        (
            png(np.full((4, 4), 70000, np.int32), "TIFF"),
            "p has 32 bits a channel, expected 8 or 16",
        ),
        (
            deep_png([1000, 500, 0], transparent=[1000, 500, 0]),
            "p has a transparent colour of 16 bits a channel, expected 8 bits, or an alpha channel",
        ),
        (
            deep_tiff([1000, 500, 0], planes=True),
            "p has planes of 16 bits a channel, expected 8 bits, or pixels",
        ),
    ],
    ids=[
        "empty",
        "text",
        "eps",
        "cut",
        "cut jpeg",
        "head",
        "huge",
        "bomb",
        "float",
        "32-bit",
        "16-bit transparent colour",
        "16-bit planes",
    ],
)
def test_what_is_no_good_picture_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ColadaError, match=message):
        decode_picture(data, 32, "p")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_damaged_files_are_read_or_refused_and_nothing_else(kind: str) -> None:
    whole = bytearray(png(PIXELS, kind))
    generator = np.random.default_rng(1)
    for _ in range(60):
        damaged = whole.copy()
        for place in generator.integers(0, len(whole), 4):
            damaged[place] = generator.integers(256)
        with contextlib.suppress(ColadaError):
            assert decode_picture(bytes(damaged), 32, "p").picture.shape == (32, 32, 3)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match="no such file, expected a picture"):
        load_picture(tmp_path / "none.png", 32)
    with pytest.raises(ColadaError, match="is a directory"):
        load_picture(tmp_path, 32)


# --- folders -----------------------------------------------------------------------------------


def folder(place: Path, captions: str | None, names: Sequence[str] = ("a.png", "b.png")) -> Path:
    for number, name in enumerate(names):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(png(np.full((32, 32, 3), number, np.uint8)))
    if captions is not None:
        (place / "captions.tsv").write_text(captions, encoding="utf-8")
    return place


def test_a_folder_of_pictures_and_its_captions(tmp_path: Path) -> None:
    place = folder(
        tmp_path, "b.png\ta bee \r\n\nmore/c.PNG\ta sea\na.png\tan A\n", ["a.png", "b.png", "more/c.PNG"]
    )
    (place / "notes.txt").write_text("not a picture")
    (place / "b.png").write_bytes(png(np.ones((48, 64, 3), np.uint8)))
    source = open_source(str(place))
    assert source.count == 3
    assert [source.pair(n).caption for n in range(4)] == ["a bee", "a sea", "an A", "a bee"]
    assert [source.pair(n).picture[0, 0, 0] for n in range(3)] == [1, 2, 0]
    assert source.notes == ("1 of 3 pictures cropped", "1 of 3 pictures scaled")


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (None, "no captions.tsv in this folder, expected a line for each picture: name, tab, caption"),
        ("", "captions.tsv holds no captions"),
        ("a.png\tan A\nb.png\n", "captions.tsv:2: 'b.png', expected a picture's name, a tab, a caption"),
        ("a.png\tan A\nb.png\t \n", r"captions.tsv:2: 'b.png\\t ', expected a picture's name"),
        ("a.png an A\n", "captions.tsv:1: 'a.png an A', expected a picture's name, a tab, a caption"),
        ("a.png\tA\na.png\tB\n", "captions.tsv:2: 'a.png' is there twice, first in line 1"),
        ("a.png\tA\nbb.png\tB\n", r"captions.tsv:2: no picture 'bb.png' \(did you mean 'b.png'\?\) in "),
        ("../a.png\tA\n", "captions.tsv:1: no picture '../a.png'"),
        ("a.png\tA\n", "'b.png' without a caption in captions.tsv"),
        ("c.png\tA\n", "captions.tsv:1: no picture 'c.png'"),
    ],
)
def test_folders_whose_captions_do_not_fit(captions: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=message):
        open_source(str(folder(tmp_path, captions)))


def test_captions_that_are_no_text_and_pictures_that_are_none(tmp_path: Path) -> None:
    place = folder(tmp_path, None)
    (place / "captions.tsv").write_bytes(b"a.png\tA\nb.png\t\xff\n")
    with pytest.raises(ColadaError, match=r"captions.tsv:2: byte 0xff"):
        open_source(str(place))
    folder(tmp_path, "a.png\tA\nb.png\tB\n")
    (place / "b.png").write_bytes(b"GIF89a")
    with pytest.raises(ColadaError, match=r"b.png is (no|a broken) picture"):
        open_source(str(place))


# --- parquet -----------------------------------------------------------------------------------


def table(place: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), place)
    return place


def test_parquet_with_bytes_as_they_are_or_as_datasets_writes_them(tmp_path: Path) -> None:
    pictures = [png(np.full((32, 32, 3), n, np.uint8)) for n in range(3)]
    table(tmp_path / "1.parquet", image=pictures[:2], caption=["one ", "two"])
    wrapped = [{"bytes": pictures[2], "path": "2.png"}]
    table(tmp_path / "2.parquet", image=wrapped, caption=["three"], split=["validation"])
    source = open_source(str(tmp_path))
    assert [source.pair(n).caption for n in range(3)] == ["one", "two", "three"]
    assert [source.pair(n).picture[0, 0, 0] for n in range(3)] == [0, 1, 2]
    training, validation = source.split(0.5)
    assert validation is not None
    assert (training.count, validation.count) == (2, 1)
    assert open_source(str(tmp_path / "1.parquet")).count == 2


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"image": ["a.png"], "caption": ["A"]},
            "row 1: 'image' is of type str, expected a picture",
        ),
        ({"image": [None], "caption": ["A"]}, "row 1: 'image' is null, expected a picture file's bytes"),
        ({"image": [png(PIXELS)], "caption": [7]}, "row 1: 'caption' is of type int, expected a string"),
        ({"image": [png(PIXELS)] * 2, "caption": ["A", " "]}, "row 2: 'caption' is empty, expected text"),
        ({"image": [b"A"], "caption": ["A"]}, "row 1 is no picture, expected one of PNG"),
        ({"image": [b"A"], "text": ["A"]}, "no column 'caption', columns there: image, text"),
        ({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}, "holds no pictures"),
    ],
)
def test_tables_that_hold_something_else(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=message):
        open_source(str(table(tmp_path / "t.parquet", **columns)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "shapes:onne",
            r"shapes:onne: 'onne' \(did you mean 'one'\?\), expected some of one, two",
        ),
        ("shapes:one,two", "shapes:one,two: one and two, expected one of them"),
        ("nowhere", "nowhere: no such file, expected a folder of pictures, a .parquet file or shapes:"),
        ("", "expected"),
    ],
)
def test_sources_that_are_none(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ColadaError, match=message):
        open_source(name)
    with pytest.raises(ColadaError, match="shapes: are pictures of 32 pixels, expected size=32, not 64"):
        open_source("shapes:", size=64)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A")
    with pytest.raises(ColadaError, match=r"a\.txt, expected a folder of pictures, a \.parquet file"):
        open_source(str(tmp_path / "a.txt"))
    (tmp_path / "a.parquet").write_text("A")
    with pytest.raises(ColadaError, match="not a readable parquet file"):
        open_source(str(tmp_path / "a.parquet"))


# --- what is trained on, and what validates ----------------------------------------------------


def test_generated_scenes_by_name() -> None:
    source = open_source("shapes:two,grid", seed=3)
    expected = example(3, 17, 2, on_grid=True)
    pair = source.pair(17)
    assert (pair.caption, pair.answer) == (expected.caption, expected.answer)
    np.testing.assert_array_equal(pair.picture, expected.picture)
    assert source.count is None
    training, validation = source.split(0.1)
    assert validation is not None
    assert training == source
    answers = {training.pair(n).answer for n in range(30)}
    assert [validation.pair(n).picture.sum() for n in range(3)] != [
        training.pair(n).picture.sum() for n in range(3)
    ]
    assert answers - {validation.pair(n).answer for n in range(30)}


def test_about_a_share_of_files_validates_and_equal_pairs_stay_together() -> None:
    captions = tuple(f"picture {n // 2}" for n in range(1000))
    pictures = np.zeros((1000, 2, 2, 3), np.uint8)
    training, validation = PictureFiles("f", captions, pictures).split(0.1)
    assert validation is not None
    assert 60 < validation.count < 140
    assert training.count + validation.count == 1000
    assert not set(training.captions) & set(validation.captions)


# --- Twemoji -----------------------------------------------------------------------------------


def package(place: Path, names: Sequence[str], category: str = "Objects") -> dict[str, bytes]:
    entries = [{"name": name.upper(), "image": f"{name}.png", "category": category} for name in names]
    entries.append({"name": "GRINNING FACE", "image": "face.png", "category": "Smileys & Emotion"})
    files = {"emoji.json": json.dumps(entries).encode()}
    for number, name in enumerate(names):
        picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
        picture.paste((40 * number, 0, 0, 255), (0, 0, 64, 32))
        files[f"img/twitter/64/{name}.png"] = png(picture)
    return files


def pack(place: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(place, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return place


def unpack(place: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


@pytest.mark.parametrize("write", [pack, unpack])
def test_the_package_is_read_packed_or_unpacked(write: Callable[..., Path], tmp_path: Path) -> None:
    place = write(tmp_path / "package.tgz", package(tmp_path, ["hammer", "drum"]))
    source = twemoji.read_twemoji(place)
    assert [source.pair(n).caption for n in range(2)] == ["hammer", "drum"]
    assert source.pair(1).picture.shape == (32, 32, 3)
    assert source.pair(1).picture[0, 0].tolist() == [40, 0, 0]
    assert source.pair(1).picture[31, 0].tolist() == [255, 255, 255]
    assert "laid on white" in source.notes[0]
    twemoji.write_folder(source, tmp_path / "folder")
    again = open_source(str(tmp_path / "folder"))
    assert [again.pair(n).caption for n in range(2)] == ["hammer", "drum"]
    assert all(np.array_equal(again.pair(n).picture, source.pair(n).picture) for n in range(2))


def test_packages_that_are_none(tmp_path: Path) -> None:
    files = package(tmp_path, ["hammer"])
    cases: list[tuple[dict[str, bytes], str]] = [
        ({}, "emoji.json is missing, expected the package emoji-datasource-twitter"),
        ({"emoji.json": b"[{"}, "emoji.json is not valid JSON"),
        ({"emoji.json": b'[{"name": "A"}]'}, "is no list of emoji"),
        (package(tmp_path, [], "Objects"), "has no emoji of Animals & Nature, Food & Drink, Objects"),
        ({"emoji.json": files["emoji.json"]}, "hammer.png is missing"),
        (files | {"img/twitter/64/hammer.png": b""}, "hammer.png is no picture"),
    ]
    for number, (content, message) in enumerate(cases):
        with pytest.raises(ColadaError, match=message):
            twemoji.read_twemoji(pack(tmp_path / f"{number}.tgz", content))
    (tmp_path / "cut.tgz").write_bytes(pack(tmp_path / "whole.tgz", files).read_bytes()[:200])
    with pytest.raises(ColadaError, match=r"cut.tgz is no readable npm package"):
        twemoji.read_twemoji(tmp_path / "cut.tgz")


def test_a_moved_picture_is_the_picture_nearly_where_it_was() -> None:
    picture = np.full((32, 32, 3), 255, np.uint8)
    picture[10:20, 12:18] = 0
    for seed in range(20):
        dark = 1 - twemoji.moved(picture, np.random.default_rng(seed)).mean(-1) / 255
        rows, columns = dark.sum(1) @ np.arange(32) / dark.sum(), dark.sum(0) @ np.arange(32) / dark.sum()
        assert abs(rows - 14.5) < 2.2
        assert abs(columns - 14.5) < 2.2
        assert 0.8 < dark.sum() / 60 < 1.25

    class Still(np.random.Generator):
        def uniform(self, low: Any = 0, high: Any = 1, size: Any = None) -> Any:
            return np.zeros(size) if size else 1.0

    np.testing.assert_array_equal(twemoji.moved(picture, Still(np.random.PCG64(0))), picture)


def test_ranks_count_the_pictures_that_are_nearer() -> None:
    pictures, drawn, named = RNG.normal(size=(9, 4, 2)), RNG.normal(size=(5, 4, 2)), [0, 3, 8, 8, 1]
    expected = []
    for picture, number in zip(drawn, named, strict=True):
        distances = [float(((picture - other) ** 2).sum()) for other in pictures]
        expected.append(sum(distance < distances[number] for distance in distances))
    assert twemoji.ranks(drawn, named, pictures).tolist() == expected
    assert twemoji.ranks(pictures, range(9), pictures).tolist() == [0] * 9
    assert re.search("CC BY 4.0", twemoji.CREDIT)


@pytest.mark.parametrize("share", [1e-9, 0.02, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 40])
def test_no_side_of_a_split_is_empty_and_equal_pairs_are_on_one(share: float, count: int) -> None:
    pictures = np.stack([np.full((2, 2, 3), number // 2 * 2, np.uint8) for number in range(2 * count)])
    captions = tuple(str(number // 2) for number in range(2 * count))  # Each pair twice.
    training, validation = PictureFiles("f", captions, pictures).split(share)
    assert validation is not None
    assert training.count > 0
    assert validation.count > 0
    assert set(training.captions).isdisjoint(validation.captions)
    assert training.count + validation.count == 2 * count


def test_what_cannot_be_split_is_refused_and_no_share_is_no_validation() -> None:
    one = PictureFiles("f", ("a", "a"), np.zeros((2, 2, 2, 3), np.uint8))
    with pytest.raises(ColadaError, match="f: one picture, expected a second one to validate with"):
        one.split(0.1)
    training, validation = one.split(0)
    assert (training.count, validation) == (2, None)
    with pytest.raises(ColadaError, match="f: every picture is for validation, expected some to train on"):
        replace(one, validation=(True, True)).split(0.1)
    assert Scenes("shapes:").split(0)[1] is None


def test_digests_and_words_are_of_what_is_there() -> None:
    pictures = np.zeros((1, 2, 2, 3), np.uint8)
    one, other = PictureFiles("f", ("A cat, 2 dogs",), pictures), PictureFiles("f", ("A cat",), pictures)
    assert one.words == {"a", "cat", "dogs"}
    assert one.digest != other.digest != PictureFiles("f", ("A cat",), pictures + 1).digest
    assert Scenes("shapes:", 0).digest != Scenes("shapes:", 1).digest
