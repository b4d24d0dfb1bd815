"""One strict, frozen configuration: defaults < TOML file < environment (``SLIPSTREAM_…``) < flags (``--set a.b=c``).

Nested keys are written ``engine.port`` in flags and ``SLIPSTREAM_ENGINE__PORT`` in the environment. An unknown key,
wherever it stands, is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from engine.contracts import Objectives, SlipstreamError

ENV_PREFIX = "SLIPSTREAM_"
CONFIG_FILE = "slipstream.toml"


class SettingsError(SlipstreamError):
    """The configuration is wrong: says which key, from where, and what would be right."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(Section):
    host: str = Field("127.0.0.1", description="address the OpenAI-compatible API listens on")
    port: int = Field(8100, ge=0, le=65535, description="port of the API; 0 takes a free one")
    replica_id: str = Field("replica-0", description="name of this replica in every trace and plan observation")
    model: str = Field(
        "SmolLM2-135M-Instruct", description="a local folder, a Hugging Face id, or the packaged default"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        "auto", description="dtype of weights and KV cache; auto: bfloat16 where the hardware or a kernel multiplies it"
    )
    weights: Literal["checkpoint", "int8"] = Field(
        "checkpoint",
        description="int8 rounds them, 32 to a scale: faster on a CPU without bfloat16, and another model to learn for",
    )
    device: str = Field("auto", description="auto takes CUDA where there is one, else the CPU")
    threads: int = Field(0, ge=0, description="torch threads; 0 takes every core this process may use")
    kernels: bool = Field(True, description="bfloat16 on a CPU: compile kernels at start where there is a C compiler")
    cuda_graphs: bool = Field(
        True, description="on CUDA: capture the passes of each batch size once and replay them; off: call each kernel"
    )
    max_num_seqs: PositiveInt = Field(16, description="requests decoded together in one step")
    max_model_len: PositiveInt = Field(2048, description="longest prompt plus output, tokens")
    kv_tokens: int = Field(
        0, ge=0, description="tokens that all running requests may hold together; 0: as many as fit max_num_seqs"
    )
    prefill_chunk: PositiveInt = Field(256, description="prompt tokens of one sequence computed in one step")
    max_queue: PositiveInt = Field(256, description="requests that may wait; beyond it the answer is 429")
    max_body_bytes: PositiveInt = Field(2_000_000, description="largest request body")
    request_timeout_s: PositiveFloat = Field(300.0, description="a request that runs longer ends with status timeout")
    plan_poll_s: PositiveFloat = Field(1.0, description="ledger poll interval beside LISTEN/NOTIFY, seconds")
    plan_lease_s: PositiveFloat = Field(60.0, description="silence of the ledger after which canary traffic goes home")
    audit_tokens_per_minute: int = Field(
        3_000,
        ge=0,
        description="tokens of served responses that are compared with the target's own in idle time; 0: none",
    )


class TelemetrySettings(Section):
    payloads: bool = Field(True, description="keep token ids of prompts and outputs (needed for learning)")
    queue_records: PositiveInt = Field(
        20_000, description="trace records that may wait for the writer; more are dropped and counted"
    )
    batch_records: PositiveInt = Field(500, description="records in one COPY")
    batch_delay_s: PositiveFloat = Field(1.0, description="longest a record waits for its batch to fill")
    spill_max_bytes: PositiveInt = Field(
        2_000_000_000, description="largest spill folder; beyond it records are dropped and counted"
    )
    retention_days: PositiveInt = Field(30, description="days of traces and of finer rollups kept")
    payload_retention_days: PositiveInt = Field(7, description="days of payloads kept")
    rollup_retention_days: PositiveInt = Field(400, description="days of rollups per hour and day kept")
    objective_ttft_s: PositiveFloat = Field(1.0, description="goodput counts requests with at most this TTFT, seconds")
    objective_tpot_s: PositiveFloat = Field(0.1, description="… and at most this TPOT, seconds")

    @property
    def objectives(self) -> Objectives:
        return Objectives(self.objective_ttft_s, self.objective_tpot_s)


class LearnerSettings(Section):
    enabled: bool = Field(True, description="whether `slipstream up` starts a learner")
    kind: Literal["memory", "hybrid"] = Field(
        "memory", description="what candidates are: a trace memory, or one beside a neural draft that is tuned"
    )
    tune_requests: NonNegativeInt = Field(
        96, description="requests that one candidate tunes its neural draft on; 0 leaves the draft as it is"
    )
    every_requests: PositiveInt = Field(
        80, description="a further candidate is made after this many new trainable requests"
    )
    min_requests: PositiveInt = Field(64, description="the first candidate is made after this many trainable requests")
    window_requests: PositiveInt = Field(
        4_000, description="requests a candidate learns from: half the newest, half a sample of each class before"
    )
    gate_share: float = Field(0.25, gt=0, lt=1, description="share of requests held out for the gate, by request hash")
    memory_max_bytes: PositiveInt = Field(16_000_000, description="bound on a trace memory")
    memory_half_life: PositiveInt = Field(
        1_024, description="later requests of its class after which a sighting in a trace memory counts half"
    )
    num_speculative_tokens: PositiveInt = Field(
        8, le=32, description="K of the policies it makes; K control verifies less"
    )
    worst_class_drop: float = Field(
        0.02, ge=0, description="a class may lose this share of accepted tokens per step at most"
    )
    poll_s: PositiveFloat = Field(2.0, description="how often it looks for new traces, seconds")
    duty_cycle: float = Field(
        0.1, gt=0, le=1, description="largest share of one core that learning may take; of two, a tenth is 5 %"
    )
    price_per_hour: float | None = Field(
        None, ge=0, description="what an hour of the serving machine costs; with it, learning is accounted in money"
    )
    auto_rollout: bool = Field(True, description="start a rollout for every version that passed the gate")


class RolloutSettings(Section):
    preset: Literal["cautious", "standard", "fast"] = Field(
        "standard", description="guards and steps of automatic rollouts"
    )
    tick_s: PositiveFloat = Field(1.0, description="how often the controller decides, seconds")
    lease_s: PositiveFloat = Field(15.0, description="how long one controller holds the right to act, seconds")
    webhook_url: str | None = Field(None, description="gets a POST at every transition of a rollout")
    webhook_secret: str | None = Field(None, description="signs those: HMAC-SHA256 over timestamp, dot, body")
    notify_command: str | None = Field(
        None, description="a program run at every transition of a rollout, JSON on its standard input"
    )


class MlflowSettings(Section):
    enabled: bool = Field(True, description="whether `slipstream up` starts an MLflow server and exporter")
    host: str = Field("127.0.0.1", description="address of the MLflow server that `slipstream up` starts")
    port: int = Field(5100, ge=0, le=65535, description="its port")
    experiment: str = Field("slipstream", description="experiment that holds learning attempts and traces")
    export_batch: PositiveInt = Field(64, description="traces in one OTLP request")
    export_share: float = Field(
        1.0, ge=0, le=1, description="share of ordinary traces exported; errors, slow and canary always are"
    )


class DashboardSettings(Section):
    host: str = Field("127.0.0.1", description="address of the dashboard")
    port: int = Field(8501, ge=0, le=65535, description="its port")
    refresh_s: PositiveFloat = Field(
        5.0, description="a page's newest figures are drawn again this often, seconds; charts and tables every 15 s"
    )


class Settings(Section):
    home: Path = Field(
        Path("~/.local/share/slipstream"), description="data directory: Postgres, models, policies, spill, logs"
    )
    database_url: str | None = Field(None, description="any PostgreSQL 16+; without it an embedded one runs in home")
    mlflow_tracking_uri: str | None = Field(None, description="an MLflow server of yours; also MLFLOW_TRACKING_URI")
    yielding: bool = Field(
        True,
        description="dashboard, learner, MLflow and housekeeping yield the processor to serving; off: all are equal",
    )
    engine: EngineSettings = EngineSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    learner: LearnerSettings = LearnerSettings()
    rollout: RolloutSettings = RolloutSettings()
    mlflow: MlflowSettings = MlflowSettings()
    dashboard: DashboardSettings = DashboardSettings()

    @property
    def home_path(self) -> Path:
        return self.home.expanduser().absolute()

    def dir(self, name: str) -> Path:
        """A folder of the data directory, made on first use."""
        path = self.home_path / name
        path.mkdir(parents=True, exist_ok=True)
        return path


def load_settings(
    config: Path | None = None,
    flags: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read the configuration once.

    ``flags`` are ``section.key=value`` texts; ``config`` defaults to ./slipstream.toml where there is one.
    """
    environ = os.environ if environ is None else environ
    known = dict(known_keys())
    values: dict[str, Any] = {}
    for source, pairs in (
        ("file", _from_file(config or _config_from(environ))),
        ("environment", _from_environment(environ, known)),
        ("flag", _from_flags(flags)),
    ):
        for key, value in pairs:
            if key not in known:
                raise SettingsError(_unknown(key, source, known))
            _put(values, key, value)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise SettingsError("The configuration does not fit:\n  " + "\n  ".join(lines)) from None


def known_keys() -> Iterator[tuple[str, str]]:
    """Every setting as (dotted key, description): what documentation and hints are made of."""
    for name, info in Settings.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            for key, sub in section.model_fields.items():
                yield f"{name}.{key}", sub.description or ""
        else:
            yield name, info.description or ""


def environment_name(key: str) -> str:
    """``engine.port`` → ``SLIPSTREAM_ENGINE__PORT``."""
    return ENV_PREFIX + key.replace(".", "__").upper()


def to_environment(settings: Settings) -> dict[str, str]:
    """The environment under which a child process reads these very settings."""
    env: dict[str, str] = {}
    for key, _ in known_keys():
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        if value is not None:
            env[environment_name(key)] = str(value).lower() if isinstance(value, bool) else str(value)
    return env


def child_environment(settings: Settings) -> dict[str, str]:
    """The environment of this process, with these settings in place of whatever it said of Slipstream."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return kept | to_environment(settings)


def _config_from(environ: Mapping[str, str]) -> Path | None:
    named = environ.get(ENV_PREFIX + "CONFIG")
    if named:
        return Path(named)
    return Path(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else None


def _from_file(path: Path | None) -> Iterator[tuple[str, Any]]:
    if path is None:
        return
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"No configuration file {path}. Write one, or leave --config out.") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from None
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", sub) for key, sub in value.items())
        else:
            yield name, value


def _from_environment(environ: Mapping[str, str], known: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    if uri := environ.get("MLFLOW_TRACKING_URI"):
        yield "mlflow_tracking_uri", uri
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX) and name != ENV_PREFIX + "CONFIG":
            yield name.removeprefix(ENV_PREFIX).lower().replace("__", "."), value


def _from_flags(flags: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for flag in flags:
        key, sign, value = flag.partition("=")
        if not sign:
            raise SettingsError(f"--set takes KEY=VALUE, got {flag!r}; for example --set engine.port=8200")
        yield key.strip(), value.strip()


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    if dot:
        values.setdefault(section, {})[name] = value
    else:
        values[section] = value


def _unknown(key: str, source: str, known: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    written = environment_name(key) if source == "environment" else key
    hint = environment_name(near[0]) if near and source == "environment" else (near[0] if near else None)
    return f"Unknown setting {written} ({source})." + (f" Did you mean {hint}?" if hint else " See docs/settings.md.")


def table() -> str:
    """The table of docs/settings.md."""
    rows = ["| key | environment | default | what it is |", "|---|---|---|---|"]
    defaults: Any
    for key, description in known_keys():
        defaults = Settings()
        for part in key.split("."):
            defaults = getattr(defaults, part)
        shown = "" if defaults is None else f"`{str(defaults).lower() if isinstance(defaults, bool) else defaults}`"
        rows.append(f"| `{key}` | `{environment_name(key)}` | {shown} | {description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
