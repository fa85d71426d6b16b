"""One table in three forms: on a terminal, in Markdown, and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

_WIDEST = 10_000


@dataclass
class Table:
    """Titles and rows of text; the first ``texts`` columns are words, aligned left, the others numbers."""

    titles: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    texts: int = 1

    def row(self, *cells: str) -> Table:
        """Add a row, and return the table."""
        self.rows.append(cells)
        return self

    def print(self, console: Console) -> None:
        """Print the table, without rules or borders; a line longer than the console's is not cut."""
        grid = Grid(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for number, title in enumerate(self.titles):
            grid.add_column(Text(title), justify="left" if number < self.texts else "right", no_wrap=True)
        for row in self.rows:
            grid.add_row(*map(Text, row))  # As it is: what stands in square brackets is no style.
        # Made as wide as its cells: rich cuts numbers off to fit the console, which in a pipe has 80 columns.
        grid.width = console.measure(grid, options=console.options.update(width=_WIDEST)).maximum
        console.print(grid, soft_wrap=True)

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = [*["---"] * self.texts, *["---:"] * (len(self.titles) - self.texts)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.titles, rule, *self.rows))
