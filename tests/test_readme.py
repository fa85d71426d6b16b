"""What the README and the pages in docs/ show exists: commands parse, files are there, Python runs."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from colada.cli import main as cli
from colada.networks.config import DecoderConfig, DiTConfig, TextVAEConfig
from colada.train.kinds import KINDS
from test_house import SHELVES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "src/colada/bundled/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
NOT_ALONE = ("torchrun", "srun", "ssh")  # starts the command on many machines
EXTRAS = ("pyarrow", "matplotlib", "datasets", "tensorboard", "torchao", "lm_eval", "filelock", "yaml")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> Iterator[list[str]]:
    """The arguments of each ``colada`` command in a page's shell blocks."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;|\|", line.partition(" #")[0]):
                words = shlex.split(part.partition(">")[0], comments=True)
                if words[:1] == ["colada"]:
                    yield words[1:]


SHOWN = sorted({(page, shlex.join(args)) for page in PAGES for args in commands(page)})


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line with every command doing nothing: what is left is to understand the arguments."""
    tree = typer.main.get_command(cli.app)

    def idle(command: Any) -> None:
        command.callback = lambda **_: None
        for inner in getattr(command, "commands", {}).values():
            idle(inner)

    for command in tree.commands.values():  # type: ignore[attr-defined]
        idle(command)
    monkeypatch.setattr(typer.main, "get_command", lambda _: tree)
    return cli.main


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=" ".join)
def test_every_command_that_is_shown_is_one(
    parse: Any, capsys: pytest.CaptureFixture[str], page: str, command: str
) -> None:
    assert parse(shlex.split(command)) == 0, capsys.readouterr().err
    for recipe in re.findall(r"recipes/[\w/]+\.yaml", command):
        assert (ROOT / recipe).is_file(), recipe


def test_the_commands_are_found_at_all(parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SHOWN) > 25
    assert ("README.md", "train recipes/debug.yaml --data my-texts/ --out runs/first") in SHOWN
    assert parse(["generate", "--no-such-flag"]) == 2


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_readme_s_python_runs_with_what_a_plain_install_brings(tmp_path: Path) -> None:
    """The first block, without the packages of any extra, in an empty directory."""
    first, second = blocks("README.md", "python")
    hidden = f"import sys\nfor name in {EXTRAS}: sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", hidden + first], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once") or done.stdout.strip().endswith("length")
    assert (tmp_path / "my-model" / "cola_dit").is_dir()
    assert "push_to_hub" in second, "the block that needs a network"


def test_what_the_readme_shows_before_it_names_an_extra_needs_none() -> None:
    """In one process, in which no package of an extra can be imported."""
    commands = [
        ["info"],
        ["tokenizer", "encode", "Once upon a time"],
        ["generate", "Once upon a time", "-n", "4", "--steps", "1"],
        ["reconstruct", "The sun was warm."],
    ]
    hidden = f"import sys\nfor name in {EXTRAS}: sys.modules[name] = None\n"
    code = hidden + f"from colada.cli.main import main\nfor args in {commands}: print(args, main(args))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for args in commands:
        assert f"{args} 0" in done.stdout.splitlines()


def test_the_first_screen_has_the_two_commands() -> None:
    """And .ci/run finds the one that tests."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    install = 'pip install -c constraints.txt . && colada generate "Once upon a time"'
    test = 'pip install -c constraints.txt -e ".[dev]" && pytest'
    assert text.count(f"\n{install}\n") == text.count(f"\n{test}\n") == 1
    assert text.index(test) < 3000
    assert len(re.findall(r"^pip install .* && pytest.*$", text, re.MULTILINE)) == 1


def test_the_stated_limits_are_those_that_hold() -> None:
    rows = re.findall(
        r"^\| .* \| ([\d,]+) \| `([\w.]+)` \|$", (ROOT / "docs/limits.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 10
    for stated, constant in rows:
        module, _, name = constant.rpartition(".")
        assert getattr(importlib.import_module(f"colada.{module}"), name) == int(stated.replace(",", "")), (
            constant
        )


def test_every_kind_of_stage_is_in_the_table_of_kinds() -> None:
    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = text.partition("| kind | learns |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", "".join(first_cells))) == sorted(KINDS)


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_are_run_from_a_clone_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"python -m ((?:benchmarks|experiments)(?:\.\w+)*)", text):
        path = ROOT.joinpath(*name.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def resolves(name: str) -> bool:
    """Whether ``module.Class.attribute`` of the package exists; an annotation is an attribute."""
    parts = name.split(".")
    module = max((n for n in range(1, len(parts) + 1) if exists(parts[:n])), default=0)
    thing: Any = importlib.import_module(".".join(["colada", *parts[:module]])) if parts[module:] else None
    for part in parts[module:]:
        if not hasattr(thing, part):
            return module > 0 and part in getattr(thing, "__annotations__", {})
        thing = getattr(thing, part)
    return module > 0


def exists(parts: list[str]) -> bool:
    """Whether a module or folder of the package is there; not every one can be imported without its extra."""
    path = ROOT.joinpath("src", "colada", *parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_everything_the_architecture_names_exists() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z_]+(?:\.\w+)+)(?:\(\))?`", text))
    names = {name for name in names if not name.endswith((".json", ".safetensors"))}
    assert len(names) > 60
    assert [name for name in sorted(names) if not resolves(name)] == []


def test_the_architecture_lists_the_shelves_in_their_order() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Shelves")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `?(\w*)`? ?\| .* \| `\w", section, re.MULTILINE) == SHELVES


def test_the_architecture_has_every_key_beyond_the_released_ones() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for name, config in (("DiT", DiTConfig), ("Text VAE", TextVAEConfig), ("decoder", DecoderConfig)):
        for field in dataclasses.fields(config):
            if field.metadata:
                assert f"| `{field.name}` | {name} | {field.metadata['meaning']} |" in text
