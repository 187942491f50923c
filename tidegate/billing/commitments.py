"""The books of contracts: lapses and minimums when they are due, alerts where thresholds are crossed."""

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace

import httpx
import msgspec

from tidegate.domain.contract import Alert, Contract, Drawn
from tidegate.domain.errors import StoreFault
from tidegate.domain.limits import Window
from tidegate.domain.money_ports import Contracts, Ledger
from tidegate.domain.ports import Clock
from tidegate.money.drawdown import GRACE_MS, Commitments, crossed, lapse, minimum
from tidegate.quota.windows import bounds
from tidegate.wire import webhooks

LOOK_MS = 1_000
TRIES_MAX = 12
PAUSE_MS_MIN, PAUSE_MS_MAX = 1_000, 3_600_000  # four times longer after each try: given up after about eight hours
ANSWER_S_MAX = 10.0

log = logging.getLogger(__name__)


class ContractBooks:
    """Owned by the ingest's thread. Remembers only what need not be looked at again."""

    def __init__(self, contracts: Contracts, ledger: Ledger) -> None:
        self._contracts = contracts
        self._ledger = ledger
        self._crossed: set[tuple[str, int]] = set()
        self._settled: set[tuple[str, int]] = set()

    def load(self) -> Commitments:
        return Commitments(self._contracts.all())

    def keep(self, all_: Iterable[tuple[Contract, Drawn]], now_ms: int) -> None:
        """Once the journals are read to their ends. Raises StoreFault."""
        for contract, drawn in all_:
            percents = crossed(contract, drawn)
            if {(contract.id, percent) for percent in percents} - self._crossed:
                self._contracts.cross(contract.id, percents, now_ms)
                self._crossed.update((contract.id, percent) for percent in percents)
            if (due := lapse(contract, drawn, now_ms)) is not None:
                adjustment, after = due
                self._contracts.lapse(contract.id, drawn, after, adjustment)
            if contract.minimum_month_nano_usd:
                self._keep_minimum(contract, now_ms)

    def _keep_minimum(self, contract: Contract, now_ms: int) -> None:
        """Of every whole month of the contract that is over, an hour after its end; posted once."""
        start_ms, end_ms = bounds(Window.MONTH, contract.starts_ms)
        while end_ms <= min(contract.expires_ms, now_ms - GRACE_MS):
            if start_ms >= contract.starts_ms and (contract.id, start_ms) not in self._settled:
                sums = [cell for _, cell in self._ledger.sums(start_ms, end_ms, contract.tenant)]
                used = sum(cell.total_nano_usd + cell.drawn_nano_usd for cell in sums)
                if (due := minimum(contract, (start_ms, end_ms), used)) is not None:
                    self._contracts.adjust([due])
                self._settled.add((contract.id, start_ms))
            start_ms, end_ms = bounds(Window.MONTH, end_ms)


class Alerts:
    """Tells of crossed thresholds by signed webhook (www.standardwebhooks.com), until a receiver takes it or for
    `TRIES_MAX` tries; how far it got is in the database, so a restart goes on there.
    """

    def __init__(self, contracts: Contracts, clock: Clock) -> None:
        self._contracts = contracts
        self._clock = clock

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=ANSWER_S_MAX, follow_redirects=False) as client:
            while True:
                try:
                    await self.deliver(client)
                except StoreFault as fault:
                    log.warning("alerts wait: %s", fault.reason)
                await asyncio.sleep(LOOK_MS / 1_000)

    async def deliver(self, client: httpx.AsyncClient) -> None:
        """One try for each alert that is due. Raises StoreFault."""
        alerts = await asyncio.to_thread(self._contracts.alerts)
        if not alerts:
            return
        known = {contract.id: (contract, drawn) for contract, drawn in await asyncio.to_thread(self._contracts.all)}
        for alert in alerts:
            if alert.next_ms <= self._clock.now_ms():
                contract, drawn = known[alert.contract]
                await asyncio.to_thread(self._contracts.alerted, await self._try(client, alert, contract, drawn))

    async def _try(self, client: httpx.AsyncClient, alert: Alert, contract: Contract, drawn: Drawn) -> Alert:
        now_ms = self._clock.now_ms()
        if not contract.alert_url:
            return replace(alert, ended_ms=now_ms, outcome="nobody to tell")
        attempts, event_id = alert.attempts + 1, f"evt_{contract.id}_{alert.percent}"
        body = msgspec.json.encode(_event(event_id, alert, contract, drawn))
        signed = webhooks.headers(contract.alert_secret, event_id, now_ms // 1_000, body)
        try:
            answer = await client.post(contract.alert_url, content=body, headers=signed)
            outcome = f"status {answer.status_code}"
            if answer.is_success:
                return replace(alert, attempts=attempts, ended_ms=now_ms, outcome=outcome)
        except httpx.HTTPError as error:
            outcome = type(error).__name__
        log.warning("alert of contract %s: try %d of %d: %s", contract.id, attempts, TRIES_MAX, outcome)
        pause_ms = min(PAUSE_MS_MIN * 4 ** (attempts - 1), PAUSE_MS_MAX)
        ended_ms = now_ms if attempts >= TRIES_MAX else None
        return replace(alert, attempts=attempts, next_ms=now_ms + pause_ms, ended_ms=ended_ms, outcome=outcome)


def _event(event_id: str, alert: Alert, contract: Contract, drawn: Drawn) -> dict[str, object]:
    return {
        "id": event_id,
        "object": "event",
        "type": "contract.threshold_reached",
        "created_at": alert.at_ms // 1_000,
        "data": {
            "contract": contract.id,
            "tenant": contract.tenant,
            "percent": alert.percent,
            "tokens": contract.tokens,
            "used_tokens": drawn.used + drawn.rolled,
            "expires_ms": contract.expires_ms,
        },
    }
