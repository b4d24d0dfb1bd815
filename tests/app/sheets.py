"""What the tables say that a page writes as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html.parser import HTMLParser

from streamlit.testing.v1 import AppTest


class Sheets(HTMLParser):
    """Name → label of a column → its cells, as they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, list[str]]] = {}
        self._labels: list[str] = []
        self._cells: list[str] = []
        self._name, self._is_cell = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._name, self._labels = str(dict(attrs)["aria-label"]), []
        elif tag == "tr":
            self._cells = []
        elif tag in ("th", "td"):
            self._is_cell = True
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self._is_cell = False
        elif tag == "thead":
            self._labels = self._cells
            self.found[self._name] = {label: [] for label in self._labels}
        elif tag == "tr" and self._labels:
            for label, cell in zip(self._labels, self._cells, strict=True):
                self.found[self._name][label].append(cell)

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self._cells[-1] += data


def sheets(test: AppTest) -> dict[str, dict[str, list[str]]]:
    """The tables of a page by their names: label of a column → its cells."""
    return of(element.proto.body for element in test.get("html"))


def of(bodies: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    reader = Sheets()
    for body in bodies:
        reader.feed(body)
    return reader.found
