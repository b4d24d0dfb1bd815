"""Benchmarks print one object of figures, each with its interval and what it rests on."""

from __future__ import annotations

import json

import numpy as np

from engine.bench.report import Figure, Report, count_figure, machine, quantile_figure


def test_one_json_object_of_figures() -> None:
    report = Report("rollback", 3, [Figure("x_s", 0.2, 0.1, 0.3, 50, "s")])
    tree = json.loads(report.to_json())
    assert set(tree) == {"bench", "version", "machine", "seed", "figures", "notes"}
    assert tree["figures"] == [{"name": "x_s", "value": 0.2, "low": 0.1, "high": 0.3, "n": 50, "unit": "s"}]
    assert "x_s" in report.to_text()


def test_a_quantile_lies_in_its_interval_which_narrows_with_n() -> None:
    rng = np.random.default_rng(0)
    sample = rng.exponential(1.0, 400)
    few = quantile_figure("p50", sample[:25].tolist(), 0.5, "s", rng)
    many = quantile_figure("p50", sample.tolist(), 0.5, "s", rng)
    assert few.low <= few.value <= few.high
    assert many.high - many.low < few.high - few.low


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    median = np.log(2)  # of the exponential with mean 1
    figures = [quantile_figure("p50", rng.exponential(1.0, 50).tolist(), 0.5, "s", rng) for _ in range(100)]
    assert sum(f.low <= median <= f.high for f in figures) >= 85


def test_no_event_still_has_an_upper_bound() -> None:
    figure = count_figure("failed", 0, 300, "requests")
    assert (figure.value, figure.low) == (0.0, 0.0)
    assert 3.0 < figure.high < 4.0  # 300 × (1 − .025^(1/300))
    assert count_figure("failed", 0, 0, "requests").n == 0


def test_the_machine_is_named() -> None:
    assert "cores" in machine()
