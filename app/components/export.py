"""Taking a panel away: as a file, or as the command that prints the same."""

from __future__ import annotations

import shlex

import streamlit as st

from app.components.context import parameters
from app.queries.database import database
from engine.store import frames
from engine.store.panels import PANELS
from engine.store.repositories.overview import Slice

MIME = {"csv": "text/csv", "json": "application/json", "parquet": "application/vnd.apache.parquet"}


def export(page: str, part: Slice) -> None:
    """A button that offers every panel of a page as CSV, Parquet or JSON; the file is made when it is asked for."""
    names = [name for name, panel in PANELS.items() if panel.page == page]
    with st.popover("Export", icon=":material/download:"):
        name = st.selectbox("Panel", names, key=f"export-{page}", format_func=lambda n: PANELS[n].title)
        form = st.segmented_control("Format", list(MIME), default="csv", key=f"format-{page}", required=True) or "csv"

        def data() -> bytes:
            with database().read() as session:
                return frames.encode(PANELS[name].read(session, part), form, {"panel": name} | parameters(part))

        st.download_button(
            "Download",
            data,
            file_name=f"{name}.{form}",
            mime=MIME[form],
            key=f"download-{page}",
            on_click="ignore",
            icon=":material/download:",
        )
        st.code(command(name, form, part), language="bash", wrap_lines=True)


def command(name: str, form: str, part: Slice) -> str:
    given = parameters(part)
    flags = [f"--{flag} {shlex.quote(given[flag])}" for flag in ("from", "to", "class", "arm") if flag in given]
    if part.version is not None:
        flags.append(f"--version {part.version}")
    return f"slipstream query {name} {' '.join(flags)} --format {form}"
