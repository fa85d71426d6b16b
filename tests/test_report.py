import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from colada.errors import ColadaError
from colada.report import training as report
from colada.report.style import STYLE, save_figure, styled
from colada.report.training import QUANTITIES, Curve, smooth, write_report
from colada.train.logs import LogFiles, Point

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

COMMON = {"grad_norm": 0.5, "lr": 1e-3, "tokens_per_s": 41_234.0, "mfu": 0.31, "memory_gb": 5.8}
STAGE1 = {"loss": 4.0, "nll": 3.0, "kl": 20.0, "masked": 2.0, "accuracy": 0.25, "log_snr": 1.5}
STAGE2 = {"loss": 1.0, "flow": 1.0, "log_snr": 4.0, "flow_by_t": [1.0, None, *[0.5] * 8]}


def record(stage: str, step: int, split: str = "train", **numbers: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "split": split, "time": 1e9 + 60 * step, **numbers}


def write_run(out: Path, records: list[dict[str, Any]]) -> Path:
    out.mkdir(exist_ok=True)
    monitor = LogFiles(out)
    for one in records:
        monitor.log(one)
    return out


def whole_run(out: Path, steps: int = 12) -> Path:
    def numbers(step: int, values: dict[str, Any]) -> dict[str, Any]:
        scaled = {k: v / step**0.5 if isinstance(v, float) else v for k, v in values.items()}
        return scaled | {"tokens": 100 * step, "skipped": step // 10}

    records = []
    for stage, values in (("vae", STAGE1), ("prior", STAGE2)):
        for step in range(1, steps + 1):
            records.append(record(stage, step, **numbers(step, values | COMMON)))
        records.append(record(stage, steps, "validation", **values))
    return write_run(out, records)


class Page(HTMLParser):
    """What a page consists of: plots with their texts, table cells, texts, ids and links."""

    VOID = frozenset({"meta", "br", "img", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.plots: dict[str, list[str]] = {}
        self.cells: list[list[str]] = []
        self.preformatted: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert value is not None or tag == "details"
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                self.links.append(str(value))
            self.links += re.findall(r"url\(([^)]*)\)", str(value))
            if tag == "svg" and name == "aria-label":
                self.plots[str(value)] = []
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag == "pre":
            self.preformatted.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text.append(data)
        if "svg" in self.open and self.open[-1] == "text":
            self.plots[list(self.plots)[-1]].append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data
        if self.open and self.open[-1] == "pre":
            self.preformatted[-1] += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = whole_run(tmp_path_factory.mktemp("runs") / "my <run>")
    (run / "recipe.yaml").write_text("seed: 17\ndata:\n  path: a<b\n")
    checkpoint = run / "checkpoints" / "prior-00000012"
    checkpoint.mkdir(parents=True)
    made_with = {"colada": "0.1.0", "torch": "2.13.0", "commit": "abc123+", "device": "x86_64"}
    (checkpoint / "state.json").write_text(
        json.dumps(
            {"stage": "prior", "step": 12, "tokens": 96, "skipped": 0, "number": 3, "made_with": made_with}
            | {"data": [], "generation": {}}
        )
    )
    return run / "report", Page(write_report(run))


# --- the page ------------------------------------------------------------------------------------------


def test_every_number_of_both_stages_has_a_plot_with_its_unit(whole: tuple[Path, Page]) -> None:
    _, page = whole
    expected = {f"vae_{name}" for name in STAGE1 | COMMON} | {f"prior_{name}" for name in STAGE2 | COMMON}
    assert page.plots.keys() == expected
    units = {
        "nll": "nats per token",
        "kl": "nats per token",
        "flow": "mean squared velocity error",
        "flow_by_t": "mean squared velocity error",
        "accuracy": "% of tokens",
        "mfu": "% of the device's peak",
        "tokens_per_s": "tokens/s",
        "memory_gb": "GB, largest so far",
    }
    for plot, texts in page.plots.items():
        name = plot.split("_", 1)[1]
        assert units.get(name, "") in "".join(texts)
        across = "timestep t (0: data, 1000: noise)" if name == "flow_by_t" else "step"
        assert across in texts
        drawn = {"train", "train, smoothed", "validation", "validation, last"} & set(texts)
        if name == "flow_by_t":
            assert drawn == {"validation, last"}
        else:
            smoothed = {"train"} if name in ("lr", "memory_gb") else {"train", "train, smoothed"}
            assert drawn == smoothed | ({"validation"} if name in STAGE1 | STAGE2 else set())


def test_plots_are_files_too(whole: tuple[Path, Page]) -> None:
    directory, page = whole
    files = {path.name for path in directory.iterdir()}
    assert files == {"report.html"} | {f"{plot}.svg" for plot in page.plots}
    for path in directory.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(--" not in path.read_text()


def test_what_was_not_recorded_has_no_plot(tmp_path: Path) -> None:
    never = {"kl": math.nan, "flow_by_t": [None] * 10, "mfu": math.inf}
    page = Page(write_report(write_run(tmp_path, [record("prior", 1, flow=1.0, **never)])))
    assert page.plots.keys() == {"prior_flow"}
    assert "Stage 1" not in "".join(page.text)
    assert "skipped" not in "".join(page.text)
    assert "Samples" not in "".join(page.text)
    assert page.preformatted == []


def test_numbers_of_ones_own_follow_under_their_names(tmp_path: Path) -> None:
    page = Page(
        write_report(
            write_run(tmp_path, [record("prior", s, **{"my/own$x$<b>": s, "nll": 1.0}) for s in (1, 2)])
        )
    )
    assert list(page.plots) == ["prior_nll", "prior_my_own_x__b_"]
    assert page.plots["prior_my_own_x__b_"].count("my/own$x$<b>") == 2  # Title and axis.


def test_the_page_is_self_contained(whole: tuple[Path, Page]) -> None:
    _, page = whole
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    assert re.findall(r"(?:https?:)?//[a-z]", page.source) == []
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)


def test_every_colour_of_a_plot_has_a_light_and_a_dark_value(whole: tuple[Path, Page]) -> None:
    source = whole[1].source
    used = set(re.findall(r"var\(--(\w+)\)", source))
    light, dark = source.split("@media (prefers-color-scheme: dark)")
    drawn = used - {"font", "page"}
    assert drawn >= {"ink", "muted", "grid", "paper", "series0", "series1", "shade0", "shade4"}
    for scheme in (light, dark):
        assert drawn <= set(re.findall(r"--(\w+): #", scheme))
    plots = source[source.index("<body>") :]
    assert re.findall(r"#[0-9a-fA-F]{6}\b", plots) == []


def test_facts_table_and_skipped_steps(whole: tuple[Path, Page]) -> None:
    _, page = whole
    said = "|".join(text for text in page.text if text.strip())
    for fact in (
        "my <run>",
        "Seed|17",
        "Tokens|2,400",
        "last record|0:11:00 hours",
        "commit|abc123+",
        "device|x86_64",
        "torch|2.13.0",
        "12 steps, 1 of them skipped.",
    ):
        assert fact in said
    rows = {(row[0], row[1]): row[2:] for row in page.cells}
    assert rows["Reconstruction, −log p(x | z0)", "nats per token"] == ["3", f"{3 / 12**0.5:.4g}", "3"]
    assert rows["Reconstruction accuracy", "% of tokens"] == ["25", f"{25 / 12**0.5:.4g}", "25"]
    assert rows["Throughput", "tokens/s"] == ["41,234", f"{41234 / 12**0.5:,.0f}", "–"]
    assert page.preformatted == ["seed: 17\ndata:\n  path: a<b\n"]


def test_the_last_samples_are_shown_as_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path, [record("prior", 10, flow=1.0)])
    samples = LogFiles(run, Point(("prior",), 10))
    attack = "</pre><script>alert('&amp;')</script>\n  <img src=//x>"
    samples.text("prior", 5, "old", "old")
    samples.text("prior", 10, "<i>Once", attack)
    samples.text("prior", 10, "Then", "  two\n\nlines")
    page = Page(write_report(run))
    assert page.preformatted == [attack, "  two\n\nlines"]
    assert {"<i>Once", "Then", "Samples at step 10 of prior"} <= set(page.text)
    assert not {"i", "script", "img"} & page.tags


# --- plots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1.0, 3000.0])
def test_no_text_of_a_plot_overlaps_another_or_leaves_it(tmp_path: Path, spread: float) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    names = (STAGE1 | STAGE2 | COMMON | {"log_q": -10.0, "kl_ref": 1.0}).items()
    records = [
        record(
            2, step, split, **{k: v if isinstance(v, list) else v * spread ** (step / 1e6) for k, v in names}
        )
        for step in range(0, 1_000_001, 50_000)
        for split in ("train", "validation")
    ]
    with matplotlib.rc_context(STYLE):
        figures = report.draw_plots(records)
        assert figures.keys() == {name for name, _ in names}
        for name, figure in figures.items():
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            texts = [
                text
                for text in figure.findobj(Text)
                if text.get_visible() and text.get_text() and not _outside_axis(text, figure)
            ]
            boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
            assert len(boxes) > 5
            for index, (text, box) in enumerate(boxes):
                assert box.x0 >= 0, (name, text)
                assert box.y0 >= 0, (name, text)
                assert box.x1 <= figure.bbox.x1, (name, text)
                assert box.y1 <= figure.bbox.y1, (name, text)
                for other, other_box in boxes[:index]:
                    assert not box.overlaps(other_box), (name, text, other)


def _outside_axis(text: Any, figure: Any) -> bool:
    """Whether a text is the label of a tick that is beyond the limits, which is not drawn."""
    (axes,) = figure.axes
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if text in (tick.label1, tick.label2):
                return not low <= tick.get_loc() <= high
    return False


def test_flow_by_timestep_shows_the_mean_of_each_fifth_of_the_stage() -> None:
    rows = [[float(step), None if step % 2 else 4.0] for step in range(1, 11)]
    figure = report.plot_flow_by_t([record("prior", s, flow_by_t=row) for s, row in enumerate(rows, 1)], [])
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["1–2", "3–4", "5–6", "7–8", "9–10"]
    for number, line in enumerate(axes.lines):
        np.testing.assert_allclose(line.get_xdata(), [250, 750])
        np.testing.assert_allclose(line.get_ydata(), [2 * number + 1.5, 4.0])


def test_a_smoothed_curve_is_a_weighted_mean_of_the_past() -> None:
    values = np.random.default_rng(0).normal(size=90)
    values[[0, 7]] = math.nan
    smoothed = smooth(values)
    assert math.isnan(smoothed[0])
    for now in range(1, 90):
        past = np.arange(now + 1)
        weights = np.exp(-(now - past) / 3) * np.isfinite(values[past])
        assert smoothed[now] == pytest.approx(
            np.nansum(weights * np.nan_to_num(values[past])) / weights.sum()
        )


def test_a_long_curve_keeps_its_extremes_in_a_small_file(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[[123, 40_000]] = 100.0, -100.0
    values[5:100] = math.nan
    with styled():
        figure = report.plot_curves(QUANTITIES["loss"], Curve(np.arange(50_000), values), Curve.of([], "", 1))
        save_figure(figure, tmp_path / "long.svg")
    svg = (tmp_path / "long.svg").read_text()
    assert len(svg) < 400_000  # All points would take 2 MB.
    curve = re.search(r'd="([^"]*)"[^>]*stroke-opacity: 0.4', svg)
    assert curve is not None
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", curve[1])]
    (axes,) = figure.axes
    figure.draw_without_rendering()
    inches = axes.transData.transform([[0, 100], [0, -100]])[:, 1] / figure.dpi
    ends = tuple(216 - 72 * inches)
    assert (min(heights), max(heights)) == pytest.approx(ends, abs=1)


# --- what can be wrong -------------------------------------------------------------------------------------


def test_a_directory_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(ColadaError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ColadaError, match=r"metrics\.jsonl holds no record"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, [record("prior", 10, flow=1.0)])
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(ColadaError, match=r"recipe\.yaml is not valid YAML"):
        write_report(run)
    (run / "recipe.yaml").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "vae", "st\n')
    with pytest.raises(ColadaError, match=r"metrics\.jsonl, line 2: damaged") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_a_missing_matplotlib_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = whole_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ColadaError, match=r'pip install "colada-lm\[train\]"$'):
        write_report(run)


def test_a_report_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    (run / "report").touch()
    with pytest.raises(ColadaError, match=r"cannot write to .*report"):
        write_report(run)


def test_the_same_run_gives_the_same_report_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    run = write_run(tmp_path, [record("prior", step, flow=1.0 / step) for step in range(1, 9)])
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert dict(matplotlib.rcParams) == before
