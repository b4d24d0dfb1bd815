"""Versions against each other, and the family of one. DataFrame or records → figure, pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from app.charts.figure import Figure
from app.charts.theme import Palette, empty, figure, floats
from engine.percent import percent

NODE = 30
ROW = 62
CURVE = 12


@dataclass(frozen=True, slots=True)
class Node:
    """A version in the graph. ``generation`` counts from the chosen one; ``word`` says what became of it, and
    ``is_good`` how to judge that (None: not at all); ``more`` of its children are not drawn."""

    version: int
    parent: int | None
    generation: int
    word: str
    is_good: bool | None = None
    is_retired: bool = False
    more: int = 0


def against(
    frame: pd.DataFrame, column: str, chosen: int, roles: Mapping[int, str], form: str, unit: str, colours: Palette
) -> Figure:
    """One metric by version, with its 95 % interval where one is known.

    ``frame``: policy_version, requests, ``column`` and maybe ``column``_low and _high, a row a version.
    """
    values, low, high = (
        floats(frame, name) if name in frame else np.full(len(frame), np.nan)
        for name in (column, f"{column}_low", f"{column}_high")
    )
    if np.isnan(values).all():
        return empty("No version was measured in this window: choose a longer one", colours)
    versions = frame["policy_version"].to_numpy(dtype=int)
    order = np.argsort(versions)
    order = order[~np.isnan(values[order])]
    values, low, high, numbers = values[order], low[order], high[order], versions[order].tolist()
    made = figure(colours)
    made.add_scatter(
        x=list(range(len(numbers))),
        y=values,
        mode="lines+markers",
        line={"width": 1, "color": colours.grid},
        marker={
            "opacity": 1,
            "color": [colours.version(number) for number in numbers],
            "size": [13 if number == chosen else 9 for number in numbers],
            "line": {"width": [2 if number == chosen else 0 for number in numbers], "color": colours.text},
        },
        error_y={
            "type": "data", "array": np.nan_to_num(np.abs(high - values)),
            "arrayminus": np.nan_to_num(np.abs(values - low)), "color": colours.muted, "thickness": 1, "width": 3,
        },
        customdata=[[number, _range(bounds, form)]
                    for number, *bounds in zip(numbers, low.tolist(), high.tolist(), strict=True)],
        text=[f"v{number} {roles.get(number, '')}".strip() for number in numbers],
        hovertemplate=f"%{{text}}: %{{y:{form}}} {unit}%{{customdata[1]}}<extra></extra>",
        showlegend=False,
    )  # fmt: skip
    step = max(1, math.ceil(len(numbers) / 16))
    made.update_layout(hovermode="closest", clickmode="event+select", margin={"t": 14})
    made.update_xaxes(
        tickvals=list(range(0, len(numbers), step)),
        ticktext=[f"v{number}" for number in numbers[::step]],
        range=[-0.6, max(len(numbers) - 0.4, 2.6)],
    )
    made.update_yaxes(nticks=6, title={"text": unit, "font": {"size": 11, "color": colours.muted}})
    return made


def _taught(teacher: int, learner: int, served: int, of: int) -> str:
    return f"{percent(served / of)} of v{learner}'s training traffic was served by v{teacher}, by {of:,} traces of it"


def family(
    nodes: Sequence[Node], taught: Mapping[tuple[int, int], tuple[int, int]], chosen: int, colours: Palette
) -> Figure:
    """Ancestors on the left, descendants on the right. Solid: parent; dotted: whose traffic taught it.

    ``taught``: (teacher, learner) → traces of the learner's training traffic that it served, of how many looked at.
    """
    if not nodes:
        return empty("There is no such version", colours)
    places = _places(nodes)
    rows = max(y for _, y in places.values()) + 1
    made = figure(colours, int(max(3, rows) * ROW + 40))
    made.add_scatter(**_strokes([_edge(places[n.parent], places[n.version]) for n in nodes if n.parent in places]),
                     line={"width": 1.4, "color": colours.muted, "shape": "spline"})  # fmt: skip
    arcs = {(a, b): _curve(places[a], places[b]) for a, b in taught if a in places and b in places}
    made.add_scatter(**_strokes(list(arcs.values())), line={"width": 1.6, "color": colours.quantiles[1], "dash": "dot"})
    middle = [arc[CURVE // 2] for arc in arcs.values()]
    made.add_scatter(
        x=[x for x, _ in middle],
        y=[y for _, y in middle],
        mode="markers",
        marker={"size": 7, "color": colours.quantiles[1]},
        text=[_taught(a, b, *taught[a, b]) for a, b in arcs],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
    made.add_scatter(
        x=[places[n.version][0] for n in nodes],
        y=[places[n.version][1] for n in nodes],
        mode="markers+text",
        text=[f"<b>v{n.version}</b>" for n in nodes],
        textfont={"size": 11, "color": [colours.version(n.version) if n.is_retired else colours.card for n in nodes]},
        marker={
            "opacity": 1,
            "symbol": ["circle-open" if n.is_retired else "circle" for n in nodes],
            "size": [NODE + 6 if n.version == chosen else NODE for n in nodes],
            "color": [colours.version(n.version) for n in nodes],
            "line": {"width": [3 if n.version == chosen else 1 for n in nodes],
                     "color": [colours.text if n.version == chosen else colours.version(n.version) for n in nodes]},
        },
        customdata=[[n.version, n.word or "never served", f", {n.more} more children" if n.more else ""]
                    for n in nodes],
        hovertemplate="v%{customdata[0]}: %{customdata[1]}%{customdata[2]}<extra></extra>",
        showlegend=False,
    )  # fmt: skip
    made.update_layout(
        hovermode="closest",
        clickmode="event+select",
        margin={"t": 8, "b": 8},
        annotations=_words(nodes, places, colours),
    )
    generations = [n.generation for n in nodes]
    made.update_xaxes(visible=False, range=[min(generations) - 0.5, max(max(generations), min(generations) + 2) + 0.5])
    made.update_yaxes(visible=False, range=[max(rows - 0.35, 1.6), -0.6])
    return made


def _range(bounds: Sequence[float], form: str) -> str:
    if any(math.isnan(bound) for bound in bounds):
        return ", no interval: too few requests"
    low, high = (format(bound, form) for bound in bounds)
    return f" ({low} to {high})"


def _places(nodes: Sequence[Node]) -> dict[int, tuple[float, float]]:
    """Version → (generation, row): every leaf has a row of its own, a parent stands in the middle of its children."""
    known = {node.version: node for node in nodes}
    children: dict[int, list[int]] = {}
    for node in sorted(nodes, key=lambda n: n.version):
        if node.parent in known:
            children.setdefault(node.parent, []).append(node.version)
    rows: dict[int, float] = {}
    leaf = 0
    for root in (node.version for node in nodes if node.parent not in known):
        stack = [(root, False)]
        while stack:
            version, is_done = stack.pop()
            below = children.get(version, [])
            if is_done:
                rows[version] = sum(rows[one] for one in below) / len(below)
            elif below:
                stack.append((version, True))
                stack.extend((one, False) for one in reversed(below))
            else:
                rows[version] = float(leaf)
                leaf += 1
    return {version: (float(known[version].generation), row) for version, row in rows.items()}


def _words(
    nodes: Sequence[Node], places: Mapping[int, tuple[float, float]], colours: Palette
) -> list[dict[str, object]]:
    """What became of each, under it."""
    shades = {True: colours.good, False: colours.bad, None: colours.muted}
    return [
        {
            "x": places[n.version][0], "y": places[n.version][1], "yshift": -27, "showarrow": False,
            "text": n.word + (f" · +{n.more}" if n.more else ""),
            "font": {"size": 10, "color": shades[n.is_good]},
        }
        for n in nodes if n.word or n.more
    ]  # fmt: skip


Point = tuple[float, float]


def _edge(a: Point, b: Point) -> list[Point]:
    """From parent to child."""
    return [a, (a[0] + 0.3 * (b[0] - a[0]), a[1]), (a[0] + 0.7 * (b[0] - a[0]), b[1]), b]


def _strokes(paths: Sequence[Sequence[Point]]) -> dict[str, object]:
    """All paths as one trace, a gap behind each."""
    points = [point for path in paths for point in (*path, (None, None))]
    x, y = ([point[axis] for point in points] for axis in (0, 1))
    return {"x": x, "y": y, "mode": "lines", "hoverinfo": "skip", "showlegend": False}


def _curve(a: Point, b: Point) -> list[Point]:
    """From teacher to learner above the straight line, so that it is told apart from the parent's edge."""
    bend = (0.5 * (a[0] + b[0]), 0.5 * (a[1] + b[1]) - 0.42)
    found = []
    for step in range(CURVE + 1):
        t = step / CURVE
        found.append(
            (
                (1 - t) ** 2 * a[0] + 2 * t * (1 - t) * bend[0] + t**2 * b[0],
                (1 - t) ** 2 * a[1] + 2 * t * (1 - t) * bend[1] + t**2 * b[1],
            )
        )
    return found
