"""Tokenizers that look back, the hub, and long texts and prompts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

import colada
from colada.cli.main import main
from colada.errors import ColadaWarning
from colada.models.autoregressive import AutoregressiveLM
from colada.models.base import LanguageModel
from colada.models.cola import ColaDLM
from colada.models.likelihood import measure
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import Transcript
from faults import TEXTS, decoder, refused
from helpers import tiny_model

# --- B14: tokenizers whose decoders look at what stands before -----------------------------------


def wrapped(tokens: list[str], decoder: Any) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", "<|pad|>", *tokens])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    inner.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", "<|pad|>")])
    inner.decoder = decoder
    return Tokenizer(inner)


BYTES = [f"<0x{byte:02X}>" for byte in "é🙂€a".encode()]
TOKENIZERS: dict[str, Tokenizer] = {
    "metaspace": wrapped(["▁the", "▁fox", "es", "▁", ".", "é"], decoders.Metaspace()),
    "strip": wrapped(
        ["▁the", "▁fox", "es", "▁", ".", *dict.fromkeys(BYTES)],
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        ),
    ),
    "wordpiece": wrapped(["the", "fox", "##es", ".", "don", "'", "t"], decoders.WordPiece()),
    "suffix": wrapped(["the</w>", "fox", "es</w>", ".</w>", "f"], decoders.BPEDecoder()),
    "bytes": Tokenizer.train(TEXTS, 290),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("seed", range(4))
def test_b14_text_in_blocks_reads_as_the_whole_does(kind: str, seed: int) -> None:
    tokenizer, generator = TOKENIZERS[kind], np.random.default_rng(seed)
    for _ in range(60):
        first = 2 if kind != "bytes" else 0
        ids = generator.integers(first, tokenizer.vocab_size, generator.integers(1, 24)).tolist()
        split = int(generator.integers(0, len(ids)))
        before, after = ids[:split], ids[split:]
        transcript = Transcript(tokenizer, 0, len(after), (), (), before)
        pieces: list[str] = []
        while after:
            size = int(generator.integers(1, 6))
            pieces.append(transcript.add(after[:size])[0])
            after = after[size:]
        whole = tokenizer.decode(ids)
        prefix = tokenizer.decode(before)
        assert "".join(pieces) == transcript.text
        if not prefix.endswith("\ufffd") and whole.startswith(prefix):
            assert prefix + transcript.text == whole, ids


def test_b14_the_first_words_space_is_shown_after_a_prompt() -> None:
    tokenizer = TOKENIZERS["metaspace"]
    the, fox = (tokenizer.id_of(token) for token in ("▁the", "▁fox"))
    assert the is not None
    assert fox is not None
    assert tokenizer.decode([fox]) == "fox"
    transcript = Transcript(tokenizer, 0, 9, (), (), [the])
    assert [transcript.add([own])[0] for own in (fox, the)] == [" fox", " the"]
    assert Transcript(tokenizer, 0, 9, (), ()).add([fox])[0] == "fox"


# --- B16: a quantised model ------------------------------------------------------------------------


def test_b16_a_quantised_model_is_measured_or_refused_in_one_line() -> None:
    pytest.importorskip("torchao")
    model = tiny_model().quantise("int8")
    score = measure(model, [[1, 2, 3, 4, 5]], steps=2)[0]
    exact = measure(tiny_model(), [[1, 2, 3, 4, 5]], steps=2)[0]
    assert abs(score.log_likelihood - exact.log_likelihood) < 0.05 * abs(exact.log_likelihood)


# --- D6, the hub -----------------------------------------------------------------------------------


class Hub:
    """A stand-in for the hub: repositories in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[tuple[str, Any]] = []

    def api(self, token: str | None = None) -> Any:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create", (repo_id, private)))

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", branch))

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str
    ) -> Any:
        import shutil

        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, name: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        return str(self.root / name)


@pytest.mark.parametrize("kind", ["cola", "ar"])
def test_a_model_pushed_to_the_hub_is_loaded_by_its_id(
    kind: str, speaker: ColaDLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", hub.api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    monkeypatch.chdir(tmp_path / "..")
    model: LanguageModel = speaker if kind == "cola" else AutoregressiveLM(decoder("ar"))
    prompts = ["The fox"] if kind == "cola" else [[1, 2]]
    url = model.push_to_hub("someone/mine", private=True, revision="v1", token="secret")
    assert url == "https://hub/someone/mine/commit/1"
    assert hub.calls == [("token", "secret"), ("create", ("someone/mine", True)), ("branch", "v1")]
    loaded = colada.load("someone/mine")
    assert loaded.generate(prompts, 6) == model.generate(prompts, 6)


def test_a_hub_that_refuses_is_one_line(speaker: ColaDLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def api(token: str | None = None) -> Any:
        raise RuntimeError("401\nUnauthorised")

    monkeypatch.setattr("huggingface_hub.HfApi", api)
    said = refused(lambda: speaker.push_to_hub("someone/mine"))
    assert said == "someone/mine cannot be written to the hub: 401 Unauthorised"


def test_d6_the_hubs_library_is_imported_for_hub_ids_alone() -> None:
    code = (
        "import colada, sys; colada.load().generate('x', 4, steps=1); exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_d8_a_stop_string_costs_its_length_once() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("The fox saw the owl, and the ")
    reads: list[int] = []

    class Counted(str):
        def __getitem__(self, key: Any) -> str:
            reads.append(1)
            return super().__getitem__(key)

    costs = []
    for length in (200, 4000):
        transcript = Transcript(tokenizer, 0, 10**4, [Counted("The fox" + "x" * length)], ())
        reads.clear()
        for _ in range(50):
            transcript.add(ids)
        costs.append(len(reads))
    # Twenty times the length, and no more work: two looks a character at most, on average.
    assert costs[0] == costs[1] <= 3 * 50 * len(tokenizer.decode(ids))


def test_d8_a_long_generation_decodes_each_token_a_few_times() -> None:
    tokenizer = TOKENIZERS["bytes"]
    ids = tokenizer.encode("The fox saw the owl, and the ")
    decoded: list[int] = []

    class Counting:
        bytes_at_end = staticmethod(lambda ids: 0)

        def decode(self, own: list[int], skip_special: bool = True) -> str:
            decoded.append(len(own))
            return tokenizer.decode(own)

    transcript = Transcript(Counting(), 0, 10**5, ["nowhere"], ())  # type: ignore[arg-type]
    for _ in range(400):
        transcript.add(ids)
    assert transcript.text == tokenizer.decode(ids * 400)
    assert sum(decoded) < 400 * 6 * (len(ids) + 8)


# --- a prompt longer than the training rows ---------------------------------------------------------


@pytest.mark.parametrize("arch", ["cola", "ar"])
def test_a_prompt_longer_than_the_training_rows_is_noted_once(
    arch: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model: LanguageModel = tiny_model() if arch == "cola" else AutoregressiveLM(decoder(arch))
    model.save(tmp_path / "unknown")
    folder = "cola_dit" if arch == "cola" else "decoder"
    assert "training_length" not in (tmp_path / "unknown" / folder / "config.json").read_text()
    model.generate([[1] * 30], 2)
    assert not recwarn
    model.training_length = 8
    model.save(tmp_path / "model")
    loaded = colada.load(tmp_path / "model")
    loaded.generate([[1] * 8], 2)
    assert not recwarn
    for _ in range(2):
        loaded.generate([[1] * 9, [1] * 10], 2)
    (note,) = recwarn
    assert note.category is ColadaWarning
    assert "a prompt of 9 tokens" in str(note.message)
    assert "rows of 8 tokens" in str(note.message)


@pytest.mark.filterwarnings("default::colada.errors.ColadaWarning")
def test_the_command_line_shows_it_as_a_note(
    speaker: ColaDLM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speaker, "training_length", 4)
    speaker.save(tmp_path / "model")
    speaker.training_length = None
    assert main(["generate", "The fox saw the owl", "-n", "4", "-m", str(tmp_path / "model")]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: a prompt of ")
    assert len(captured.err.splitlines()) == 1
