"""The command line: what commands print, how they stream, and how they fail."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import colada
from colada.cli.info import count_parameters, describe
from colada.cli.terminal import row_end
from colada.flow import SCHEDULES, SOLVERS
from colada.generate.engine.engine import cache_bytes
from colada.generate.noise import NOISE_RULES, Noise, sample_noise
from colada.models.cola import ColaDLM
from colada.networks.layers import KVCache
from colada.text.tokenizer import Tokenizer
from colada.text.transcript import sentence_end
from commands import command_line, main
from helpers import SENTENCE, tiny_dit, tiny_vae, writing_model

COMMANDS = [
    [],
    ["generate"],
    ["reconstruct"],
    ["info"],
    ["parity"],
    ["train"],
    ["tokenizer"],
    ["tokenizer", "train"],
    ["tokenizer", "encode"],
    ["tokenizer", "decode"],
    ["bench"],
    ["bench", "speed"],
    ["bench", "levers"],
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes letters and spaces, and never ends by itself."""
    directory = tmp_path_factory.mktemp("cli") / "model"
    writing_model(generation={"steps": 3, "guidance": 2.0}).save(directory)
    return directory


@pytest.fixture(scope="module")
def model(saved: Path) -> ColaDLM:
    return colada.load(saved)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line in this process, with these bytes on standard input."""

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main([str(arg) for arg in args])
        return Result(code, *capsys.readouterr())

    return run


# --- generate ----------------------------------------------------------------------------------


def test_piped_text_is_what_the_library_generates(run: Run, saved: Path, model: ColaDLM) -> None:
    result = run("generate", "Once upon", "-m", saved, "-n", 21, "--seed", 5, "--temperature", 1)
    (completion,) = model.generate("Once upon", 21, seed=5, temperature=1.0)
    assert result == Result(0, f"Once upon{completion.text}\n", "")


def test_same_seed_same_text_and_streaming_or_not(run: Run, saved: Path) -> None:
    command = ["generate", "The", "-m", saved, "-n", 12, "--temperature", 1]
    first = run(*command)
    assert run(*command).out == first.out
    assert run(*command, "--no-stream").out == first.out
    assert run(*command, "--seed", 1).out != first.out


def test_json_has_everything_needed_to_repeat_it(run: Run, saved: Path, model: ColaDLM) -> None:
    result = run(
        "generate", "The", "-m", saved, "-n", 9, "--steps", 2, "--stop", "zzz", "--json", "--seed", 7
    )
    (completion,) = model.generate("The", 9, steps=2, seed=7)
    (record,) = result.records
    assert list(record) == ["prompt", "text", "tokens", "finish_reason", "seed", "settings"]
    assert record["prompt"] == "The"
    assert (record["text"], record["tokens"]) == (completion.text, list(completion.tokens))
    assert (record["finish_reason"], record["seed"]) == ("length", 7)
    settings = record["settings"]
    assert isinstance(settings, dict)
    assert settings["steps"] == 2
    assert settings["guidance"] == 2.0, "the model's own"
    assert settings["stop"] == ["zzz"]
    assert settings["max_new_tokens"] == 9


def test_stop_strings_repeat(run: Run, saved: Path, model: ColaDLM) -> None:
    text = model.generate("The", 24)[0].text
    result = run("generate", "The", "-m", saved, "-n", 24, "--stop", "zzz", "--stop", text[5:8])
    assert result.out == f"The{text[: text.index(text[5:8])]}\n"


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_a_file_of_prompts_in_order_with_consecutive_seeds(
    run: Run, saved: Path, model: ColaDLM, tmp_path: Path, batch: int
) -> None:
    prompts = ["Once", "The cat sat on the mat", "moon"]
    file = tmp_path / "prompts.txt"
    file.write_text("Once\n\nThe cat sat on the mat\r\n  \nmoon", encoding="utf-8")
    command = ["generate", "-f", file, "-m", saved, "-n", 6, "--seed", 3, "--batch", batch]
    completions = model.generate(prompts, 6, seed=3)
    texts = [prompt + completion.text for prompt, completion in zip(prompts, completions, strict=True)]
    assert run(*command).out == "\n\n".join(texts) + "\n"
    records = run(*command, "--json").records
    assert [record["prompt"] for record in records] == prompts
    assert [record["seed"] for record in records] == [3, 4, 5]
    assert [record["text"] for record in records] == [completion.text for completion in completions]


def test_released_noise_has_the_released_seeds(run: Run, saved: Path, model: ColaDLM) -> None:
    result = run("generate", "--lines", "-m", saved, "-n", 4, "--noise", "released", "--json", stdin=b"a\nb")
    assert [record["seed"] for record in result.records] == [0, 1000]
    texts = [completion.text for completion in model.generate(["a", "b"], 4, noise="released")]
    assert [record["text"] for record in result.records] == texts


@pytest.mark.parametrize(
    ("args", "stdin", "prompts"),
    [
        ([], "One\nTwo é\n", ["One\nTwo é"]),
        (["-"], "One\r\n", ["One"]),
        (["--lines"], "One\nTwo\n", ["One", "Two"]),
        (["--file", "-"], "One\n\nTwo", ["One", "Two"]),
        ([""], "ignored", [""]),
    ],
)
def test_where_prompts_come_from(
    run: Run, saved: Path, args: list[str], stdin: str, prompts: list[str]
) -> None:
    result = run("generate", *args, "-m", saved, "-n", 1, "--json", stdin=stdin.encode())
    assert [record["prompt"] for record in result.records] == prompts


def test_a_chat_is_the_answer_to_the_rendered_message(run: Run, saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved, directory)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (directory / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    model = colada.load(directory)
    settings = {"seed": 5, "temperature": 1.0, "repetition_penalty": 1.5}
    (expected,) = model.generate("user: Once\nassistant:", 21, **settings)
    assert model.chat([{"role": "user", "content": "Once"}], 21, **settings) == expected
    command = ["generate", "-m", directory, "-n", 21, "--chat", "--seed", 5, "--temperature", 1]
    command += ["--repetition-penalty", 1.5]
    assert run(*command, "Once") == Result(0, f"{expected.text}\n", "")
    (tmp_path / "asked.txt").write_text("Once\nmoon\n")
    records = run(*command, "--file", tmp_path / "asked.txt", "--json").records
    assert [record["prompt"] for record in records] == ["Once", "moon"]
    asked = [f"user: {text}\nassistant:" for text in ("Once", "moon")]
    texts = [done.text for done in model.generate(asked, 21, **settings)]
    assert [record["text"] for record in records] == texts
    printed = run(*command, "--file", tmp_path / "asked.txt")
    assert printed.out == "\n\n".join(texts) + "\n"


def test_dtype_converts(run: Run, saved: Path) -> None:
    assert run("generate", "The", "-m", saved, "-n", 2, "--dtype", "bfloat16").code == 0


# --- on a terminal -----------------------------------------------------------------------------


class Screen:
    """The little of a terminal that streaming uses; keeps what scrolls away, refuses the impossible."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.cursor_visible = True

    def feed(self, output: str) -> None:
        for control, character in re.findall(r"(\x1b\[[?\d;]*[A-Za-z])|([\s\S])", output):
            if control:
                self._control(control)
            elif character == "\r":
                self.column = 0
            elif character == "\n":
                self.row += 1
                if self.row == len(self.rows):
                    self.rows.append([])
            else:
                assert unicodedata.category(character) != "Cc", "a raw control character"
                assert self.column < self.width, "a row runs over the edge"
                row = self.rows[self.row]
                row.extend(" " * (self.column + 1 - len(row)))
                row[self.column] = character
                self.column += 1

    def _control(self, control: str) -> None:
        if control.endswith("A"):
            self.row -= int(control[2:-1])
            assert self.row >= max(0, len(self.rows) - self.height), "up to a row that has scrolled away"
        elif control == "\x1b[2K":
            self.rows[self.row] = []
        elif control in ("\x1b[?25l", "\x1b[?25h"):
            self.cursor_visible = control.endswith("h")
        else:
            assert control.endswith("m"), control

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n")


def run_in_terminal(args: list[object], width: int, height: int) -> tuple[Screen, str]:
    """Run ``python -m colada`` under a pseudo terminal; return the screen it leaves and all it wrote."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    }
    process = subprocess.Popen(
        command_line(list(map(str, args))),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**environment, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(follower)
    output = b""
    try:
        while part := os.read(leader, 65536):
            output += part
    except OSError:
        pass  # How Linux reports that the other side is closed.
    finally:
        os.close(leader)
    assert process.wait(timeout=60) == 0, output
    screen = Screen(width, height)
    screen.feed(output.decode())
    return screen, output.decode()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (30, 5)])
def test_a_terminal_sees_the_text_form_and_keeps_all_of_it(
    saved: Path, model: ColaDLM, width: int, height: int
) -> None:
    prompt = "Once upon a time\tthere was\x1b[2J a cat\n\nthat sat"
    arguments: list[object] = ["generate", prompt, "-m", saved, "-n", 150, "--temperature", 1]
    screen, output = run_in_terminal(arguments, width, height)
    whole = prompt + model.generate(prompt, 150, temperature=1.0)[0].text
    whole += "stopped at 150 tokens"
    # A row may also end within a word that is longer than it.
    assert "".join(screen.text.split()) == "".join(whole.replace("\x1b", "␛").split())
    assert len(screen.rows) > 5, "in a terminal of 5 rows, some have scrolled away"
    assert screen.cursor_visible
    assert re.search(r"block 2 · step 3/3 · \d+ tokens", output)
    assert "step" not in screen.text


def test_no_stream_on_a_terminal_is_plain(saved: Path) -> None:
    _, output = run_in_terminal(["generate", "The", "-m", saved, "-n", 8, "--no-stream"], 80, 24)
    assert "\x1b" not in output


def test_rows_end_at_spaces_or_the_edge() -> None:
    assert row_end("one two", 7) == 7
    assert row_end("one two   ", 7) == 10, "spaces hang over the edge"
    assert row_end("one two three", 7) == 8
    assert row_end("one two three", 6) == 4
    assert row_end("abcdefgh", 3) == 3
    assert row_end("日本語", 5) == 2, "wide characters take two cells"
    assert row_end("日本", 1) == 1
    assert row_end("", 5) == 0


# --- the other commands ------------------------------------------------------------------------


def test_reconstruct(run: Run, saved: Path, model: ColaDLM) -> None:
    back = model.reconstruct("The cat sat")
    result = run("reconstruct", "The cat sat", "-m", saved)
    assert result.code == 0
    assert result.out.startswith(f"{back.text}\naccuracy {back.accuracy:.1%}")
    (record,) = run("reconstruct", "-m", saved, "--json", stdin=b"The cat sat\n").records
    assert record["text"] == "The cat sat"
    assert record["reconstruction"] == back.text
    assert record["accuracy"] == back.accuracy


def test_info_counts_every_parameter(run: Run, saved: Path, model: ColaDLM) -> None:
    total = sum(parameter.numel() for part in (model.vae, model.dit) for parameter in part.parameters())
    result = run("info", saved, "--json")
    values = json.loads(result.out)
    parts = values["parameters"]
    assert parts.pop("total") == total == sum(parts.values())
    assert parts == count_parameters(vae=model.vae, dit=model.dit)
    assert parts["Text VAE encoder"] == sum(p.numel() for p in model.vae.encoder.parameters())
    assert parts["DiT attention"] == sum(
        p.numel() for block in model.dit.blocks for p in block.msa.parameters()
    )
    assert all(parts.values())
    assert values["weight_bytes"] == {"float32": 4 * total, "bfloat16": 2 * total, "float16": 2 * total}
    assert values["stored_dtypes"] == ["F32"]
    assert values["generation"]["steps"] == 3
    assert values["tokenizer"]["entries"] == 300
    assert values["cola_dit"] == model.dit.config.to_dict()
    weights = saved / "cola_vae" / "model.safetensors"
    assert values["files"]["cola_vae/model.safetensors"] == weights.stat().st_size


@pytest.mark.parametrize("patch", [1, 2])
def test_cache_size_is_what_a_generation_holds(patch: int) -> None:
    vae, dit = tiny_vae(0), tiny_dit(1, patch_size=patch)
    latents, cache, decoder = torch.zeros(8, 8), KVCache(), KVCache()
    dit(latents, torch.zeros(()), dit.layout([8], [cache]), [cache], appending=True)
    vae.decode(latents, [8], [decoder])
    held = sum(x.numel() for own in (cache, decoder) for pair in own.layers for x in pair)
    assert 4 * held == cache_bytes(vae, dit, 8)


def test_info_reads_when_piped(run: Run, saved: Path) -> None:
    result = run("info", saved)
    total = describe(saved)["parameters"]["total"]
    assert result.code == 0
    assert f"{total:,}" in result.out
    assert str(saved) in result.out.replace("\n", "")
    assert "\x1b" not in result.out
    assert re.search(r"float32 .*B\n", result.out)


def test_parity_reports_every_case(run: Run, parity_cases: list[Path]) -> None:
    result = run("parity", *parity_cases)
    assert result.code == 0
    assert [record["ok"] for record in result.records] == [True] * len(parity_cases)
    assert run("parity", *parity_cases, "--tolerance", 0).code == 1


def test_tokenizer_there_and_back(run: Run, saved: Path, tmp_path: Path) -> None:
    text, file, corpus = "The cat é <|endoftext|>\nsat", tmp_path / "own.json", tmp_path / "corpus.txt"
    corpus.write_text(SENTENCE * 20, encoding="utf-8")
    result = run("tokenizer", "train", corpus, "--vocab-size", 280, "--out", file)
    assert result.code == 0
    assert Tokenizer.from_file(file).vocab_size == 280
    for where in (["--file", file], ["--model", saved]):
        (record,) = run("tokenizer", "encode", text, *where, "--json").records
        ids, pieces = record["ids"], record["pieces"]
        assert isinstance(ids, list)
        assert isinstance(pieces, list)
        assert len(ids) == len(pieces)
        assert "<|endoftext|>" in pieces
        assert run("tokenizer", "decode", *ids, *where).out == text + "\n"
        lines = run("tokenizer", "encode", text, *where).out.splitlines()
        assert [int(line.split()[0]) for line in lines] == ids


@pytest.mark.slow
def test_train_says_how_to_try_the_model(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    corpus, recipe, out = tmp_path / "corpus.jsonl", tmp_path / "small.yaml", tmp_path / "out"
    rows = [{"text": f"{SENTENCE} {n}", "split": "validation" if n % 5 == 0 else "train"} for n in range(40)]
    corpus.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    recipe.write_text(
        """
        data: {sources: [{path: nowhere}]}
        tokenizer: {vocab_size: 280}
        model:
          vae: {dim: 16, ffn_dim: 32, latent_dim: 4, num_heads: 2, decoder_num_blocks: 1}
          dit: {txt_dim: 16, emb_dim: 16, heads: 2, head_dim: 8, rope_dim: 4, num_layers: 1}
        stages:
          vae: {steps: 9, batch: 2, length: 16, warmup: 1}
          prior: {steps: 2, batch: 2, length: 16, warmup: 1}
        run: {validation_rows: 2, sample_every: 0, device: cpu, sample_prompts: ["The cat's mat"]}
        """,
        encoding="utf-8",
    )
    command = ["train", recipe, "--out", out, "--data", corpus, "--set", "stages.vae.steps=2"]
    result = run(*command)
    assert result.code == 0
    assert "prior step 2" in result.err
    last = result.out.splitlines()[-1]
    assert last == f"""colada generate --model {out / "model"} 'The cat'"'"'s mat'"""
    assert run("generate", "x", "--model", out / "model", "-n", 1).code == 0
    assert run(*command, "--quiet").err == ""
    changed = run(*command, "--set", "stages.vae.steps=3")
    assert changed.code == 2
    assert "stages.vae.steps was 2 and is now 3" in changed.err
    # What there is to do with a run afterwards.
    assert (out / "report" / "report.html").is_file()
    assert run("report", out).out == f"wrote {out / 'report' / 'report.html'}\n"
    checkpoint = out / "checkpoints" / "prior-00000002"
    exported = run("export", checkpoint, tmp_path / "exported")
    assert exported.out == f"wrote {tmp_path / 'exported'}: stage prior, step 2\n"
    assert run("generate", "x", "--model", tmp_path / "exported", "-n", 1).code == 0
    assert run("export", out, tmp_path / "no").code == 2
    assert run("report", tmp_path).code == 2
    again = run(*command, "--resume", "77")
    assert again.code == 2
    assert "no checkpoint '77', expected a step, a directory or one of: " in again.err


def test_a_dry_run_plans_and_trains_nothing(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    recipe = Path(__file__).parents[1] / "recipes" / "debug.yaml"
    command = ["train", recipe, "--out", tmp_path / "run", "--dry-run"]
    lines = run(*command).out.splitlines()
    assert not (tmp_path / "run").exists()
    text = "\n".join(lines)
    for words in ("parameters", "memory per rank", "tokens per step", "FLOPs per step"):
        assert words in text
    assert max(map(len, lines)) <= 80
    plan = json.loads(run(*command, "--json").out)
    assert plan["tokens"] == (120 + 400) * 16 * 64
    assert [phase["steps"] for phase in plan["phases"]] == [120, 400]
    many = json.loads(run(*command, "--json", "--ranks", 4).out)
    assert many["flops"] == plan["flops"]
    assert (
        many["phases"][0]["memory_per_rank"]["weights"] == plan["phases"][0]["memory_per_rank"]["weights"] / 4
    )


def test_the_recipe_command_prints_a_recipe(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    printed = run("recipe", "--set", "seed=3").out
    assert "\nseed: 3\n" in printed
    (tmp_path / "own.yaml").write_text(printed)
    assert run("recipe", tmp_path / "own.yaml").out == printed


# --- failing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["generate", "x", "-m", "/no/where"], "'/no/where'"),
        (["generate", "x", "-m", "MODEL", "--revision", "main"], "'main'"),
        (["generate", "x", "-m", "MODEL", "--steps", "0"], "steps=0"),
        (["generate", "x", "-m", "MODEL", "--steps", "many"], "many"),
        (["generate", "x", "-m", "MODEL", "-n", "0"], "max_new_tokens=0"),
        (["generate", "x", "-m", "MODEL", "--temperature", "-1"], "temperature=-1"),
        (["generate", "x", "-m", "MODEL", "--top-k", "-1"], "top_k=-1"),
        (["generate", "x", "-m", "MODEL", "--top-p", "2"], "top_p=2"),
        (["generate", "x", "-m", "MODEL", "--repetition-penalty", "0"], "repetition_penalty=0"),
        (["generate", "x", "-m", "MODEL", "--guidance", "nan"], "guidance=nan"),
        (["generate", "x", "-m", "MODEL", "--seed", "-2"], "seed=-2"),
        (["generate", "x", "-m", "MODEL", "--stop", ""], "stop=''"),
        (["generate", "x", "-m", "MODEL", "--solver", "eular"], "'eular'"),
        (["generate", "x", "-m", "MODEL", "--schedule", "log"], "'log'"),
        (["generate", "x", "-m", "MODEL", "--noise", "loud"], "'loud'"),
        (["generate", "x", "-m", "MODEL", "--dtype", "int8"], "'int8'"),
        (["generate", "x", "-m", "MODEL", "--device", "tpu9"], "'tpu9'"),
        (["generate", "x", "-m", "MODEL", "--batch", "0"], "batch=0"),
        (["generate", "x", "-m", "MODEL", "--chat"], "has no chat template (chat_template.jinja), which"),
        (["generate", "-m", "MODEL"], "standard input is empty"),
        (["generate", "--lines", "-m", "MODEL"], "standard input is empty"),
        (["generate", "x", "--file", "prompts.txt"], "prompts.txt"),
        (["generate", "x", "--lines"], "--lines"),
        (["generate", "--file", "/no/file"], "/no/file"),
        (["generate", "--file", "/"], "/"),
        (["generate", "a \udcff b", "-m", "MODEL"], r"'\udcff'"),
        (["generate", "--nonsense"], "--nonsense"),
        (["conjure"], "'conjure'"),
        (["tokenizer"], "command"),
        (["reconstruct", "", "-m", "MODEL"], "nothing to reconstruct"),
        (["info", "/no/where"], "'/no/where'"),
        (["parity", "/no/case"], "/no/case"),
        (["train", "/no/recipe.yaml"], "/no/recipe.yaml"),
        (["tokenizer", "train", "/no/text", "--vocab-size", "300"], "/no/text"),
        (["tokenizer", "encode", "x", "--file", "/no/t.json"], "/no/t.json"),
        (["tokenizer", "encode", "x", "--file", "t.json", "--model", "m"], "--model m"),
        (["tokenizer", "decode", "300", "-m", "MODEL"], "id 300"),
        (["tokenizer", "decode", "x", "-m", "MODEL"], "x"),
    ],
)
def test_errors_are_one_line_that_names_the_value(run: Run, saved: Path, args: list[str], named: str) -> None:
    result = run(*[str(saved) if arg == "MODEL" else arg for arg in args])
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", result.err)
    assert named in result.err


def test_input_that_is_not_utf8_is_refused(run: Run) -> None:
    result = run("generate", stdin=b"abc\xff")
    assert result.code == 2
    reason = "byte 0xff at offset 3 is not UTF-8 (invalid start byte), expected UTF-8 text"
    assert result.err == f"error: standard input: {reason}\n"


def test_a_terminal_without_a_prompt_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed later"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["generate"]) == 2
    assert capsys.readouterr().err.startswith("error: no text: give one")


def test_truncated_weights_are_named(run: Run, saved: Path, tmp_path: Path) -> None:
    for part in ("cola_dit", "cola_vae"):
        (tmp_path / part).mkdir()
        for file in (saved / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes()[:500])
    (tmp_path / "cola_vae" / "config.json").write_bytes((saved / "cola_vae" / "config.json").read_bytes())
    for command in (["info", tmp_path], ["generate", "x", "-m", tmp_path]):
        result = run(*command)
        assert result.code == 2
        assert "truncated" in result.err


def test_a_text_may_end_with_its_last_whole_sentence(run: Run, saved: Path) -> None:
    texts = {}
    for form in ([], ["--whole-sentences"], ["--exact-length"]):
        result = run("generate", "abc", "-m", saved, "-n", 150, "--temperature", 1, "--json", *form)
        texts[tuple(form)] = json.loads(result.out)
    exact, whole = texts[()], texts[("--whole-sentences",)]
    assert texts[("--exact-length",)]["text"] == exact["text"]
    assert whole["text"] == exact["text"][: sentence_end(exact["text"], complete=True) or None]
    assert whole["finish_reason"] == exact["finish_reason"] == "length"
    assert whole["settings"]["whole_sentences"]


@pytest.mark.parametrize("form", [["--json"], ["--no-stream"]])
def test_a_prompt_that_fails_loses_nothing_of_the_others(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: list[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe dog\nOne day\n")
    arguments = ["generate", "--file", prompts, "--lines", "-n", "8", "--steps", "2", "--batch", "2", *form]
    whole = run(*arguments)
    assert whole.code == 0

    def noise(seed: int, shape: tuple[int, int], device: torch.device) -> Noise:
        draw = sample_noise(seed, shape, device)
        return lambda block, k: draw(block, k) * (torch.nan if (seed, block) == (1, 1) else 1)

    monkeypatch.setitem(NOISE_RULES, "per-sample", noise)
    result = run(*arguments)
    assert result.code == 2
    assert "error: 1 of 3 prompts failed, first number 1: block 1 of a request" in result.err
    if form == ["--json"]:
        before, after = ([json.loads(line) for line in own.out.splitlines()] for own in (whole, result))
        assert [after[0], after[2]] == [before[0], before[2]]
        assert "not finite" in after[1]["error"]
    else:
        assert result.out.startswith(whole.out[: whole.out.index("The dog")])
        assert result.out.endswith(whole.out[whole.out.index("One day") :])


def test_one_streamed_prompt_that_fails_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOISE_RULES, "per-sample", lambda *_: lambda *_: torch.full((4, 64), torch.nan))
    result = run("generate", "Once upon a time", "-n", "8", "--steps", "2")
    assert result.code == 2
    assert result.out.startswith("Once upon a time")
    assert "latents that are not finite" in result.err


def test_an_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("colada.cli.info.describe", interrupt)
    result = run("info")
    assert result.code == 130
    assert result == Result(130, "", "interrupted\n")


def test_a_missing_extra_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n")
    for name in [name for name in sys.modules if name.startswith("colada.train.")]:
        monkeypatch.delitem(sys.modules, name)

    class NoYaml:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "yaml":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, "yaml", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoYaml(), *sys.meta_path])
    result = run("train", recipe)
    assert result.code == 2
    assert re.fullmatch(r'error: .* needs .*: pip install "colada-lm\[train\]"\n', result.err)


@pytest.mark.skipif(os.name == "nt", reason="pipes of a POSIX shell")
def test_a_reader_that_leaves_is_no_error(saved: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "colada", "generate", "The", "-m", str(saved), "-n", "40"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.code == 0
    assert "Usage:" in result.out


def test_help_names_every_choice(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = run("generate", "--help").out
    for name in [*SOLVERS, *SCHEDULES, *NOISE_RULES]:
        assert name in text


def test_version_and_bare_command(run: Run) -> None:
    assert run("--version") == Result(0, f"colada {colada.__version__}\n", "")
    bare = run()
    assert bare.code == 0
    assert "generate" in bare.out


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from colada.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_harness_is_an_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    monkeypatch.delitem(sys.modules, "colada.evaluate.harness", raising=False)
    assert main(["eval", "harness", "--tasks", "x"]) == 2
    assert (
        capsys.readouterr().err.strip() == "error: eval harness needs lm_eval: pip install 'colada-lm[eval]'"
    )
