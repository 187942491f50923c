"""Who gets which replica, and who waits."""

from tidegate.dispatch.elsewhere import Elsewhere
from tidegate.dispatch.events import (
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
from tidegate.dispatch.queue import served_tokens
from tidegate.dispatch.room import Dispatch

__all__ = [
    "Arrived",
    "ConfirmFence",
    "Deadline",
    "Demand",
    "Dispatch",
    "Effect",
    "Elsewhere",
    "Ended",
    "Event",
    "Grant",
    "Refuse",
    "ReportDemand",
    "Returned",
    "SessionStarted",
    "served_tokens",
]
