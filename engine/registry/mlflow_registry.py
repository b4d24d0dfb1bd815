"""MLflow as a mirror of Postgres: each learning attempt a run, each policy version a registered model version.

Nothing waits for MLflow. Learning and serving write Postgres; ``sync`` brings MLflow up to date whenever it answers,
and may be repeated or killed at any point: what it made is found again by tag. Aliases follow the ledger, never the
other way round.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from engine.contracts import PolicyVersion, SlipstreamError
from engine.registry import serving_metrics
from engine.registry.aliases import aliases, reconcile
from engine.registry.artifacts import ArtifactError, ArtifactStore
from engine.store.database import Database
from engine.store.repositories import export, learning, plans, policies
from engine.store.repositories.learning import Attempt
from engine.store.repositories.policies import Lineage

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL = "slipstream-draft"
CURSOR = "mlflow-registry"
"""Its row among the exporters: how much was shown, what is refused."""
ATTEMPT, VERSION = "attempt", "version"
Thing = tuple[str, int]
"""What MLflow is shown: one of the two words above, and its number."""
ATTEMPT_TAG = "slipstream.attempt"
DIGEST_TAG = "slipstream.digest"
ARTIFACT_PATH = "policy"
MAX_TAG = 5_000
"""Characters that every MLflow takes in a tag."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
"""MLflow's word for what would be wrong the next time too."""
ENOUGH = 3
"""Troubles of one look after which nothing more is shown until the next: where MLflow is away each try waits for its
time limit, and housekeeping with it."""
log = logging.getLogger(__name__)


def connect(tracking_uri: str, experiment: str) -> MlflowRegistry:
    """The registry behind an MLflow address; nothing is asked of it yet."""
    from mlflow import MlflowClient

    return MlflowRegistry(MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri), experiment)


class MlflowRegistry:
    def __init__(self, client: MlflowClient, experiment: str) -> None:
        self.client, self.experiment = client, experiment
        self._refused: dict[Thing, str] = {}
        """What could not be shown, and why; MLflow is offered it again by the next process."""
        self._lost: set[Thing] = set()
        """Those of them whose files are missing here: they are looked for again."""
        self._troubled: set[Thing] = set()
        """What met trouble that may pass: it is shown last, or ``ENOUGH`` of it would keep all others waiting."""

    def sync(self, db: Database, store: ArtifactStore) -> int:
        """Show in MLflow what it lacks, then point its aliases where the ledger points; how many things were made.

        Attempts that were refused by the gate are runs as well; only versions are registered. What MLflow will not have
        keeps nothing else from being shown; SlipstreamError at the end where there was trouble that may pass.
        """
        if not self.client.search_registered_models(f"name = '{MODEL}'", max_results=1):
            with db.write() as session:  # an MLflow that is new, or has lost what it had: it is shown all of it
                learning.clear_runs(session)
                policies.clear_mlflow(session)
                export.remove_cursors(session, serving_metrics.CURSOR)
            self._refused.clear()  # by one that is no more
            self._lost.clear()
            self._make_model()
        before, troubles = dict(self._refused), list[str]()
        made = self._show(db, store, troubles)
        if made or troubles or before != self._refused:
            self._report(db, made, troubles)
        self._point(db)
        if troubles:
            raise SlipstreamError(f"MLflow did not take {'; '.join(troubles)}")
        return made

    def _point(self, db: Database) -> None:
        """The aliases to where the ledger points."""
        with db.read() as session:
            plan = plans.latest(session)
            wanted = aliases(plan, plans.previous_champion(session, plan)) if plan is not None else {}
            numbers = {v.version: v.mlflow_version for v in policies.all_versions(session)}
        # A version that MLflow lacks yet leaves its alias where it is.
        known = {alias: numbers.get(v) if v else None for alias, v in wanted.items() if not v or numbers.get(v)}
        if known:
            reconcile(self.client, MODEL, known)

    def _show(self, db: Database, store: ArtifactStore, troubles: list[str]) -> int:
        """Every attempt and version that it lacks, oldest first; how many it has now that it had not."""
        from mlflow.exceptions import MlflowException

        refused = [number for kind, number in self._refused if kind == ATTEMPT]
        with db.read() as session:
            attempts = learning.without_run(session, refused)
            missing = [v for v in reversed(policies.all_versions(session)) if v.mlflow_version is None]
        experiment_id = self._experiment()
        steps: list[tuple[Thing, Callable[[], None]]] = [
            *(((ATTEMPT, a.id or 0), partial(self._mirror, db, experiment_id, a)) for a in attempts),
            *(((VERSION, v.version), partial(self._register, db, store, experiment_id, v)) for v in missing),
        ]
        made = 0
        for thing, show in sorted(steps, key=lambda step: step[0] in self._troubled):
            if thing in self._refused and thing not in self._lost:
                continue
            try:
                show()
            except ArtifactError as error:  # its files are missing here; they may come back
                self._lost.add(thing)
                self._refuse(thing, error)
            except MlflowException as error:
                if error.error_code in REFUSALS:
                    self._lost.discard(thing)
                    self._refuse(thing, error)
                else:
                    self._troubled.add(thing)
                    troubles.append(f"{' '.join(map(str, thing))}: {error}")
                    if len(troubles) == ENOUGH:
                        break
            else:
                self._refused.pop(thing, None)
                self._troubled.discard(thing)
                made += 1
        return made

    def _refuse(self, thing: Thing, error: Exception) -> None:
        if thing not in self._refused:
            log.error("%s %d is not shown in MLflow: %s", *thing, error)
        self._refused[thing] = str(error)

    def _report(self, db: Database, made: int, troubles: Sequence[str]) -> None:
        """For the dashboard: how much was shown, and what was not."""
        with db.write() as session:
            at = export.cursor(session, CURSOR)
            said = [*troubles, *(f"{kind} {n}: {why}" for (kind, n), why in self._refused.items())]
            moved = replace(at, exported=at.exported + made, refused=len(self._refused), error="; ".join(said) or None)
            export.save_cursor(session, moved, db.now())

    def _mirror(self, db: Database, experiment_id: str, attempt: Attempt) -> None:
        run_id = self._attempt_run(experiment_id, attempt)
        with db.write() as session:
            learning.set_run(session, attempt.id or 0, run_id)

    def _register(self, db: Database, store: ArtifactStore, experiment_id: str, version: PolicyVersion) -> None:
        """One version, found by its digest where an earlier try got as far as registering it."""
        found = self.client.search_model_versions(f"name = '{MODEL}' and tags.`{DIGEST_TAG}` = '{version.digest}'")
        if found:
            number, run_id = str(found[0].version), found[0].run_id
        else:
            run_id = self._version_run(db, store, experiment_id, version)
            made = self.client.create_model_version(
                MODEL,
                source=f"runs:/{run_id}/{ARTIFACT_PATH}",
                run_id=run_id,
                tags={
                    DIGEST_TAG: version.digest,
                    "slipstream.version": str(version.version),
                    "slipstream.kind": version.kind.value,
                },
                description=f"Slipstream policy v{version.version}: {version.kind.value}",
                await_creation_for=0,  # the files are there already
            )
            number = str(made.version)
        with db.write() as session:
            policies.set_mlflow(session, version.version, number, run_id)

    def _version_run(self, db: Database, store: ArtifactStore, experiment_id: str, version: PolicyVersion) -> str:
        """The run that holds a version's files: that of the attempt which made it, or, where none did, its own."""
        with db.read() as session:
            attempt = learning.of_version(session, version.version)
            lineage = [
                (part, policies.trace_ids(session, part.members)) for part in policies.lineage(session, version.version)
            ]
        if attempt is not None and (ATTEMPT, attempt.id) not in self._refused:
            run_id = attempt.mlflow_run_id or self._attempt_run(experiment_id, attempt)
        else:
            tags = {DIGEST_TAG: version.digest}
            name = f"v{version.version} {version.kind.value}"
            run_id = self._run(experiment_id, DIGEST_TAG, version.digest, tags, name)
            self._finish(run_id, "FINISHED")
        with tempfile.TemporaryDirectory() as folder:
            for name, data in store.files(version.digest).items():
                (Path(folder) / name).write_bytes(data)
            self.client.log_artifacts(run_id, folder, ARTIFACT_PATH)
        self._log_lineage(run_id, lineage)
        return run_id

    def _attempt_run(self, experiment_id: str, attempt: Attempt) -> str:
        began, ended = (int(t.timestamp() * 1000) for t in (attempt.started_at, attempt.finished_at))
        tags = {
            ATTEMPT_TAG: str(attempt.id),
            "slipstream.outcome": attempt.outcome,
            "slipstream.reason": attempt.reason[:MAX_TAG],
        }
        if attempt.version is not None:
            tags["slipstream.version"] = str(attempt.version)
        run_id = self._run(experiment_id, ATTEMPT_TAG, str(attempt.id), tags, f"attempt {attempt.id}", began)
        if self.client.get_run(run_id).info.status == "RUNNING":
            self._log(run_id, attempt, ended)
            self._finish(run_id, "FAILED" if attempt.outcome == learning.ERROR else "FINISHED", ended)
        return run_id

    def _log(self, run_id: str, attempt: Attempt, at_ms: int) -> None:
        from mlflow.entities import Metric, Param

        params = {
            "parent_version": attempt.parent_version,
            "train_traces": attempt.train_traces,
            "gate_traces": attempt.gate_traces,
            "through": attempt.through,
        }
        self.client.log_batch(
            run_id,
            metrics=[Metric(name, value, at_ms, 0) for name, value in metrics(attempt).items()],
            params=[Param(name, str(value)) for name, value in params.items()],
        )
        self.client.log_dict(run_id, attempt.gate, "gate.json")

    def _log_lineage(self, run_id: str, lineage: list[tuple[Lineage, list[UUID]]]) -> None:
        """Which traces taught and judged, as dataset inputs; every id in an artifact beside them."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        for part, trace_ids in lineage:
            ids = sorted(map(str, trace_ids))
            window = {"from": part.window_from.isoformat(), "to": part.window_to.isoformat()}
            dataset = Dataset(
                name=f"traces-{part.role}",
                digest=hashlib.sha256("".join(ids).encode()).hexdigest()[:32],
                source_type="postgres",
                source=json.dumps({"table": "traces", **window}),
                profile=json.dumps({"traces": len(ids), "classes": dict(part.classes)}),
            )
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", part.role)])])
            tree = {"role": part.role, **window, "classes": dict(part.classes), "trace_ids": ids}
            self.client.log_dict(run_id, tree, f"lineage/{part.role}.json")

    def _run(
        self, experiment_id: str, tag: str, value: str, tags: dict[str, str], name: str, began: int | None = None
    ) -> str:
        """The run with this tag, made on first use."""
        found = self.client.search_runs([experiment_id], f"tags.`{tag}` = '{value}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        made = self.client.create_run(experiment_id, start_time=began, tags=tags, run_name=name)
        return str(made.info.run_id)

    def _finish(self, run_id: str, status: str, ended: int | None = None) -> None:
        self.client.set_terminated(run_id, status, ended)

    def _experiment(self) -> str:
        """The experiment's id; one that was deleted is restored, for nothing can be shown in it otherwise."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            return str(self.client.create_experiment(self.experiment))
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
            log.warning("experiment %r had been deleted in MLflow and is restored", self.experiment)
        return str(found.experiment_id)

    def _make_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(
                MODEL, description="Draft policies of Slipstream; aliases mirror its ledger."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise


def metrics(attempt: Attempt) -> dict[str, float]:
    """The gate's numbers, flat, under names that MLflow takes."""
    costs = ("cpu_s", "learn_cpu_s", "gate_cpu_s", "export_cpu_s")
    found: dict[str, float] = {name: getattr(attempt, name) for name in costs}
    gate: Mapping[str, Any] = attempt.gate
    tables = {"all": gate.get("overall"), **(gate.get("classes") or {})}
    for segment, table in tables.items():
        for key, value in (table or {}).items():
            if value is not None:
                found[f"gate/{re.sub(r'[^A-Za-z0-9_.-]', '_', segment)}/{key}"] = float(value)
    for key in ("speedup", "net", "alpha"):
        if gate.get(key) is not None:
            found[f"gate/{key}"] = float(gate[key])
    return found
