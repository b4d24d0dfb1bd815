"""Single traces, and their tokens as text."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pandas as pd
import streamlit as st
from tokenizers import Tokenizer

from app.queries.database import database
from app.queries.ledger import serving
from app.queries.overview import kept
from engine.store.repositories import traces
from engine.store.repositories.overview import Slice
from engine.store.repositories.traces import Filter, Place, Trace

PAGE = 200


@kept
def listed(part: Slice, chosen: Filter, order: str, place: Place | None) -> pd.DataFrame:
    """One page, cut by the server; durations in ms, acceptance length with the bonus token."""
    with database().read() as session:
        frame = pd.DataFrame(traces.listed(session, part, chosen, order, PAGE, place))
    if frame.empty:
        return frame
    for name in ("e2e", "ttft", "tpot", "queue"):
        frame[f"{name}_ms"] = pd.to_numeric(frame[f"{name}_s"]) * 1e3
    frame["acceptance_length"] = 1 + frame["accepted"] / frame["steps"].where(frame["steps"] > 0)
    frame["trace_id"] = frame["trace_id"].astype(str)
    return frame


@kept
def matching(part: Slice, chosen: Filter) -> tuple[int, bool]:
    """How many match, and whether that is all of them."""
    with database().read() as session:
        return traces.matching(session, part, chosen)


def every(part: Slice, chosen: Filter, order: str, most: int) -> list[dict[str, Any]]:
    """The rows of all pages, ``most`` at most: what a download holds."""
    with database().read() as session:
        return traces.listed(session, part, chosen, order, most)


@st.cache_data(ttl=timedelta(minutes=1), show_spinner=False)
def one(trace_id: UUID) -> Trace | None:
    with database().read() as session:
        return traces.one(session, trace_id)


@st.cache_resource(show_spinner=False)
def _tokenizer(path: str) -> Any:
    return Tokenizer.from_file(path)


def pieces(ids: list[int]) -> list[str]:
    """The text of each token; its number where no live replica's tokenizer can be read from here."""
    path = next((str(r.stats["tokenizer"]) for r in serving().replicas if r.stats.get("tokenizer")), "")
    if not path or not Path(path).is_file():
        return [f"⟨{token}⟩" for token in ids]
    tokenizer = _tokenizer(path)
    return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
