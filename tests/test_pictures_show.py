"""Pictures for people: files that others read, sheets, and a terminal's cells."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from colada.errors import ColadaError
from colada.pictures.load import decode_picture
from colada.pictures.shapes import example
from colada.pictures.show import half_blocks, png, sheet

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)


def test_a_png_is_what_pillow_reads() -> None:
    images = pytest.importorskip("PIL.Image", reason="pictures are read by Pillow: colada-lm[pictures]")
    for scale in (1, 3):
        image = images.open(io.BytesIO(png(PICTURE, scale)))
        image.verify()
        image = images.open(io.BytesIO(png(PICTURE, scale)))
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (4 * scale, 6 * scale))
        np.testing.assert_array_equal(np.asarray(image)[::scale, ::scale], PICTURE)
        np.testing.assert_array_equal(np.asarray(image)[scale - 1 :: scale, scale - 1 :: scale], PICTURE)


def test_a_scene_survives_its_file() -> None:
    pytest.importorskip("PIL", reason="pictures are read by Pillow: colada-lm[pictures]")
    picture = example(0, 0).picture
    loaded = decode_picture(png(picture), 32, "scene.png")
    np.testing.assert_array_equal(loaded.picture, picture)
    assert loaded.changes == ()


@pytest.mark.parametrize("scale", [0, 65, 1.5, True, "2"])
def test_a_scale_out_of_bounds_is_refused(scale: object) -> None:
    with pytest.raises(ColadaError, match="scale="):
        png(PICTURE, scale)  # type: ignore[arg-type]


def test_a_sheet_is_in_reading_order_on_white() -> None:
    pictures = [np.full((2, 3, 3), n, np.uint8) for n in range(3)]
    page = sheet(pictures, 2)
    white = 255
    assert page[..., 0].tolist() == [
        *[[0, 0, 0, white, white, 1, 1, 1]] * 2,
        *[[white] * 8] * 2,
        *[[2, 2, 2, white, white, white, white, white]] * 2,
    ]
    with pytest.raises(ColadaError, match="no pictures for a sheet"):
        sheet([], 2)


def test_two_pixels_are_one_cell_of_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor", width=80)
    console.print(half_blocks(PICTURE[:, :2]), end="")
    cells = []
    for upper, lower in zip(PICTURE[::2, :2], PICTURE[1::2, :2], strict=True):
        colours = (
            f"\x1b[38;2;{';'.join(map(str, above))};48;2;{';'.join(map(str, below))}m▀\x1b[0m"
            for above, below in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        cells.append("".join(colours))
    assert file.getvalue() == "\n".join(cells)
    assert half_blocks(PICTURE[:5]).plain == "\n".join(["▀▀▀▀"] * 3)
