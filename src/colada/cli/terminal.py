"""Text that grows on a terminal: finished rows scroll away for good, the block under way is redrawn in place.

The screen ends in a *region*: the row that is still growing, the guess after
it, and a status row. Everything above it is final and is never touched again,
so a text may be much longer than the terminal is high.
"""

from __future__ import annotations

from types import TracebackType

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

PROMPT_STYLE, GUESS_STYLE, STATUS_STYLE = "bold", "dim cyan", "dim"

# A model can spell any byte; on a terminal, control characters show as pictures instead of acting.
_VISIBLE: dict[int, int | str] = {code: 0x2400 + code for code in range(32)}
_VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_VISIBLE |= {ord("\n"): "\n", ord("\t"): "    "}


class LiveText:
    """A growing text with a guess of what comes next; use as a context manager.

    Leaving it, also by an exception, leaves the final text on the screen and nothing else.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._line = Text()  # Final text of the row that is still growing.
        self._status = Text()
        self._height = 0  # Rows of the region on the screen.

    def __enter__(self) -> LiveText:
        self._console.show_cursor(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw([self._line], [])
        self._console.show_cursor(True)

    def write(self, text: str, style: str = "") -> None:
        """Append final text."""
        self._line.append(text.translate(_VISIBLE), style)
        *done, self._line = self._rows(self._line)
        self._draw(done, [self._line, self._status])

    def guess(self, text: str, status: str) -> None:
        """Show how the text may go on, instead of the last guess, and a status row."""
        self._status = Text(status, STATUS_STYLE)
        guessed = self._line.copy().append(text.translate(_VISIBLE), GUESS_STYLE)
        # What is scrolled off the screen cannot be redrawn.
        shown = self._rows(guessed)[: max(1, self._console.height - 2)]
        self._draw([], [*shown, self._status])

    def _draw(self, final: list[Text], region: list[Text]) -> None:
        """Replace the region by rows that stay and a new region, in one write so that nothing flickers."""
        erase_row = (ControlType.ERASE_IN_LINE, 2)
        upwards = [(ControlType.CURSOR_UP, 1), erase_row] * (self._height - 1)
        with self._console as console:
            console.control(Control(ControlType.CARRIAGE_RETURN, erase_row, *upwards))
            rows = Text("\n").join([*final, *region])
            console.print(rows, end="" if region else "\n", no_wrap=True, overflow="ignore", crop=True)
        self._height = len(region)

    def _rows(self, text: Text) -> list[Text]:
        """Break a text into rows of the terminal's width; every character but the line breaks is in one."""
        rows = []
        for line in text.split("\n", allow_blank=True):
            while (end := row_end(line.plain, self._console.width)) < len(line):
                rows.append(line[:end])
                line = line[end:]
            rows.append(line)
        return rows


def row_end(line: str, width: int) -> int:
    """Return how many characters of a line the first row takes: to the last space that fits, or to the edge.

    Spaces at the end of a row may hang over it, so that none starts the next one.
    """
    if cell_len(line.rstrip(" ")) <= width:
        return len(line)
    fits = max(1, len(chop_cells(line, width)[0]))
    space = line.rfind(" ", 0, fits + 1)
    return space + 1 if space > 0 else fits
