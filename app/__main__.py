"""`python -m app`: become the server of the dashboard."""

from __future__ import annotations

import os
import sys


def main() -> None:
    if not sys.flags.safe_path:  # a file of the working directory must not stand in for a package that Streamlit needs
        os.execv(sys.executable, [sys.executable, "-P", "-m", "app"])
    from app.server import serve

    serve()


main()
