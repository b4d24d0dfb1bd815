"""The control plane's pages. Started by `python -m app` or `slipstream dashboard`."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

STATIC = Path(__file__).with_name("static")
# An icon by name would be fetched from the internet.
st.set_page_config(page_title="Slipstream", page_icon=str(STATIC / "icon.svg"), layout="wide")

st.html(Path(__file__).with_name("style.css"))
st.html(f"<script>{Path(__file__).with_name('strokes.js').read_text()}</script>", unsafe_allow_javascript=True)
st.logo(str(STATIC / "logo.svg"), size="medium")

PAGES = [
    st.Page("views/overview.py", title="Overview", icon=":material/monitoring:", default=True),
    st.Page("views/speculation.py", title="Speculation", icon=":material/bolt:", url_path="speculation"),
    st.Page("views/drift.py", title="Drift", icon=":material/waves:", url_path="drift"),
    st.Page("views/explain.py", title="Explain", icon=":material/account_tree:", url_path="explain"),
    st.Page("views/rollouts.py", title="Rollouts", icon=":material/alt_route:", url_path="rollouts"),
    st.Page("views/versions.py", title="Versions", icon=":material/layers:", url_path="versions"),
    st.Page("views/traces.py", title="Traces", icon=":material/receipt_long:", url_path="traces"),
    st.Page("views/system.py", title="System", icon=":material/dns:", url_path="system"),
]

st.navigation(PAGES, position="top").run()
