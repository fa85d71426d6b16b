import errno
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from colada.errors import ColadaError
from colada.train.logs import (
    LogFiles,
    Monitor,
    Monitors,
    Point,
    TensorBoard,
    load_monitor,
    make_monitors,
    read_records,
    read_samples,
)


def record(stage: str, step: int, split: str = "train", **numbers: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "split": split, "time": 1e9 + step, **numbers}


class Recorder:
    """A monitor of one's own: keeps what it is told."""

    def __init__(self, out: Path, recipe: Mapping[str, Any]) -> None:
        self.made_with = (out, recipe)
        self.told: list[Any] = []

    def log(self, record: Mapping[str, Any]) -> None:
        self.told.append(dict(record))

    def text(self, stage: str, step: int, title: str, text: str) -> None:
        self.told.append((stage, step, title, text))

    def close(self) -> None:
        self.told.append("closed")


class Failing(Recorder):
    def close(self) -> None:
        raise RuntimeError("no network")


NOT_A_CLASS = 3


def not_a_monitor(out: Path, recipe: Mapping[str, Any]) -> object:
    return object()


# --- metrics.jsonl ---------------------------------------------------------------------------------

HISTORY = [
    record("vae", 20, nll=3.5),
    record("vae", 40, nll=2.5),
    record("vae", 40, "validation", nll=2.75),
    record("prior", 20, flow=1.5, flow_by_t=[1.0, None]),
    record("prior", 40, flow=1.25, flow_by_t=[None, 0.5]),
]
LINES = [json.dumps(one) + "\n" for one in HISTORY]


@pytest.mark.parametrize(
    ("resume_at", "kept"),
    [
        (None, 0),
        (Point(("vae",), 20), 1),
        (Point(("vae",), 39), 1),
        (Point(("vae",), 40), 3),
        (Point(("vae", "prior"), 0), 3),
        (Point(("vae", "prior"), 20), 4),
        (Point(("vae", "prior"), 40), 5),
        (Point(("vae", "prior", "decay"), 0), 5),
    ],
)
@pytest.mark.parametrize("torn", ["", '{"stage": "prior", "st', '{"stage": "vae", "step": 1}'])
def test_metrics_keep_what_was_logged_up_to_the_point_of_resumption(
    tmp_path: Path, resume_at: Point | None, kept: int, torn: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(LINES) + torn)
    monitor = LogFiles(tmp_path, resume_at)
    assert path.read_text() == "".join(LINES[:kept])
    monitor.log(record("prior", 60, nll=1.0))
    assert path.read_text() == "".join(LINES[:kept]) + json.dumps(record("prior", 60, nll=1.0)) + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metrics_are_in_the_file_at_once_and_read_back(tmp_path: Path) -> None:
    monitor = LogFiles(tmp_path)
    for number, one in enumerate(HISTORY, 1):
        monitor.log(one)
        assert read_records(tmp_path / "metrics.jsonl") == HISTORY[:number]
    monitor.text("prior", 40, "prompt", "no metric")
    monitor.close()
    assert read_records(tmp_path / "metrics.jsonl") == HISTORY


def test_metrics_that_are_not_finite_become_null(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    path = tmp_path / "metrics.jsonl"
    LogFiles(tmp_path).log(
        record("vae", 1, nll=math.nan, kl=math.inf, flow_by_t=[1.0, -math.inf, None], skipped=2)
    )
    written = json.loads(path.read_text(), parse_constant=refuse)
    assert written == record("vae", 1, nll=None, kl=None, flow_by_t=[1.0, None, None], skipped=2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"stage": "vae", "st', "damaged"),
        (b"", "damaged"),
        (b'{"stage": "vae"\xff', "damaged"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b'{"stage": "vae", "split": "train", "time": 1.0}', "step=None, expected an integer"),
        (b'{"stage": "vae", "step": 1, "split": "train", "time": "now"}', "time='now', expected seconds"),
        (
            b'{"stage": "vae", "step": 1, "split": "train", "time": 1, "nll": "x"}',
            "nll='x', expected numbers",
        ),
        (
            b'{"stage": "vae", "step": 1, "split": "train", "time": 1, "b": [1, "x"]}',
            r"b=\[1, 'x'\], expected",
        ),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = LINES[0].encode() + line + b"\n" + LINES[1].encode()
    path.write_bytes(content)
    for read in (lambda: read_records(path), lambda: LogFiles(tmp_path, Point(("vae",), 40))):
        with pytest.raises(ColadaError, match=f"^{re.escape(str(path))}, line 2: {said}") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    full = f"cannot write to .*{os.strerror(errno.ENOSPC)}"
    with pytest.raises(ColadaError, match=full):
        LogFiles(tmp_path).log(HISTORY[0])
    with pytest.raises(ColadaError, match=full):
        LogFiles(tmp_path).text("vae", 1, "a", "b")


# --- samples.jsonl -----------------------------------------------------------------------------------


def test_samples_are_read_back_and_cut_at_the_point_of_resumption(tmp_path: Path) -> None:
    path, monitor = tmp_path / "samples.jsonl", LogFiles(tmp_path)
    texts = ["Once\n\nupon ☕\r\n", '"}\n{"stage": "a quotation"', "", "\u2028\x85end\n"]
    said = [("prior", number // 2 + 1, f"prompt\n{number}", text) for number, text in enumerate(texts)]
    for one in said:
        monitor.text(*one)
    monitor.close()
    assert "☕" in path.read_text()
    assert [tuple(sample.values()) for sample in read_samples(path)] == said

    with path.open("a") as file:
        file.write('{"stage": "pri')
    assert len(read_samples(path)) == 4
    LogFiles(tmp_path, Point(("vae", "prior"), 1))
    assert [tuple(sample.values()) for sample in read_samples(path)] == said[:2]
    LogFiles(tmp_path, Point(("vae",), 500))
    assert path.read_bytes() == b""


def test_a_damaged_samples_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    LogFiles(tmp_path).text("vae", 1, "a", "two\nlines")
    with path.open("a") as file:
        file.write('{"stage": "vae", "step": 1, "title": "a"}\n')
    with pytest.raises(ColadaError, match=r"samples\.jsonl, line 2: text=None, expected a text"):
        read_samples(path)


# --- TensorBoard -------------------------------------------------------------------------------------


def events(directory: Path) -> Any:
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    found = module.EventAccumulator(str(directory))
    found.Reload()
    return found


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(directory)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]
    }


def test_tensorboard_reads_scalars_bins_and_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    monitor = TensorBoard(tmp_path)
    for one in HISTORY:
        monitor.log(one)
    monitor.log(record("prior", 60, flow=None, flow_by_t=None))
    monitor.text("prior", 40, "Once", "a\n**b**")
    monitor.close()
    assert scalars(tmp_path) == {
        "vae/nll": [(20, 3.5), (40, 2.5)],
        "vae/validation/nll": [(40, 2.75)],
        "prior/flow": [(20, 1.5), (40, 1.25)],
        "prior/flow_by_t/000-500": [(20, 1.0)],
        "prior/flow_by_t/500-1000": [(40, 0.5)],
    }
    found = events(tmp_path)
    (text,) = found.Tensors("prior/samples/Once/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (40, b"    a\n    **b**")
    assert found.Scalars("prior/flow")[0].wall_time == 1e9 + 20


def test_a_missing_tensorboard_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ColadaError, match=r'pip install "colada-lm\[tensorboard\]"$'):
        make_monitors(["tensorboard"], tmp_path, {})
    assert list(tmp_path.iterdir()) == []


# --- which monitors a run has --------------------------------------------------------------------------


def test_a_monitor_of_ones_own_is_told_everything(tmp_path: Path) -> None:
    recipe = {"seed": 3}
    monitors = make_monitors([f"{__name__}:Recorder", f"{__name__}:Recorder", "jsonl"], tmp_path, recipe)
    files, own = monitors.monitors
    assert isinstance(files, LogFiles)
    assert isinstance(own, Recorder)
    assert own.made_with == (tmp_path, recipe)
    monitors.log(HISTORY[0])
    monitors.text("prior", 40, "Once", "Once upon")
    monitors.close()
    assert own.told == [HISTORY[0], ("prior", 40, "Once", "Once upon"), "closed"]
    assert read_records(tmp_path / "metrics.jsonl") == HISTORY[:1]
    assert [tuple(one.values()) for one in read_samples(tmp_path / "samples.jsonl")] == [
        ("prior", 40, "Once", "Once upon")
    ]


def test_every_monitor_is_closed_whatever_another_does(tmp_path: Path) -> None:
    around = [Recorder(tmp_path, {}), Failing(tmp_path, {}), Recorder(tmp_path, {})]
    with pytest.raises(RuntimeError, match="no network"):
        Monitors(around).close()
    assert [monitor.told for monitor in around] == [["closed"], [], ["closed"]]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", r"unknown monitor 'tensorbord' \(did you mean 'tensorboard'\?\)"),
        ("no_such_package:Class", "cannot import 'no_such_package'"),
        (":Class", "cannot import ''"),
        (f"{__name__}:Recoder", r"has no class 'Recoder' \(did you mean 'Recorder'\?\)"),
        (f"{__name__}:", "has no class ''"),
        (f"{__name__}:NOT_A_CLASS", "has no class 'NOT_A_CLASS'"),
        (f"{__name__}:not_a_monitor", "a monitor has the methods log, text and close"),
    ],
)
def test_a_name_that_is_no_monitor_is_refused_before_anything_is_dropped(
    tmp_path: Path, name: str, said: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINES[0])
    with pytest.raises(ColadaError, match=said) as caught:
        make_monitors([name], tmp_path, {})
    assert repr(name) in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == LINES[0]


def test_ranks_that_do_not_write_have_no_monitors(tmp_path: Path) -> None:
    made = make_monitors([f"{__name__}:Recorder"], tmp_path, {}, None, False)
    made.log(HISTORY[0])
    made.close()
    assert made.monitors == ()
    assert list(tmp_path.iterdir()) == []


def test_what_is_built_in_is_a_monitor(tmp_path: Path) -> None:
    for made in (LogFiles(tmp_path), Monitors([])):
        assert isinstance(made, Monitor)
    assert isinstance(load_monitor(f"{__name__}:Recorder", tmp_path, {}), Recorder)
