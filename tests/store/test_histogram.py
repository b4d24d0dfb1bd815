"""Percentiles from buckets are within one per cent, and merging loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from ddsketch import DDSketch
from hypothesis import given
from hypothesis import strategies as st

from engine.store import histogram

QS = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
durations = st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=300)


@given(durations)
def test_relative_error_is_below_one_per_cent(values: list[float]) -> None:
    merged = histogram.merge([histogram.count(values)])
    exact = np.quantile(values, QS, method="lower")
    np.testing.assert_allclose(histogram.quantiles(merged, QS), exact, rtol=histogram.ALPHA + 1e-9)


@given(durations, durations)
def test_merging_histograms_is_counting_together(a: list[float], b: list[float]) -> None:
    apart = histogram.merge([histogram.count(a), histogram.count(b)])
    assert apart == histogram.merge([histogram.count(a + b)])


@pytest.mark.parametrize("q", QS)
def test_agrees_with_ddsketch(q: float) -> None:
    values = np.random.default_rng(0).lognormal(-1, 1.2, 20_000)
    oracle = DDSketch(histogram.ALPHA)
    for value in values:
        oracle.add(value)
    ours = histogram.quantile(histogram.merge([histogram.count(values)]), q)
    assert ours == pytest.approx(oracle.get_quantile_value(q), rel=1e-6)


def test_nothing_has_no_quantile() -> None:
    assert histogram.quantile({}, 0.5) is None


def test_what_is_shorter_than_a_clock_tick_is_still_counted() -> None:
    assert histogram.count([0.0, -1e-9, 1e-9]) == ([histogram.bucket(histogram.SMALLEST)], [3])


@given(st.floats(1e-5, 1e5))
def test_a_value_lies_in_its_bucket(value: float) -> None:
    at = histogram.bucket(value)
    assert histogram.upper(at - 1) < value * (1 + 1e-9)
    assert value <= histogram.upper(at) * (1 + 1e-9)
