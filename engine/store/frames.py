"""Rows as a file: JSON, CSV or Parquet, in one way for the dashboard and the command line."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

FORMATS = ("json", "csv", "parquet")
Rows = Sequence[Mapping[str, Any]]


def encode(rows: Rows, form: str, about: Mapping[str, Any] | None = None) -> bytes:
    """``about`` goes into JSON beside the rows; what is not a number is null there. ValueError for another format."""
    if form == "json":
        whole = dict(about or {}) | {"rows": [_plain(row) for row in rows]}
        return (json.dumps(_plain(whole), allow_nan=False) + "\n").encode()
    names = list(dict.fromkeys(name for row in rows for name in row))
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows({name: _inert(value) for name, value in _flat(row).items()} for row in rows)
        return text.getvalue().encode()
    if form == "parquet":
        return _parquet(rows, names)
    raise ValueError(f"no format {form!r}; there are {', '.join(FORMATS)}")


def _parquet(rows: Rows, names: Sequence[str]) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    flat = [_flat(row) for row in rows]
    buffer = io.BytesIO()
    parquet.write_table(pa.table({name: [row.get(name) for row in flat] for name in names}), buffer)
    return buffer.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """One value a cell: nested ones as JSON, instants in ISO 8601 where the format has no type for them."""
    return {
        name: json.dumps(_plain(value)) if isinstance(value, (list, dict, tuple)) else _scalar(value)
        for name, value in row.items()
    }


def _inert(value: Any) -> Any:
    """A client's text that a spreadsheet would run as a formula gets an apostrophe before it: then it is text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _scalar(value: Any) -> Any:
    return str(value) if isinstance(value, UUID) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
