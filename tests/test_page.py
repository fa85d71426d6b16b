"""What all reports share: a table in three forms, a page that shows text as it is, values with intervals."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from colada.errors import ColadaError
from colada.report.page import Page
from colada.report.style import Series, compact, draw_intervals, save_figure, styled
from colada.report.table import Table
from test_report import Page as Parsed

TABLE = Table(("task", "model", "score")).row("a", "b", "1.0").row("<i>c</i>", "[bold]d[/]", "20.0")


def test_a_table_is_the_same_on_a_terminal_in_markdown_and_on_a_page(tmp_path: Path) -> None:
    table = Table(TABLE.titles, TABLE.rows, texts=2)
    assert table.markdown().splitlines() == [
        "| task | model | score |",
        "| --- | --- | ---: |",
        "| a | b | 1.0 |",
        "| <i>c</i> | [bold]d[/] | 20.0 |",
    ]
    console = Console(file=io.StringIO(), width=80)
    table.print(console)
    printed = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split() for line in printed][1:] == [["a", "b", "1.0"], ["<i>c</i>", "[bold]d[/]", "20.0"]]
    Page("t", "k").table(table).write(tmp_path / "page.html")
    page = Parsed(tmp_path / "page.html")
    assert page.cells == [list(TABLE.titles), *map(list, TABLE.rows)]
    assert "i" not in page.tags


def test_a_table_wider_than_its_console_is_not_cut() -> None:
    console = Console(file=io.StringIO(), width=12)
    Table(("name", *"abc")).row("a" * 20, "1,234,567", "2,345,678", "3").print(console)
    title, row = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert title.split() == ["name", *"abc"]
    assert row == f"{'a' * 20}  1,234,567  2,345,678  3"


def test_a_page_shows_what_it_is_given_as_it_is(tmp_path: Path) -> None:
    page = Page("<b>", "a & b").facts({"<i>": "x < y"}, large=True).section("one", "& two")
    page.texts([("", "  <pre>\n\n 1"), ("t", "2")]).texts([("", "3")], fold="more")
    page.provenance({"seed": 0, "versions": {"a": "1", "b": [2]}}).provenance({})
    page.write(tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    assert parsed.preformatted == ["  <pre>\n\n 1", "2", "3"]
    said = [text for text in parsed.text if text.strip()]
    expected = ["<b>: a & b", "<b>", "<i>", "x < y", "one", "& two", "  <pre>\n\n 1", "t", "2", "more", "3"]
    assert said == [*expected, "How it was made", "seed", "0", "versions", "a 1, b [2]"]
    with pytest.raises(ColadaError):
        page.write(tmp_path / "nowhere" / "page.html")


def test_intervals_stand_at_their_places_under_one_another() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    series = [
        Series("one", "red", [(2.0, 1.0, 4.0), None]),
        Series("two", "blue", [(3.0, 3.0, 3.0), (5.0, 4.5, 6.0)]),
    ]
    draw_intervals(axes, ["first", "second"], series, [2.5, None], "chance")
    one, two = axes.containers
    assert one.lines[0].get_xydata().tolist() == [[2.0, 0.0]]
    assert two.lines[0].get_xydata().tolist() == [[3.0, 1.0], [5.0, 4.0]]
    assert one.lines[2][0].get_segments()[0].tolist() == [[1.0, 0.0], [4.0, 0.0]]
    assert axes.collections[-1].get_segments()[0].tolist() == [[2.5, -0.5], [2.5, 1.5]]
    assert axes.get_yticks().tolist() == [0.5, 3.5]
    assert axes.yaxis_inverted()


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    with styled(), pytest.raises(ColadaError, match=r"cannot write to .*nowhere"):
        save_figure(Figure(), tmp_path / "nowhere" / "x.svg")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0005, "0.0005"), (-1.5, "−1.5"), (9999, "9999"), (12_000, "12k"), (3e6, "3M")]
)
def test_numbers_of_axes_are_short(value: float, text: str) -> None:
    assert compact(value) == text
