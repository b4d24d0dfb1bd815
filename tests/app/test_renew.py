"""Parts of a page that are not drawn equally often must not tell of different plans."""

from __future__ import annotations

from streamlit.testing.v1 import AppTest


def _page() -> None:
    import streamlit as st

    from app.components import context

    st.session_state["runs"] = st.session_state.get("runs", 0) + 1
    context.renew(st.session_state["page"], st.session_state["generation"])


def test_a_page_is_drawn_anew_once_for_every_change() -> None:
    page = AppTest.from_function(_page)
    page.session_state["page"], page.session_state["generation"] = "overview", 7
    assert page.run().session_state["runs"] == 1
    assert page.run().session_state["runs"] == 2
    page.session_state["generation"] = 8
    assert page.run().session_state["runs"] == 4  # asked for, and once more
    page.session_state["page"] = "versions"  # another page, drawn for the first time
    assert page.run().session_state["runs"] == 5
