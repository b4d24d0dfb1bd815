"""The check runs types beside tests, and lets neither fail unseen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from engine.cli.check import types_beside_tests

RIGHT, WRONG = "print('no issues')", "import sys; sys.exit('x.py:1: error: wrong')"
PASS, FAIL = "print('1 passed')", "import sys; print('1 failed'); sys.exit(1)"
AFTER_THE_TESTS = f"import os, time\nwhile os.path.exists('going'): time.sleep(.01)\n{WRONG}"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_tests_have_the_last_word_where_both_are_right(capfd: pytest.CaptureFixture[str]) -> None:
    types_beside_tests(python(RIGHT), python(PASS))
    assert capfd.readouterr().out.endswith("1 passed\n")


@pytest.mark.parametrize(
    ("types", "tests", "says"),
    [
        (RIGHT, FAIL, "tests failed"),
        (WRONG, PASS, "x.py:1: error: wrong\nslipstream-check: types failed"),
        (WRONG, FAIL, "x.py:1: error: wrong\nslipstream-check: types failed"),
        (AFTER_THE_TESTS, "import os; os.unlink('going')", "x.py:1: error: wrong"),
    ],
)
def test_what_fails_is_said(types: str, tests: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("going").touch()
    with pytest.raises(SystemExit, match=says):
        types_beside_tests(python(types), python(tests))
