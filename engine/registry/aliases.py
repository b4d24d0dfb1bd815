"""Where MLflow's aliases belong by the ledger, and how they get there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from engine.contracts import ServingPlan

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)


def aliases(plan: ServingPlan, previous: int | None) -> dict[str, int | None]:
    """Where the three aliases belong, by policy version; None means that the alias points nowhere."""
    canary = plan.canary
    return {"champion": plan.champion, "canary": canary.policy_version if canary else None, "previous": previous}


def reconcile(client: MlflowClient, model: str, wanted: Mapping[str, str | None]) -> list[str]:
    """Move every alias of a registered model that is not where it belongs; says which.

    None: it points nowhere; one that is not named stays. A model version that somebody deleted in MLflow
    keeps its alias from moving, and no other.
    """
    from mlflow.exceptions import MlflowException

    found = {str(k): str(v) for k, v in client.get_registered_model(model).aliases.items()}
    moved = []
    for alias, number in wanted.items():
        if found.get(alias) == number:
            continue
        try:
            if number is None:
                client.delete_registered_model_alias(model, alias)
            else:
                client.set_registered_model_alias(model, alias, number)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.error("alias %s stays where it is, MLflow has lost version %s of %s", alias, number, model)
            continue
        moved.append(alias)
    return moved
