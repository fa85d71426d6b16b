"""What a training run shows: one line of progress on a terminal, one line a log interval elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Display:
    """Progress of a run on a console; quiet if ``console`` is."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=True)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._title = ""

    def say(self, line: str) -> None:
        """Print a line above the progress."""
        console = self._progress.console if self._progress else self.console
        # In a log, a line stays a line.
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)

    @contextmanager
    def stage(self, number: int, steps: int, start: int) -> Iterator[None]:
        """Show the progress of one stage."""
        self._title = f"stage {number}"
        progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[terms]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        with progress:
            self._progress = progress
            self._task = progress.add_task(self._title, total=steps, completed=start, terms="")
            yield
        self._progress = None

    def update(self, step: int, terms: Mapping[str, float]) -> None:
        """Show the terms of a step."""
        shown = {name: value for name, value in terms.items() if name not in ("lr", "tokens_per_s")}
        text = " ".join(f"{name} {value:.3g}" for name, value in shown.items())
        text += f" {terms['tokens_per_s']:,.0f} tokens/s"
        if self._progress is not None and self.console.is_terminal:
            self._progress.update(self._task, completed=step, terms=text)
        else:
            self.say(f"{self._title} step {step}: {text}")
