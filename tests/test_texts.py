import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colada.cli.main import app
from colada.errors import ColadaError
from colada.evaluate.texts import read_texts, summarise
from colada.models.bound import TextScore


def test_texts_keep_their_order_and_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": " "}\n{"body": "three"}\n')
    found = read_texts([tmp_path / "a.jsonl"], "body")
    assert [text.text for text in found] == ["one", "three"]
    assert found[1].origin.endswith("a.jsonl:3")
    assert len(read_texts([tmp_path], "body", limit=1)) == 1


def test_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(ColadaError, match="no text"):
        read_texts([tmp_path])


def test_bytes_count_alike() -> None:
    scores = [TextScore(2, 4, -8 * math.log(2), {}), TextScore(4, 12, -8 * math.log(2), {})]
    found = summarise(scores, "exact")
    assert found["bits_per_byte"] == pytest.approx(1.0)
    assert found["standard_error"] == pytest.approx(math.sqrt((4**2 + 4**2) * 2) / 16)
    assert summarise(scores[:1], "exact")["standard_error"] is None


def test_the_command_says_that_it_is_a_bound(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "The dog ran home."}\n{"text": "A cat sat."}\n')
    out = tmp_path / "out.json"
    result = CliRunner().invoke(
        app, ["eval", "likelihood", str(tmp_path / "a.jsonl"), "--steps", "2", "-q", "--out", str(out)]
    )
    assert result.exit_code == 0
    assert "a bound" in result.stdout
    record = json.loads(out.read_text())
    total = -sum(own["log_likelihood"] for own in record["records"]) / math.log(2)
    assert record["bits_per_byte"] == pytest.approx(total / 27)
    assert record["kind"] == "bound"
