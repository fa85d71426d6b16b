"""The option that all benchmarks share: where their record goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from colada.errors import ColadaError
from colada.files import require_file


def check_target(path: Path | None) -> Path | None:
    """Return a path once a file could be written there: before anything is measured."""
    if path is not None and not path.parent.is_dir():
        raise ColadaError(f"{path}: there is no directory {path.parent}")
    if path is not None and path.exists():
        require_file(path, "a regular file, or none")  # A named pipe would wait for who reads it.
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=check_target,
        help="Write all that was measured; see benchmarks.table.",
    ),
]
