"""`python -m app`: become the Streamlit server of the dashboard."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine.settings import load_settings


def main() -> None:
    dashboard = load_settings().dashboard
    script = str(Path(__file__).with_name("main.py"))
    # -P: a file of the working directory must not stand in for a package that Streamlit needs.
    argv = [sys.executable, "-P", "-m", "streamlit", "run", script]
    argv += ["--server.address", dashboard.host, "--server.port", str(dashboard.port)]
    os.execv(sys.executable, argv)


main()
