"""Shares budgets among the gateways: leases out, what was used back. The only owner of the treasury.

Nothing here is on the path of a request, and no row is written for one: a gateway spends what it was leased, and what
it had left when it died is free again once its journal is in the ledger.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from tidegate.control.desired import DesiredState
from tidegate.control.loop import FleetLoop, GatewaySession
from tidegate.domain.contract import Contract
from tidegate.domain.errors import Fault, LinkFault
from tidegate.domain.ports import Clock
from tidegate.domain.price import PriceVersion
from tidegate.quota.prepaid import rules
from tidegate.quota.treasury import Spent, Treasury
from tidegate.wire.internal import BudgetLeases, BudgetUse, Gateways, Message, PriceList, RefusingContracts

TICK_MS = 250
LEASE_MS = 600_000  # a gateway that hears nothing for so long spends nothing more
RENEW_MS = LEASE_MS // 4

log = logging.getLogger(__name__)


class Budgets:
    """`read_spent` is what the ledger knows, None while it does not; `prices` reads the price book (in a thread);
    `contracts` are those that refuse what they do not cover.
    """

    def __init__(
        self,
        desired: DesiredState,
        loop: FleetLoop,
        clock: Clock,
        read_spent: Callable[[], Spent | None],
        prices: Callable[[], Sequence[PriceVersion]],
        contracts: Callable[[], Sequence[Contract]] = tuple,
    ) -> None:
        self._desired = desired
        self._loop = loop
        self._clock = clock
        self.spent = read_spent
        self._read_prices = prices
        self._prices: PriceList | None = None
        self._read_contracts = contracts
        self._contracts = RefusingContracts(())
        self._sessions: dict[str, GatewaySession] = {}
        self._heard: dict[str, GatewaySession] = {}
        self._renewed_ms: dict[str, int] = {}
        self._treasury = Treasury(clock.now_ms() + LEASE_MS)
        self._news = asyncio.Event()

    async def run(self) -> None:
        """For ever: at once when something is new, otherwise every `TICK_MS`."""
        while True:
            try:
                await self._tick()
            except Fault as fault:
                log.warning("budgets are not shared out: %s", fault.reason)
            try:
                async with asyncio.timeout(TICK_MS / 1_000):
                    await self._news.wait()
            except TimeoutError:
                continue
            self._news.clear()

    def wake(self) -> None:
        """A gateway has come, or limits have changed."""
        self._news.set()

    def reported(self, session: GatewaySession, message: BudgetUse) -> None:
        self._heard[session.gateway] = session
        self._treasury.joined(session.gateway)
        self._treasury.reported(session.gateway, message.number, message.leases)
        self._news.set()

    async def priced(self, versions: Sequence[PriceVersion]) -> None:
        """The price book has changed."""
        self._prices = PriceList(tuple(versions))
        await self._send_all(self._prices)

    async def _tick(self) -> None:
        if self._prices is None:
            self._prices = PriceList(tuple(await asyncio.to_thread(self._read_prices)))
        await self._meet(self._prices)
        # Whoever is told of a threshold, and the secret it is signed with, are none of a gateway's business.
        refusing = RefusingContracts(tuple(replace(c, alert_url="", alert_secret="") for c in self._read_contracts()))
        if refusing != self._contracts:
            self._contracts = refusing
            await self._send_all(refusing)
        limits = (*self._desired.state.limits, *rules(refusing.contracts))
        spent, now_ms = self.spent(), self._clock.now_ms()
        if spent is None:
            return
        leases = self._treasury.lease(limits, spent, now_ms)
        for gateway, session in list(self._sessions.items()):
            number, changed = leases.get(gateway, (0, ()))
            if changed or (limits and now_ms - self._renewed_ms.get(gateway, 0) >= RENEW_MS):
                self._renewed_ms[gateway] = now_ms
                await self._send(session, BudgetLeases(number, LEASE_MS, changed))

    async def _meet(self, prices: PriceList) -> None:
        """Who has come, who has left; all are told how many share."""
        now = {session.gateway: session for session in self._loop.gateway_sessions}
        if now == self._sessions:
            return
        come = [session for name, session in now.items() if self._sessions.get(name) is not session]
        for name, session in self._sessions.items():
            if now.get(name) is not session:
                self._treasury.left(name)
                self._renewed_ms.pop(name, None)
                if name in now and self._heard.get(name) is now[name]:  # it has reported on its new link already
                    self._treasury.joined(name)
                elif name not in now:
                    self._heard.pop(name, None)
        self._sessions = now
        for session in come:
            await self._send(session, prices)
            if self._contracts.contracts:
                await self._send(session, self._contracts)
        await self._send_all(Gateways(len(now)))

    async def _send_all(self, message: Message) -> None:
        for session in list(self._sessions.values()):
            await self._send(session, message)

    async def _send(self, session: GatewaySession, message: Message) -> None:
        try:
            await session.link.send(message)
        except LinkFault as fault:
            log.info("gateway %s is not told: %s", session.gateway, fault.reason)
