"""What one request consumed. Counts, ids and instants only: never text."""

from dataclasses import dataclass
from enum import StrEnum, auto


class Outcome(StrEnum):
    """How a request ended. `OPEN` is a checkpoint of a stream still running; every other value is final."""

    OPEN = auto()
    COMPLETED = auto()
    CLIENT_ABORTED = auto()
    ENGINE_LOST = auto()
    GATEWAY_LOST = auto()
    REFUSED = auto()


class CountSource(StrEnum):
    """Where the output token count is from: the engine's usage, the number on the last event delivered, or
    the pieces of text delivered: one token each at least (a remote API's stream that was cut off).
    """

    NONE = auto()
    ENGINE_USAGE = auto()
    DELIVERED_EVENT = auto()
    DELIVERED_PIECES = auto()


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request. `id` is the request id and the idempotency key of billing.

    `input_tokens` includes `cached_tokens`. `output_tokens` is what the engine generated *and* the gateway sent on.
    Instants are epoch milliseconds; `queue_ms` and `activation_ms` are durations. `refusal` names the code when
    `outcome` is REFUSED. `gateway` is the gateway's boot id: when it is dead, its OPEN records are final. `endpoint`,
    `model` and `mode` are of the endpoint that served it, whose price counts; where that is not the one the tenant
    called, `overflow_from` is, and `overflow_reason` says why.
    """

    id: str
    gateway: str
    tenant: str
    key: str
    endpoint: str
    model: str
    mode: str
    region: str
    replica: str
    api: str
    outcome: Outcome
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    count_source: CountSource
    arrived_ms: int
    first_token_ms: int
    ended_ms: int
    queue_ms: int
    activation_ms: int
    refusal: str = ""
    overflow_from: str = ""
    overflow_reason: str = ""

    @property
    def billable(self) -> bool:
        """Not billed: a checkpoint, a refusal, and anything that failed before its first token."""
        if self.outcome is Outcome.COMPLETED:
            return True
        return self.output_tokens > 0 and self.outcome not in (Outcome.OPEN, Outcome.REFUSED)
