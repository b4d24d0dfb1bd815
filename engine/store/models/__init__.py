"""The schema, as SQLAlchemy models. Alembic makes it; nothing else does.

Every table has one writer, named in its docstring. Append-only tables are never updated.
"""

from engine.store.models.base import Base
from engine.store.models.correctness import OutputAuditRow, OutputMismatchRow
from engine.store.models.findings import DriftFindingRow
from engine.store.models.learning import LearningAttemptRow, LearningCursorRow, LearningIntakeRow, TenantSettingRow
from engine.store.models.plans import PlanObservationRow, ReplicaRow, ServingPlanRow
from engine.store.models.policies import PolicyLineageRow, PolicyVersionRow
from engine.store.models.rollouts import (
    ComparedKeyRow,
    ComparisonRow,
    LeaseRow,
    NotificationCursorRow,
    RolloutCommandRow,
    RolloutDecisionRow,
    RolloutRow,
)
from engine.store.models.rollups import (
    RollupDayHistogramRow,
    RollupDayRow,
    RollupDeltaHistogramRow,
    RollupDeltaRow,
    RollupHourHistogramRow,
    RollupHourRow,
    RollupMinuteHistogramRow,
    RollupMinuteRow,
    RollupTenMinutesHistogramRow,
    RollupTenMinutesRow,
)
from engine.store.models.shadow import ShadowRequestRow
from engine.store.models.traces import (
    ExportCursorRow,
    TraceBatchRow,
    TracePayloadRow,
    TraceRow,
)

__all__ = [
    "Base",
    "ComparedKeyRow",
    "ComparisonRow",
    "DriftFindingRow",
    "ExportCursorRow",
    "LearningAttemptRow",
    "LearningCursorRow",
    "LearningIntakeRow",
    "LeaseRow",
    "NotificationCursorRow",
    "OutputAuditRow",
    "OutputMismatchRow",
    "PlanObservationRow",
    "PolicyLineageRow",
    "PolicyVersionRow",
    "ReplicaRow",
    "RolloutCommandRow",
    "RolloutDecisionRow",
    "RolloutRow",
    "RollupDayHistogramRow",
    "RollupDayRow",
    "RollupDeltaHistogramRow",
    "RollupDeltaRow",
    "RollupHourHistogramRow",
    "RollupHourRow",
    "RollupMinuteHistogramRow",
    "RollupMinuteRow",
    "RollupTenMinutesHistogramRow",
    "RollupTenMinutesRow",
    "ServingPlanRow",
    "ShadowRequestRow",
    "TenantSettingRow",
    "TraceBatchRow",
    "TracePayloadRow",
    "TraceRow",
]
