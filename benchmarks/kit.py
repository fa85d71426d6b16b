"""What benchmarks/gather.py gathers, and where recipes find it on the machine that it was carried to."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from colada.train.recipe import load_recipe

KIT_TIME = 10**9  # The modification time of a kit's corpora, by which prepared shards know them.


def place_in(corpora: Path, path: str | Path) -> Path:
    """Return where in a folder of corpora a source's files are: its one file, or the folder itself."""
    return corpora / (Path(path).name if Path(path).suffix else "")


def kit_overrides(sources: Sequence[Any], kit: Path, tokenizer: str = "tokenizer.json") -> list[str]:
    """Return the settings with which a recipe takes its text, tokenizer and shards from a kit."""
    settings = [source.model_dump(mode="json", exclude_defaults=True) for source in sources]
    moved = [{**source, "path": str(place_in(kit / "corpora", source["path"]))} for source in settings]
    files = {"data.sources": moved, "data.cache": str(kit / "shards")}
    files["tokenizer.file"] = str(kit / tokenizer)
    return [f"{name}={json.dumps(value)}" for name, value in files.items()]


def open_kit(recipe: Path, kit: Path, tokenizer: str = "tokenizer.json") -> list[str]:
    """Return :func:`kit_overrides` of a recipe, for a kit that was carried here."""
    for path in (kit / "corpora").iterdir():
        os.utime(path, (KIT_TIME, KIT_TIME))
    return kit_overrides(load_recipe(recipe).data.sources, kit, tokenizer)
