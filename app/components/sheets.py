"""Tables that are only read, as one piece of HTML.

Streamlit's grid is for long lists and for rows that are chosen. It takes a frame apart into Arrow and its columns into
JSON, 10 ms of processor for ten rows, and draws on a canvas; this takes one or two, and can be read aloud and copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from app.components.sparklines import sparkline

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """How one column of a frame is written. ``cell``: a value → HTML; ``note`` is said where the pointer rests."""

    label: str
    cell: Callable[[Any], str]
    is_number: bool = False
    note: str = ""
    is_wide: bool = False


def words(label: str, shade: Callable[[str], str] | None = None, note: str = "", is_wide: bool = False) -> Column:
    """Words as they are, over several lines where ``is_wide``; with ``shade`` as tags of the colour it gives."""

    def cell(value: Any) -> str:
        if _is_missing(value):
            return ""
        written = escape(str(value))
        if shade is None or not value:
            return written
        colour = shade(str(value))
        return f'<span class="tag" style="color:{colour};background:{colour}1f">{written}</span>'

    return Column(label, cell, note=note, is_wide=is_wide)


def number(label: str, form: str, scale: float = 1.0, note: str = "") -> Column:
    """A number written by ``form`` after it is multiplied by ``scale``; a dash where there is none."""
    return Column(label, lambda value: MISSING if _is_missing(value) else form.format(value * scale), True, note)


def share(label: str, note: str = "") -> Column:
    """Percent, with a bar that is full at 100."""

    def cell(value: Any) -> str:
        if _is_missing(value):
            return MISSING
        width = min(max(value, 0.0), 100.0)
        return f'<span class="bar"><i style="width:{width:.1f}%"></i></span><span class="of">{value:.1f} %</span>'

    return Column(label, cell, True, note)


def trend(label: str, moved: Iterable[Sequence[float]], least: float, colour: str) -> Column:
    """A sparkline a row, all on one scale from ``least`` up, so that rows can be compared."""
    most = max((value for values in moved for value in values), default=least)
    return Column(label, lambda values: sparkline(np.asarray(values, float), colour, (least, max(most, least + 0.5))))


def link(label: str, word: Callable[[str], str]) -> Column:
    """Addresses as links, each under the ``word`` for it; nothing where there is none."""

    def cell(value: Any) -> str:
        return "" if _is_missing(value) or not value else f'<a href="{escape(value)}">{escape(word(value))}</a>'

    return Column(label, cell)


def sheet(frame: pd.DataFrame, columns: dict[str, Column], name: str) -> None:
    """The ``columns`` of a frame, in their order, a line a row. ``name``: what the table is, for those who hear it."""
    st.html(written(frame, columns, name))


def written(frame: pd.DataFrame, columns: dict[str, Column], name: str) -> str:
    """The table as HTML; whatever the frame says is written as text."""
    head = "".join(_head(column) for column in columns.values())
    cells = [_cells(frame[key].tolist(), column) for key, column in columns.items()]
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    table = f'<table aria-label="{escape(name)}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="sheet" tabindex="0">{table}</div>'


def _head(column: Column) -> str:
    note = f' title="{escape(column.note)}"' if column.note else ""
    return f'<th scope="col"{_kind(column)}{note}>{escape(column.label)}</th>'


def _cells(values: list[Any], column: Column) -> list[str]:
    kind = _kind(column)
    return [f"<td{kind}>{column.cell(value)}</td>" for value in values]


def _kind(column: Column) -> str:
    return ' class="number"' if column.is_number else ' class="wide"' if column.is_wide else ""


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value != value  # nan
