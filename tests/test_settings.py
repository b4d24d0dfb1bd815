"""The configuration is strict, layered and documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.settings import SettingsError, environment_name, known_keys, load_settings, to_environment
from engine.speculation.artifact import MAX_K

DOCS = Path(__file__).parents[1] / "docs" / "settings.md"


def test_each_source_overrides_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("[engine]\nport = 1\nmax_queue = 5\nthreads = 3\n")
    env = {"SLIPSTREAM_ENGINE__PORT": "2", "SLIPSTREAM_ENGINE__MAX_QUEUE": "6"}
    found = load_settings(file, ["engine.port=3"], env)
    assert (found.engine.port, found.engine.max_queue, found.engine.threads) == (3, 6, 3)


@pytest.mark.parametrize(
    ("config", "flags", "env", "hint"),
    [
        ("[engine]\nprot = 1", [], {}, "engine.port"),
        ("", ["engin.port=1"], {}, "engine.port"),
        ("", [], {"SLIPSTREAM_ENGINE__PROT": "1"}, "SLIPSTREAM_ENGINE__PORT"),
        ("", [], {"SLIPSTREAM_DATABASE_URI": "x"}, "SLIPSTREAM_DATABASE_URL"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    tmp_path: Path, config: str, flags: list[str], env: dict[str, str], hint: str
) -> None:
    file = tmp_path / "s.toml"
    file.write_text(config)
    with pytest.raises(SettingsError, match=f"Did you mean {hint}"):
        load_settings(file, flags, env)


def test_a_value_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"engine\.port.*'abc'"):
        load_settings(None, ["engine.port=abc"], {})


def test_no_more_is_drafted_than_a_manifest_may_say() -> None:
    load_settings(None, [f"learner.num_speculative_tokens={MAX_K}"], {})
    with pytest.raises(SettingsError, match=r"learner\.num_speculative_tokens"):
        load_settings(None, [f"learner.num_speculative_tokens={MAX_K + 1}"], {})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError):
        load_settings(None, (), {}).engine.port = 1  # type: ignore[misc]


def test_a_child_process_reads_the_same_settings() -> None:
    chosen = load_settings(None, ["engine.port=77", "mlflow.enabled=false", "home=/x"], {})
    assert load_settings(None, (), to_environment(chosen)) == chosen


def test_mlflow_tracking_uri_is_honoured() -> None:
    assert load_settings(None, (), {"MLFLOW_TRACKING_URI": "http://m"}).mlflow_tracking_uri == "http://m"


def test_every_setting_is_documented() -> None:
    text = DOCS.read_text()
    missing = [key for key, _ in known_keys() if f"`{key}`" not in text or f"`{environment_name(key)}`" not in text]
    assert not missing, f"docs/settings.md lacks {missing}; `python -m engine.settings` prints its table"
    assert all(description for _, description in known_keys())
