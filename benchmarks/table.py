"""The tables of documents, from the records that benchmarks write with ``--json``: median (least–most).

python -m benchmarks.table RECORD... prints Markdown, and what each was measured on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measure import Row, cell
from colada.errors import ColadaError
from colada.files import read_json_object


def markdown(rows: list[Row]) -> str:
    """Return rows as a Markdown table; columns that are empty are left out."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [columns, ["---"] * len(columns), *([cell(row[name], " ") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(records: Annotated[list[Path], typer.Argument(metavar="RECORD...")]) -> None:
    """Print the tables of records, in their order."""
    for path in records:
        try:
            record = read_json_object(path)
            if not record.get("rows"):
                raise ColadaError(f"{path}: no rows, expected a file that a benchmark wrote with --json")
        except ColadaError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        made = ", ".join(f"{name} {value}" for name, value in record["made_with"].items())
        print(f"{record['title']}\n\n{markdown(record['rows'])}\n\n({made})\n")


if __name__ == "__main__":
    typer.run(main)
