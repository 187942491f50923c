"""Whether a request was served as promised."""

from tidegate.domain.endpoint import Slo
from tidegate.domain.usage import UsageRecord

# Refusals that are no fault of the client: the endpoint was not available to it.
UNAVAILABLE = frozenset(
    {"queue_full", "engine_error", "endpoint_failed", "residency_denied", "capacity", "not_ready", "hold_expired"}
)


def within(slo: Slo, record: UsageRecord, *, streamed: bool) -> bool:
    """A stream is judged by its first token and by its pace from there on. Of a whole answer nobody saw the first
    token: it has the time that a stream within the SLO may take.
    """
    pace_ms = slo.tpot_ms * max(record.output_tokens - 1, 0)
    if not streamed:
        return record.ended_ms - record.arrived_ms <= slo.ttft_ms + pace_ms
    in_time = record.first_token_ms - record.arrived_ms <= slo.ttft_ms
    return in_time and record.ended_ms - record.first_token_ms <= pace_ms
