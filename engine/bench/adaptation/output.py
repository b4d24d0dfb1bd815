"""What a run leaves behind: the report as JSON, every request and attempt as CSV, and a page with the curves."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from engine.bench.adaptation import figures
from engine.bench.adaptation.arms import AdaptiveArm, Arm
from engine.bench.adaptation.figures import Run
from engine.bench.report import Report

COLOURS = {
    "none": "#8a8f98",
    "ngram": "#c58af9",
    "static": "#4c8dff",
    "static+context": "#9b51e0",
    "ungated": "#f2994a",
    "gated": "#27ae60",
}


def write(
    folder: Path,
    report: Report,
    runs: Mapping[str, Sequence[Run]],
    arms: Mapping[tuple[str, int], Mapping[str, Arm]],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(report.to_json())
    _requests(folder / "requests.csv", runs)
    _attempts(folder / "attempts.csv", arms)
    (folder / "page.html").write_text(page(report, runs, arms))


def page(report: Report, runs: Mapping[str, Sequence[Run]], arms: Mapping[tuple[str, int], Mapping[str, Arm]]) -> str:
    """One self-contained file: figures, the curves of the first seed of every stream, what was planted and why not."""
    from plotly.offline import get_plotlyjs

    charts = "".join(_chart(name, done[0]) for name, done in runs.items() if done)
    rows = "".join(
        f"<tr><td>{escape(f.name)}</td><td>{f.value:.3f}</td><td>{f.low:.3f} – {f.high:.3f}</td><td>{f.n}</td>"
        f"<td>{escape(f.unit)}</td></tr>"
        for f in report.figures
    )
    planted = [
        (stream, seed, name, a.at, a.planted, ("SERVED: " if a.version is not None else "refused: ") + a.reason)
        for (stream, seed), used in arms.items()
        for name, arm in used.items()
        for a in (arm.attempts if isinstance(arm, AdaptiveArm) else ())
        if a.planted
    ]
    said = "".join(f"<tr>{''.join(f'<td>{escape(str(t))}</td>' for t in row)}</tr>" for row in planted)
    return (
        "<!doctype html><meta charset='utf-8'><title>Adaptation</title>"
        f"<script>{get_plotlyjs()}</script>"
        "<style>body{font:15px system-ui;max-width:1100px;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
        "td,th{padding:.2rem .8rem;text-align:left;border-bottom:1px solid #8884}</style>"
        "<h1>Adaptation</h1><p>Tokens are exact; seconds are computed from a profile of target passes measured in this "
        "run, learning charged. Rows named <i>measured</i> were decoded for real.</p>"
        f"{charts}<h2>Figures</h2><table><tr><th>figure<th>value<th>95 % interval<th>n<th>unit</tr>{rows}</table>"
        "<h2>Planted bad updates</h2><table><tr><th>stream<th>seed<th>arm<th>after requests<th>way<th>outcome</tr>"
        f"{said}</table>"
    )


def _chart(name: str, run: Run) -> str:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for arm in run.arms:
        curve = figures.level(name, run, arm)
        at = [point[0] for point in curve]
        for row, column in ((1, 1), (2, 2)):
            figure.add_trace(
                go.Scatter(
                    x=at,
                    y=[point[column] for point in curve],
                    name=arm,
                    legendgroup=arm,
                    showlegend=row == 1,
                    line={"color": COLOURS[arm], "width": 2},
                ),
                row=row,
                col=1,
            )
    for phase in run.stream.phases:
        if phase.traffic_class:
            figure.add_vline(x=phase.first, line_dash="dot", line_color="#888", annotation_text=phase.traffic_class)
    figure.update_yaxes(title_text="acceptance length", row=1, col=1)
    figure.update_yaxes(title_text="net tokens/s", row=2, col=1)
    figure.update_xaxes(title_text="requests", row=2, col=1)
    title = f"{name}: the last {figures.WINDOW} requests"
    figure.update_layout(title=title, height=560, template="plotly_white", hovermode="x unified")
    return str(figure.to_html(full_html=False, include_plotlyjs=False))


def _requests(path: Path, runs: Mapping[str, Sequence[Run]]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                "stream",
                "seed",
                "request",
                "class",
                "arm",
                "version",
                "steps",
                "drafted",
                "accepted",
                "decode_s",
                "learn_s",
            ]
        )
        for name, done in runs.items():
            for run in done:
                for arm, served in run.arms.items():
                    for at, one in enumerate(served):
                        c = one.counts
                        numbers = (c.steps, c.drafted, c.accepted, f"{one.decode_s:.4f}", f"{one.learn_s:.4f}")
                        out.writerow([name, run.seed, at, one.traffic_class, arm, one.version, *numbers])


def _attempts(path: Path, arms: Mapping[tuple[str, int], Mapping[str, Arm]]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                "stream",
                "seed",
                "arm",
                "after_requests",
                "version",
                "planted",
                "loads",
                "learn_cpu_s",
                "gate_cpu_s",
                "reason",
            ]
        )
        for (stream, seed), used in arms.items():
            for name, arm in used.items():
                for a in arm.attempts if isinstance(arm, AdaptiveArm) else ():
                    cost = (f"{a.learn_s:.3f}", f"{a.gate_s:.3f}")
                    out.writerow([stream, seed, name, a.at, a.version or "", a.planted, a.loads, *cost, a.reason])
