"""One page of results: readable offline, on a phone and in the dark; the looks are in ``page.html``.

page = Page("speed", "benchmark")
page.facts({"Machine": "..."}).section("Rates", "What was measured.").table(Table(...))
with styled():
    page.figure(figure, "rates", "Tokens per second.")
page.provenance({"seed": 0}).write(Path("report.html"))
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from colada.files import read_text, write_text
from colada.report.style import inline_svg
from colada.report.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("page.html")


class Page:
    """A page that is put together from the top; whatever it is given as text is shown as it is.

    Args:
        title: its heading.
        kind: what it is of, in a browser's tab.
    """

    def __init__(self, title: str, kind: str) -> None:
        self.title, self.kind = title, kind
        self._parts: list[dict[str, Any]] = []

    def _add(self, kind: str, **values: Any) -> Self:
        self._parts.append({"kind": kind, **values})
        return self

    def section(self, title: str, text: str = "") -> Self:
        """Begin a section, with a paragraph."""
        return self._add("section", title=title, text=text)

    def facts(self, facts: Mapping[str, str], large: bool = False) -> Self:
        """Add terms and their values, side by side."""
        return self._add("facts", facts=facts, large=large)

    def table(self, table: Table) -> Self:
        """Add a table; one wider than the screen can be scrolled."""
        return self._add("table", table=table)

    def figure(self, figure: Figure, name: str, caption: str = "") -> Self:
        """Add a figure, within :func:`~colada.report.style.styled`; those in a row share the page's width.

        Args:
            figure: drawn in that style.
            name: what it is called, once on a page.
            caption: below it.
        """
        return self._beside(inline_svg(figure, name), caption)

    def picture(self, content: bytes, caption: str = "") -> Self:
        """Add a picture, the bytes of a PNG; those in a row share the page's width."""
        data = b64encode(content).decode()
        return self._beside(f'<img alt="drawings" src="data:image/png;base64,{data}">', caption)

    def _beside(self, markup: str, caption: str) -> Self:
        """Add a figure to the row that is under way, or begin one."""
        if not (self._parts and self._parts[-1]["kind"] == "figures"):
            self._add("figures", figures=[])
        self._parts[-1]["figures"].append({"markup": markup, "caption": caption})
        return self

    def texts(self, texts: Sequence[tuple[str, str]], fold: str = "") -> Self:
        """Add titles and texts, in which white space counts; folded under ``fold`` if that is not empty."""
        return self._add("texts", texts=texts, fold=fold)

    def provenance(self, facts: Mapping[str, Any]) -> Self:
        """Add how everything was made: settings, versions, seeds; none is nothing."""
        rows = [(name, _said(value)) for name, value in facts.items()]
        return self._add("provenance", rows=rows) if rows else self

    def write(self, path: Path) -> None:
        """Write the page, one file that needs no other. Raises ColadaError if that fails."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.from_string(read_text(TEMPLATE))
        write_text(path, template.render(title=self.title, kind=self.kind, parts=self._parts))


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(one)}" for name, one in value.items())
    return value if isinstance(value, str) else json.dumps(value)
