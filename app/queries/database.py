"""The one pool of this server, and what pages may keep of an answer."""

from __future__ import annotations

import streamlit as st

from engine.contracts import SlipstreamError
from engine.settings import Settings, load_settings
from engine.store.database import Database


@st.cache_resource
def settings() -> Settings:
    """Read once; the supervisor hands the environment over."""
    return load_settings()


@st.cache_resource
def database() -> Database:
    """The pool that all sessions share."""
    url = settings().database_url
    if not url:
        raise SlipstreamError("The dashboard needs SLIPSTREAM_DATABASE_URL; `slipstream dashboard` sets it.")
    return Database(url, pool_size=4, application="slipstream dashboard")
