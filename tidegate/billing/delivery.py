"""Usage events delivered to an HTTP collector (OpenMeter, Lago): each at least once, in the ledger's order.

How far a collector has got is in the ledger; so a restart goes on where it was, and what was sent but not acknowledged
is sent again under the same id, which collectors drop (OpenMeter by (source, id), Lago by transaction_id). What a
collector says it will never take goes to a dead-letter file, one event at a time: a batch it refuses is halved until
the culprit is alone. Everything else (unreachable, slow, 401, 404, 429, 5xx) is tried again for ever, with growing
pauses.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, assert_never

import httpx
import msgspec

from tidegate.billing.metrics import BillingMetrics
from tidegate.billing.usage_events import cloud_event, lago_event
from tidegate.domain.errors import StoreFault
from tidegate.domain.ledger import Charged
from tidegate.domain.money_ports import DeadLetters, Ledger

log = logging.getLogger(__name__)

BATCH_EVENTS_MAX = 100  # Lago's own bound
ANSWER_MS_MAX = 15_000
ANSWER_BYTES_MAX = 64 << 10
PAUSE_MS_MIN = 500
PAUSE_MS_MAX = 300_000
RETRY_AFTER_MS_MAX = 3_600_000
IDLE_MS = 1_000


class Shape(Enum):
    """What a collector takes, and what it calls a batch."""

    CLOUDEVENTS = "cloudevents"
    LAGO = "lago"


@dataclass(frozen=True, slots=True)
class Collector:
    """`name` is what its progress is kept under; `token` goes out as a bearer token and is shown nowhere."""

    name: str
    url: str
    shape: Shape = Shape.CLOUDEVENTS
    token: str = ""

    def __repr__(self) -> str:
        return f"Collector({self.name!r}, {self.url!r}, {self.shape})"


class Answer(Enum):
    TAKEN = auto()
    REFUSED = auto()  # these events, whenever they are sent
    LATER = auto()


@dataclass(frozen=True, slots=True)
class Reply:
    answer: Answer
    why: str = ""
    pause_ms: int = 0


class Delivery:
    def __init__(
        self,
        collector: Collector,
        ledger: Ledger,
        dead_letters: DeadLetters,
        metrics: BillingMetrics,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._collector = collector
        self._ledger = ledger
        self._dead_letters = dead_letters
        self._metrics = metrics
        self._sleep = sleep

    async def run(self) -> None:
        """Until cancelled."""
        pause_ms = PAUSE_MS_MIN
        async with httpx.AsyncClient(timeout=ANSWER_MS_MAX / 1_000, follow_redirects=False) as client:
            while True:
                try:
                    reply = await self.turn(client)
                except StoreFault as fault:
                    reply = Reply(Answer.LATER, fault.reason)
                if reply is None:
                    pause_ms = PAUSE_MS_MIN
                    await self._sleep(IDLE_MS / 1_000)
                elif reply.answer is Answer.LATER:
                    log.warning("usage events for %s wait: %s", self._collector.name, reply.why)
                    await self._sleep(max(pause_ms, reply.pause_ms) / 1_000)
                    pause_ms = min(pause_ms * 2, PAUSE_MS_MAX)
                else:
                    pause_ms = PAUSE_MS_MIN

    async def turn(self, client: httpx.AsyncClient) -> Reply | None:
        """Delivers the next batch; None when there is nothing to deliver. Raises StoreFault."""
        name = self._collector.name
        done = await asyncio.to_thread(self._ledger.delivered, name)
        events = await asyncio.to_thread(self._ledger.records_after, done, BATCH_EVENTS_MAX)
        if not events:
            return None
        parts = deque([events])
        while parts:
            part = parts.popleft()
            reply = await self._post(client, part)
            match reply.answer:
                case Answer.TAKEN:
                    self._metrics.events.labels(name, "delivered").inc(len(part))
                case Answer.REFUSED if len(part) > 1:
                    parts.extendleft((part[len(part) // 2 :], part[: len(part) // 2]))
                    continue
                case Answer.REFUSED:
                    await asyncio.to_thread(self._dead_letters.append, name, reply.why, self._event(part[0]))
                    self._metrics.events.labels(name, "dead").inc()
                    log.error("a usage event is refused by %s and kept aside: %s", name, reply.why)
                case Answer.LATER:
                    self._metrics.events.labels(name, "retried").inc(len(part))
                    return reply
                case _:
                    assert_never(reply.answer)
            await asyncio.to_thread(self._ledger.set_delivered, name, part[-1].number)
        return Reply(Answer.TAKEN)

    async def _post(self, client: httpx.AsyncClient, part: Sequence[Charged]) -> Reply:
        kind, body = self._body([self._event(charged) for charged in part])
        headers = {"content-type": kind}
        if self._collector.token:
            headers["authorization"] = f"Bearer {self._collector.token}"
        try:
            async with asyncio.timeout(ANSWER_MS_MAX / 1_000):  # also for one that answers a byte at a time
                async with client.stream("POST", self._collector.url, content=body, headers=headers) as response:
                    text = b""
                    async for chunk in response.aiter_bytes():
                        text += chunk
                        if len(text) > ANSWER_BYTES_MAX:
                            break
        except TimeoutError:
            return Reply(Answer.LATER, f"no answer within {ANSWER_MS_MAX} ms")
        except httpx.HTTPError as error:
            return Reply(Answer.LATER, type(error).__name__)
        return judge(response.status_code, response.headers.get("retry-after", ""), text, alone=len(part) == 1)

    def _event(self, charged: Charged) -> dict[str, Any]:
        match self._collector.shape:
            case Shape.CLOUDEVENTS:
                return cloud_event(charged)
            case Shape.LAGO:
                return lago_event(charged)

    def _body(self, events: list[dict[str, Any]]) -> tuple[str, bytes]:
        match self._collector.shape:
            case Shape.CLOUDEVENTS:
                return "application/cloudevents-batch+json", msgspec.json.encode(events)
            case Shape.LAGO:
                return "application/json", msgspec.json.encode({"events": events})


def judge(status: int, retry_after: str, body: bytes, *, alone: bool) -> Reply:
    """What an answer means. Refused are only those answers that speak of the events themselves."""
    why = f"status {status}"
    if 200 <= status < 300 or status == 409:  # 409: it has them
        return Reply(Answer.TAKEN)
    if status == 422 and alone and b"value_already_exist" in body:  # Lago's word for the same
        return Reply(Answer.TAKEN)
    if status in (400, 413, 415, 422):
        return Reply(Answer.REFUSED, why)
    seconds = int(retry_after) if retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10 else 0
    return Reply(Answer.LATER, why, min(seconds * 1_000, RETRY_AFTER_MS_MAX))
