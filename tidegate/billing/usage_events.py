"""One request as an event for a metering system: CloudEvents 1.0 (what OpenMeter takes) and Lago's shape. Pure.

https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md,
https://openmeter.io/docs/metering/events/overview, https://getlago.com/docs/api-reference/events/batch. The id is the
request's, the same however often the event is sent; the time is the request's arrival, the instant that decides its
price and its period. A cost is never null.
"""

from typing import Any

from tidegate.billing.periods import iso
from tidegate.domain.ledger import Charged
from tidegate.domain.units import NANO_USD_PER_USD, usd

SOURCE = "tidegate"
TYPE = "tidegate.request"
LAGO_CODE = "tidegate_request"


def cloud_event(charged: Charged) -> dict[str, Any]:
    """`subject` is the tenant; (`source`, `id`) is unique."""
    return {
        "specversion": "1.0",
        "type": TYPE,
        "source": SOURCE,
        "id": charged.record.id,
        "time": iso(charged.record.arrived_ms),
        "subject": charged.record.tenant,
        "datacontenttype": "application/json",
        "data": data(charged),
    }


def lago_event(charged: Charged) -> dict[str, Any]:
    """The tenant is the subscription; the exact price is in `precise_total_amount_cents`, for dynamic charges."""
    record = charged.record
    cents, fraction = divmod(charged.nano_usd, NANO_USD_PER_USD // 100)
    return {
        "transaction_id": record.id,
        "external_subscription_id": record.tenant,
        "code": LAGO_CODE,
        "timestamp": f"{record.arrived_ms // 1000}.{record.arrived_ms % 1000:03d}",
        "precise_total_amount_cents": f"{cents}.{fraction:07d}",
        "properties": data(charged),
    }


def data(charged: Charged) -> dict[str, Any]:
    """Counts and ids, never text. Amounts are decimal text, exact."""
    record = charged.record
    return {
        "endpoint": record.endpoint,
        "model": record.model,
        "mode": record.mode,
        "region": record.region,
        "key": record.key,
        "api": record.api,
        "outcome": record.outcome.value,
        "input_tokens": record.input_tokens,
        "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
        "total_tokens": record.input_tokens + record.output_tokens,
        "duration_ms": max(record.ended_ms - record.arrived_ms, 0),
        "price_version": charged.price_version,
        "cost_usd": usd(charged.nano_usd),
        "currency": "USD",
    }
