"""Builders shared by the tests of journal, ledger and billing."""

from dataclasses import dataclass, replace

from tidegate.domain.ledger import RatedUsage
from tidegate.domain.money_ports import LedgerPage
from tidegate.domain.ports import Cursor
from tidegate.domain.price import PriceVersion
from tidegate.domain.usage import CountSource, Outcome, UsageRecord
from tidegate.money.prices import PriceTable
from tidegate.money.rating import rate

HOUR_MS = 3_600_000
NOVEMBER_MS = 1_793_491_200_000  # 2026-11-01T00:00:00Z
DECEMBER_MS = NOVEMBER_MS + 30 * 24 * HOUR_MS

_RECORD = UsageRecord(
    id="r", gateway="boot-1", tenant="acme", key="key-1", endpoint="acme/chat", model="m@1",
    mode="dedicated_serverless", region="local", replica="acme/chat-1", api="chat", outcome=Outcome.COMPLETED,
    input_tokens=10, cached_tokens=0, output_tokens=5, count_source=CountSource.ENGINE_USAGE, arrived_ms=NOVEMBER_MS,
    first_token_ms=NOVEMBER_MS + 20, ended_ms=NOVEMBER_MS + 90, queue_ms=0, activation_ms=0,
)  # fmt: skip

_PRICE = PriceVersion(
    id=1, plan="default", effective_ms=0, input_nano_usd=200, cached_input_nano_usd=20, output_nano_usd=800,
    accelerator_hour_nano_usd=3_600_000_000,
)  # fmt: skip


@dataclass
class StillClock:
    """Stands where it is put."""

    at_ms: int = NOVEMBER_MS

    def now_ms(self) -> int:
        return self.at_ms


def usage(record_id: str, **changes: object) -> UsageRecord:
    return replace(_RECORD, id=record_id, **changes)  # type: ignore[arg-type]


def price(**changes: object) -> PriceVersion:
    return replace(_PRICE, **changes)  # type: ignore[arg-type]


def rated(*records: UsageRecord, prices: PriceTable | None = None) -> tuple[RatedUsage, ...]:
    table = prices or PriceTable([price()])
    return tuple(rate(record, table.in_force("default", record.arrived_ms)) for record in records)


def page(
    start: Cursor, *records: UsageRecord, checkpoints: tuple[UsageRecord, ...] = (), prices: PriceTable | None = None
) -> LedgerPage:
    """A page that moves the cursor on by as many bytes as it has records."""
    following = Cursor(start.boot, start.segment, start.offset + len(records) + len(checkpoints))
    return LedgerPage(start, following, rated(*records, prices=prices), checkpoints)
