"""The life of one replica: one table, (state, event) → state. The node supervisor is its only writer.

    STOPPED ──start──▶ STARTING ──ready──▶ READY ──drain──▶ DRAINING ──drained──▶ SLEEPING
                                             ▲                                       │ asleep
                                             └──ready── WAKING ◀──wake── ASLEEP ◀────┘
    DRAINING, ASLEEP ──stop──▶ STOPPING ──exited──▶ STOPPED;  DRAINING ──resume──▶ READY (before anything was freed)
    any living state ──exited──▶ STOPPED;  any living state ──fail──▶ FAILED ──exited──▶ STOPPED
STARTING and WAKING include the canary: a replica is READY only once it has answered it rightly.
"""

from enum import StrEnum, auto


class ReplicaState(StrEnum):
    STOPPED = auto()
    STARTING = auto()
    READY = auto()
    DRAINING = auto()
    SLEEPING = auto()
    ASLEEP = auto()
    WAKING = auto()
    STOPPING = auto()
    FAILED = auto()


class ReplicaEvent(StrEnum):
    START = auto()
    READY = auto()
    DRAIN = auto()
    RESUME = auto()
    DRAINED = auto()
    ASLEEP = auto()
    WAKE = auto()
    STOP = auto()
    FAIL = auto()
    EXITED = auto()


class IllegalTransition(AssertionError):
    """A bug: an event was let through that the state forbids."""


S, E = ReplicaState, ReplicaEvent

TRANSITIONS: dict[tuple[ReplicaState, ReplicaEvent], ReplicaState] = (
    {
        (S.STOPPED, E.START): S.STARTING,
        (S.STARTING, E.READY): S.READY,
        (S.READY, E.DRAIN): S.DRAINING,
        (S.DRAINING, E.RESUME): S.READY,
        (S.DRAINING, E.DRAINED): S.SLEEPING,
        (S.DRAINING, E.STOP): S.STOPPING,
        (S.SLEEPING, E.ASLEEP): S.ASLEEP,
        (S.ASLEEP, E.WAKE): S.WAKING,
        (S.WAKING, E.READY): S.READY,
        (S.ASLEEP, E.STOP): S.STOPPING,
        (S.FAILED, E.STOP): S.STOPPING,
    }
    | {(s, E.FAIL): S.FAILED for s in S if s not in (S.STOPPED, S.FAILED, S.STOPPING)}
    | {(s, E.EXITED): S.STOPPED for s in S if s is not S.STOPPED}
)

# Work on the way to READY: never a victim, counts as capacity that is coming.
COMING = frozenset({S.STARTING, S.WAKING})


def step(state: ReplicaState, event: ReplicaEvent) -> ReplicaState:
    """The next state. Raises IllegalTransition, which is a bug of the caller, where the table has no such arrow."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event} in {state}") from None
