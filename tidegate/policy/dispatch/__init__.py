"""Who gets which replica, and who waits."""

from tidegate.policy.dispatch.events import (
    Arrived,
    ConfirmFence,
    Deadline,
    Demand,
    Effect,
    Ended,
    Event,
    Grant,
    Refuse,
    ReportDemand,
    Returned,
    SessionStarted,
)
from tidegate.policy.dispatch.room import Dispatch

__all__ = [
    "Arrived",
    "ConfirmFence",
    "Deadline",
    "Demand",
    "Dispatch",
    "Effect",
    "Ended",
    "Event",
    "Grant",
    "Refuse",
    "ReportDemand",
    "Returned",
    "SessionStarted",
]
