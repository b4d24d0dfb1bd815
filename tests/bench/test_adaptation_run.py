"""The whole adaptation benchmark on a tiny model: every stream, the decoded subsample, and the files it leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from engine.bench.adaptation import Options, run
from engine.bench.adaptation.sabotage import OVERSHOT
from engine.bench.adaptation.streams import STREAMS
from engine.contracts import ProposerKind
from engine.learner.trainer import choose_vocabulary, fresh_weights
from engine.model.draft import DraftConfig
from engine.model.loading import load_target
from engine.settings import EngineSettings, LearnerSettings, Settings
from engine.speculation.artifact import build_artifact
from engine.speculation.neural_file import pack
from tests.tiny_model import write_tiny_model

CLASSES = ("chat", "code")


def test_a_neural_draft_is_static_and_hybrids_start_from_it(tmp_path: Path) -> None:
    chosen = tiny_world(tmp_path)
    target = load_target(chosen.engine.model, tmp_path, dtype="float64", threads=1)
    config = DraftConfig.of_target(target.config, 128)
    draft = pack(config, fresh_weights(config, target.model, 0), choose_vocabulary([], 128, 512))
    static = build_artifact(ProposerKind.NEURAL, 4, files=draft, target_fingerprint=target.fingerprint)
    (tmp_path / "static").mkdir()
    for name, data in static.items():
        (tmp_path / "static" / name).write_bytes(data)
    out = tmp_path / "out"
    options = Options(
        prompts=(tmp_path / "prompts.jsonl",), static=tmp_path / "static", streams=("shift", "recurring", "planted"),
        seeds=1, tokens=12, every=12, tune=8, tune_every=1, verify=1, busy=True, out=out,
    )  # fmt: skip
    report = run(chosen, options, [].append)
    figures = {figure.name: figure.value for figure in report.figures}
    for wanted in ("ratio:gated/static:shift:all", "ratio:gated/static+context:shift:all", "forgetting:recurring"):
        assert wanted in figures, sorted(figures)
    assert any(name.startswith("ratio:offline/static:shift:") for name in figures)
    assert figures["bad_updates_served"] <= figures["bad_updates_served:ungated"] > 0
    with (out / "attempts.csv").open() as file:
        planted = [row for row in csv.DictReader(file) if row["planted"]]
    assert OVERSHOT in {row["planted"] for row in planted}
    assert (out / "page.html").read_text().count("<td>planted</td>") == len(planted)
    assert figures["verified_answers_differing"] == 0
    with (out / "requests.csv").open() as file:
        served = list(csv.DictReader(file))
    assert {"static", "static+context"} <= {row["arm"] for row in served}
    assert max(int(row["version"]) for row in served if row["arm"] == "ungated") > 1


def tiny_world(folder: Path) -> Settings:
    """A tiny model, two classes of made-up prompts, and settings to learn quickly."""
    write_tiny_model(folder / "tiny")
    rows = [
        {"question_id": n, "traffic_class": name, "turns": [f"{name} the {n} in a {n * n}"]}
        for name in CLASSES
        for n in range(36)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Settings(
        home=folder,
        engine=EngineSettings(model=str(folder / "tiny"), dtype="float64", threads=1),
        learner=LearnerSettings(gate_share=0.5),
    )


def test_from_prompts_to_report(tmp_path: Path) -> None:
    chosen, prompts = tiny_world(tmp_path), tmp_path / "prompts.jsonl"
    out = tmp_path / "out"
    said: list[str] = []
    options = Options(prompts=(prompts,), seeds=1, tokens=12, every=12, verify=1, busy=True, out=out)
    report = run(chosen, options, said.append)
    names = {figure.name for figure in report.figures}
    for wanted in ("ratio:gated/static:shift:all", "forgetting:recurring", "ratio:gated/none:day0:code",
                   "bad_updates_served", "measured:gated/static:all", "computed:gated/static:all"):  # fmt: skip
        assert wanted in names, (wanted, sorted(names))
    assert any(name.startswith("recovery_requests:shift:") for name in names)
    differing = next(f for f in report.figures if f.name == "verified_answers_differing")
    assert differing.value == 0  # no draft changes an answer
    assert json.loads((out / "figures.json").read_text())["bench"] == "adaptation"
    assert "plotly" in (out / "page.html").read_text().lower()
    with (out / "requests.csv").open() as file:
        served = list(csv.DictReader(file))
    assert {row["arm"] for row in served} == {"none", "ngram", "static", "ungated", "gated"}
    assert {row["stream"] for row in served} == set(STREAMS)
    again: list[str] = []
    run(
        chosen, Options(prompts=(prompts,), seeds=1, tokens=12, streams=("gradual",), verify=0, busy=True), again.append
    )
    assert any(line.startswith("generating") for line in said)
    assert not any(line.startswith("generating") for line in again)  # responses are kept
