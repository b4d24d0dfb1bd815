"""What pages show, drawn once: all sessions that look at the same are handed the same elements."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import streamlit as st

from app.charts.theme import Palette
from app.components.context import Context

TTL = timedelta(seconds=15)
"""A window that moves has a key of its own in every step. One that stands still may end in what is still written, and
what is drawn of it must not be much older than what is kept of it."""
ENTRIES = 64
"""Of each part of a page; one is some 50 KB."""

BY_WORDS: dict[str | type[Any], Callable[[Any], str]] = dict.fromkeys((Context, Palette), repr)
"""Frozen records of plain values, so their words tell them apart."""
shared = st.cache_resource(ttl=TTL, max_entries=ENTRIES, show_spinner=False, hash_funcs=BY_WORDS)
"""For a part of a page that follows from its arguments and from what is stored: of sessions that ask for it in the
same step one draws it, others wait for that, and all are sent what was drawn. There can be no widget in it.

Arguments whose name begins with an underscore do not tell calls apart: others must that they follow from. The
generation of the ledger stands for all that it says. What is returned is shared: nobody may change it.
"""
