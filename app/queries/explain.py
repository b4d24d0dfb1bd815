"""Explanations, kept: the same two windows of the past have the same answer."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import streamlit as st

from app.queries.database import database
from engine.diagnosis.explain import Explanation, explain
from engine.store.repositories.overview import Slice

SEED = 0


@st.cache_data(ttl=timedelta(minutes=10), max_entries=50, show_spinner="Comparing the two windows")
def between(first: Slice, second: Slice, metric: str) -> Explanation:
    with database().read() as session:
        return explain(session, first, second, metric, np.random.default_rng(SEED))
