"""What a training run shows: progress on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

LINE_SECONDS = 5.0
"""Elsewhere than on a terminal, lines of steps are at least so far apart."""
RARE_SECONDS = 30.0
"""Without a line for so long, one says how far a stage is."""
FIRST_SECONDS = 2.0
"""How long a task takes before a line says how long all of it will."""
# What the line of a step leaves out: it is in metrics.jsonl.
_NOT_SHOWN = ("lr", "tokens", "tokens_per_s", "flow_by_t", "loss", "memory_gb")


class Display:
    """Progress of a run on a console; quiet if ``console`` is."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._title, self._unit, self._total, self._start = "", "", 0, 0
        self._begin = self._line = 0.0  # When the task began, and when its last line was written.

    def say(self, line: str | Text) -> None:
        """Print a line above the progress, as it is: no style in square brackets, no emoji in colons."""
        console = self._progress.console if self._progress else self.console
        # In a log, a line stays a line.
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)

    @contextmanager
    def task(
        self, title: str, total: int, start: int = 0, passing: bool = False, unit: str = "steps"
    ) -> Iterator[None]:
        """Show the progress of something that takes ``total`` steps, or units of another name.

        If ``passing``, only until it is done.
        """
        self._title, self._unit, self._total, self._start = title, unit, total, start
        self._begin, self._line = time.monotonic(), -LINE_SECONDS
        whole, rest = Column(no_wrap=True), Column(ratio=1, no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("[bold]{task.description}", table_column=whole),
            BarColumn(bar_width=10, table_column=whole),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(compact=True, table_column=whole),
            TextColumn("{task.fields[terms]}", table_column=rest),
        )
        hidden = not self.console.is_terminal
        with Progress(
            *columns, console=self.console, disable=hidden, transient=passing, expand=True
        ) as progress:
            self._progress = progress
            self._task = progress.add_task(title, total=total, completed=start, terms="")
            try:
                yield
            finally:
                self._progress = None

    def advance(self, done: int, total: int) -> None:
        """Show how far the task is; elsewhere than on a terminal with a line every few seconds."""
        if self._progress is None:
            return
        self._progress.update(self._task, completed=done, total=total)
        now = time.monotonic()
        late = now - max(self._line + LINE_SECONDS, self._begin + FIRST_SECONDS) >= 0
        if late and not self.console.is_terminal and done < total:
            self._line, self._total = now, total
            self.say(f"{self._title}: {done:,} of {total:,} {self._unit}{self._left(done, now)}")

    def move(self, done: int, total: int) -> None:
        """Move a terminal's bar; elsewhere, say how far the task is where lines with terms are rare."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if not self.console.is_terminal and now - max(self._line, self._begin) >= RARE_SECONDS:
            self._line = now
            self.say(f"{self._title} step {done}/{total}{self._left(done, now)}")

    def update(self, step: int, terms: Mapping[str, Any]) -> None:
        """Show the terms of a step."""
        shown = {name: value for name, value in terms.items() if name not in _NOT_SHOWN and value is not None}
        if not shown.get("skipped"):
            shown.pop("skipped", None)
        # The first are the last that a narrow terminal leaves out.
        text = f"{terms['tokens_per_s']:,.0f} tokens/s "
        text += " ".join(f"{name} {value:.3g}" for name, value in shown.items())
        now = time.monotonic()
        if self._progress is not None and self.console.is_terminal:
            self._progress.update(self._task, completed=step, terms=text)
        elif step >= self._total or now - self._line >= LINE_SECONDS:
            self._line = now
            self.say(f"{self._title} step {step}/{self._total}{self._left(step, now)}: {text}")

    def _left(self, step: int, now: float) -> str:
        """Return how long the task will take from a step on, in words; nothing before the second one."""
        done = step - self._start
        if done < 2 or step >= self._total:
            return ""
        minutes, seconds = divmod(round((now - self._begin) / done * (self._total - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f", {hours}:{minutes:02}:{seconds:02} left" if hours else f", {minutes}:{seconds:02} left"
