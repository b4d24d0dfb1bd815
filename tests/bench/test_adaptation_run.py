"""The whole adaptation benchmark on a tiny model: every stream, the decoded subsample, and the files it leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from engine.bench.adaptation import Options, run
from engine.settings import EngineSettings, LearnerSettings, Settings
from tests.tiny_model import write_tiny_model

CLASSES = ("chat", "code")


def test_from_prompts_to_report(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny")
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"question_id": n, "traffic_class": name, "turns": [f"{name} the {n} in a {n * n}"]}
        for name in CLASSES
        for n in range(36)
    ]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    chosen = Settings(
        home=tmp_path,
        engine=EngineSettings(model=str(tmp_path / "tiny"), dtype="float64", threads=1),
        learner=LearnerSettings(gate_share=0.5),
    )
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
    assert len({row["stream"] for row in served}) == 4
    again: list[str] = []
    run(
        chosen, Options(prompts=(prompts,), seeds=1, tokens=12, streams=("gradual",), verify=0, busy=True), again.append
    )
    assert any(line.startswith("generating") for line in said)
    assert not any(line.startswith("generating") for line in again)  # responses are kept
