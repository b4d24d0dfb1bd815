from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.app.hour import Hour


@pytest.fixture
def database_url(hour: Hour) -> Iterator[str]:
    """A command needs something to tell: a database with a believable hour in it."""
    with hour.copied() as url:
        yield url
