"""A Plotly figure of plain dictionaries.

Plotly's own figure checks every property of every part whenever it is set, which was two thirds of what drawing a page
again cost. Here nothing is checked while people look; tests turn every chart into Plotly's own figure, which raises on
what Plotly does not know.
"""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.basedatatypes import BaseFigure

Part = dict[str, Any]
TYPED = {"float64": "f8", "float32": "f4", "int32": "i4", "int16": "i2", "int8": "i1"}
"""What Plotly's JavaScript reads as bytes, and how it calls that."""


class Figure(BaseFigure):
    """Traces and a layout as Plotly's reference describes them, by the same verbs as Plotly's own figure.

    It is a ``BaseFigure`` for Streamlit, which asks it for ``to_dict`` and nothing else. Values may be lists, numpy
    arrays and Series; missing ones are gaps.
    """

    def __init__(self, layout: Part | None = None) -> None:
        self._traces: list[Part] = []
        self._parts: Part = layout or {}
        self._sent: Part | None = None

    def add_scatter(self, **trace: Any) -> Figure:
        return self._add("scatter", trace)

    def add_bar(self, **trace: Any) -> Figure:
        return self._add("bar", trace)

    def add_heatmap(self, **trace: Any) -> Figure:
        return self._add("heatmap", trace)

    def add_annotation(self, **annotation: Any) -> Figure:
        self._changed().setdefault("annotations", []).append(annotation)
        return self

    def add_hline(self, y: float, line: Part, annotation: Part | None = None) -> Figure:
        """A line over the whole width; its words at the right end, above."""
        self._add_shape({"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line})
        if annotation is not None:
            place = {"xref": "x domain", "x": 1, "xanchor": "right", "y": y, "yanchor": "bottom", "showarrow": False}
            self.add_annotation(**place | annotation)
        return self

    def add_vline(self, x: float, line: Part, annotation: Part | None = None) -> Figure:
        """A line over the whole height; its words above its upper end."""
        self._add_shape({"type": "line", "yref": "y domain", "y0": 0, "y1": 1, "x0": x, "x1": x, "line": line})
        if annotation is not None:
            place = {"yref": "y domain", "y": 1, "yanchor": "bottom", "x": x, "xanchor": "center", "showarrow": False}
            self.add_annotation(**place | annotation)
        return self

    def add_vrect(self, x0: float, x1: float, **shape: Any) -> Figure:
        """A band over the whole height."""
        return self._add_shape({"type": "rect", "yref": "y domain", "y0": 0, "y1": 1, "x0": x0, "x1": x1} | shape)

    def update_layout(self, **parts: Any) -> Figure:
        _merge(self._changed(), parts)
        return self

    def update_xaxes(self, **axis: Any) -> Figure:
        return self.update_layout(xaxis=axis)

    def update_yaxes(self, **axis: Any) -> Figure:
        return self.update_layout(yaxis=axis)

    def update_traces(self, **parts: Any) -> Figure:
        self._changed()
        for trace in self._traces:
            _merge(trace, parts)
        return self

    def to_dict(self) -> Part:
        """What the browser gets: nothing but what JSON has, numbers in bulk as bytes. Made once, for all who ask."""
        if self._sent is None:
            self._sent = {"data": [_plain(trace) for trace in self._traces], "layout": _plain(self._parts)}
        return self._sent

    def checked(self) -> go.Figure:
        """The same as Plotly's own figure; ValueError where Plotly does not know a part or its value."""
        return go.Figure(data=self._traces, layout=self._parts)

    @property
    def data(self) -> Any:
        return self.checked().data

    @property
    def layout(self) -> Any:
        return self.checked().layout

    def _changed(self) -> Part:
        """The layout, for one who changes the figure: what was sent is no longer what it shows."""
        self._sent = None
        return self._parts

    def _add(self, kind: str, trace: Part) -> Figure:
        self._changed()
        self._traces.append({"type": kind} | trace)
        return self

    def _add_shape(self, shape: Part) -> Figure:
        self._changed().setdefault("shapes", []).append(shape)
        return self


def _merge(into: Part, parts: Part) -> None:
    for name, value in parts.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return None if value != value else float(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, pd.Series | pd.Index):
        return _array(value.to_numpy())
    return _array(value) if isinstance(value, np.ndarray) else value.item()


def _array(values: np.ndarray) -> Any:
    kind = TYPED.get(str(values.dtype))
    if kind is not None and values.size:
        made: Part = {"dtype": kind, "bdata": base64.b64encode(np.ascontiguousarray(values).data).decode("ascii")}
        return made if values.ndim == 1 else made | {"shape": ", ".join(map(str, values.shape))}
    if values.dtype.kind == "M":
        return np.datetime_as_string(values.astype("datetime64[ms]")).tolist()
    return _plain(values.tolist())
