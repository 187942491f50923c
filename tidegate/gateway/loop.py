"""The sole owner of this gateway's dispatch and catalog, and its end of the link to control.

Relays call `arrive`, `returned` and `ended`; everything they cause is carried out before the call returns. While
control is away, what is ready keeps being served from the last snapshot; the link is tried again with growing pauses.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import assert_never

from tidegate.dispatch import (
    Arrived,
    ConfirmFence,
    Deadline,
    Dispatch,
    Effect,
    Elsewhere,
    Ended,
    Event,
    Grant,
    Refuse,
    ReportDemand,
    Returned,
    SessionStarted,
)
from tidegate.domain.endpoint import Mode
from tidegate.domain.errors import LinkFault, Refusal
from tidegate.domain.plan import DemandReported, Drain, EndpointRemoved, FenceConfirmed, Resume, Route
from tidegate.domain.ports import Clock, Connect, Link
from tidegate.domain.usage import UsageRecord
from tidegate.gateway.limiting import Limiter
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.metrics import Metrics
from tidegate.gateway.remote import route_of
from tidegate.quota.gate import Hold
from tidegate.wire.internal import (
    BudgetLeases,
    Catalog,
    EndpointEntry,
    GatewayHello,
    Gateways,
    KeyEntry,
    PriceList,
    RefusingContracts,
    ServiceReported,
)

log = logging.getLogger(__name__)

Answer = Grant | Refuse
_ANSWERS = (Grant, Refuse)
Waiting = asyncio.Future[Answer | None]


class GatewayLoop:
    """Everything runs on one event loop; no method but `run` awaits."""

    def __init__(
        self,
        gateway: str,
        region: str,
        connect: Connect,
        clock: Clock,
        limits: GatewayLimits,
        metrics: Metrics,
    ) -> None:
        self._gateway = gateway
        self._region = region
        self._connect = connect
        self._clock = clock
        self._limits = limits
        self._metrics = metrics
        self._dispatch = Dispatch(region)
        self.limiter = Limiter(gateway)
        self.take_back: Callable[[str], None] = lambda replica: None  # ends at once what relays have on it
        self._keys: dict[str, KeyEntry] = {}
        self._endpoints: dict[str, EndpointEntry] = {}
        self._batch: dict[str, EndpointEntry] = {}  # endpoint -> the lane of its batch lines
        self._elsewhere: dict[str, Elsewhere] = {}
        self._catalog_version = -1
        self._told = asyncio.Event()
        self._waiters: dict[str, Waiting] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ms = 0
        self._demands: set[str] = set()
        self._drains: dict[str, int] = {}  # replica -> number of the drain that is on
        self._fences: list[tuple[str, int]] = []
        self._news = asyncio.Event()
        self._news_timer: asyncio.TimerHandle | None = None
        self.connected = False

    # --- what requests need to know -----------------------------------------------------------------------------------

    @property
    def informed(self) -> bool:
        """Whether control has ever told who may call what."""
        return self._told.is_set()

    async def hear(self, wait_ms_max: int) -> None:
        """Returns once control has told who may call what, or after `wait_ms_max` without a word of it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), wait_ms_max / 1000)

    @property
    def endpoints(self) -> dict[str, EndpointEntry]:
        return self._endpoints

    def batch_lane(self, entry: EndpointEntry) -> EndpointEntry:
        """Where batch lines of an endpoint wait. Refusal capacity while the core has not made room to wait for."""
        lane = entry if entry.mode is Mode.BATCH else self._batch.get(entry.endpoint)
        if lane is None:
            raise Refusal("capacity", "no batch work is done for this endpoint right now", retry_after_ms=1_000)
        return lane

    def sweep(self) -> None:
        """Tells control what was counted since the last report, even where demand has not changed."""
        self._news.set()

    def key(self, digest: str) -> KeyEntry | None:
        return self._keys.get(digest)

    @property
    def held(self) -> int:
        return self._dispatch.held

    @property
    def in_flight(self) -> int:
        return self._dispatch.in_flight

    def held_at(self, endpoint: str) -> int:
        return self._dispatch.held_at(endpoint)

    def in_flight_at(self, endpoint: str) -> int:
        return self._dispatch.in_flight_at(endpoint)

    # --- what relays tell it ------------------------------------------------------------------------------------------

    def arrive(
        self, request: str, entry: EndpointEntry, arrived_ms: int, wait_ms: int, tenant: str, tokens: int
    ) -> Answer | Waiting:
        """A replica or a refusal now, or a future of one; the future gives None where `ended` was told meanwhile, as it
        must be at the end of every request. `tokens` estimates what it will count for in the turn between tenants.
        """
        arrived = Arrived(
            request,
            _lane(entry),
            arrived_ms + wait_ms,
            min(entry.queued_max, self._limits.queued_max),
            tenant,
            tokens,
            self._elsewhere.get(entry.endpoint),
            arrived_ms + entry.slo.ttft_ms,
        )
        return self._ask(request, arrived, arrived_ms)

    def returned(self, request: str, lost: bool) -> Answer | Waiting:
        """Its replica did not serve it: a replica or a refusal now, or a future of one, as for `arrive`."""
        return self._ask(request, Returned(request, lost), self._clock.now_ms())

    def ended(self, request: str, first_byte_ms: int, tokens: int) -> None:
        """The request is over (see `dispatch.Ended`). Harmless for one that was refused."""
        waiter = self._waiters.pop(request, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        self._carry_out(self._dispatch.handle(Ended(request, first_byte_ms, tokens), self._clock.now_ms()))

    def settled(self, hold: Hold, record: UsageRecord) -> None:
        """A request that had taken some of its limits has ended, with this record."""
        self.limiter.settle(hold, record)
        if self.limiter.dirty:
            self._announce(False)

    def _ask(self, request: str, event: Event, now_ms: int) -> Answer | Waiting:
        effects = self._dispatch.handle(event, now_ms)
        for index, effect in enumerate(effects):
            if isinstance(effect, _ANSWERS) and effect.request == request:
                del effects[index]
                self._carry_out(effects)
                return effect
        waiter: Waiting = asyncio.get_running_loop().create_future()
        self._waiters[request] = waiter
        self._carry_out(effects)
        return waiter

    # --- effects ------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        self._carry_out(self._dispatch.handle(event, self._clock.now_ms()))

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case ReportDemand():
                    self._demands.add(effect.endpoint)
                    self._announce(effect.urgent)
                case Grant() | Refuse():
                    waiter = self._waiters.pop(effect.request)
                    if not waiter.done():  # done: its task is being cancelled and will say `ended`
                        waiter.set_result(effect)
                case ConfirmFence():
                    self._fences.append((effect.replica, self._drains.pop(effect.replica, 0)))
                    self._announce(True)
                case _:
                    assert_never(effect)
        self._arm()

    def _arm(self) -> None:
        """One timer for all deadlines, moved only when the next one is earlier."""
        next_ms = self._dispatch.next_deadline_ms()
        if next_ms is None or (self._timer is not None and self._timer_ms <= next_ms):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_ms = next_ms
        delay_s = max(0, next_ms - self._clock.now_ms()) / 1000
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_deadline)

    def _on_deadline(self) -> None:
        self._timer = None
        self._handle(Deadline())

    def _announce(self, urgent: bool) -> None:
        if urgent:
            self._news.set()
        elif self._news_timer is None:
            loop = asyncio.get_running_loop()
            self._news_timer = loop.call_later(self._limits.demand_ms / 1000, self._on_news_timer)

    def _on_news_timer(self) -> None:
        self._news_timer = None
        self._news.set()

    # --- the link -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keeps a link to control until cancelled."""
        pause_ms = self._limits.reconnect_ms_min
        try:
            while True:
                try:
                    link = await self._connect()
                    try:
                        await self._session(link)
                    finally:
                        if self.connected:
                            pause_ms = self._limits.reconnect_ms_min
                        self.connected = False
                        await link.close()
                except LinkFault as fault:
                    log.info("no link to control, next attempt in %d ms: %s", pause_ms, fault.reason)
                await asyncio.sleep(pause_ms / 1000)
                pause_ms = min(pause_ms * 2, self._limits.reconnect_ms_max)
        finally:
            for timer in (self._timer, self._news_timer):
                if timer is not None:
                    timer.cancel()

    async def _session(self, link: Link) -> None:
        """One link's life; returns by LinkFault."""
        await link.send(GatewayHello(self._gateway, self._region))
        self._catalog_version = -1
        self._fences.clear()
        self.limiter.linked()
        self._handle(SessionStarted())
        self._demands.update(self._dispatch.endpoints())
        self._news.set()
        await self._tell_services(link, baseline=True)
        reporter = asyncio.create_task(self._report(link))
        try:
            while True:
                self._receive(await link.receive())
        finally:
            reporter.cancel()
            with contextlib.suppress(asyncio.CancelledError, LinkFault):
                await reporter

    def _receive(self, message: object) -> None:
        match message:
            case Catalog():
                self.connected = True
                self._replace_catalog(message)
                self._told.set()
            case Drain(replica=replica, fence=fence, abort=abort):
                self._drains[replica] = fence
                self._handle(message)
                if abort:
                    self.take_back(replica)
            case Resume(replica=replica):
                self._drains.pop(replica, None)
                self._handle(message)
            case Route():
                self._handle(message)
            case Gateways(count):
                self.limiter.peers(count, self._clock.now_ms())
            case PriceList(versions):
                self.limiter.prices(versions)
            case RefusingContracts(contracts):
                self.limiter.contracts(contracts, self._clock.now_ms())
            case BudgetLeases():
                self.limiter.leased(message, self._clock.now_ms())
                self._announce(True)
            case _:
                log.warning("control sent a %s, which is not for a gateway", type(message).__name__)

    def _replace_catalog(self, catalog: Catalog) -> None:
        if catalog.version <= self._catalog_version:
            return
        self._catalog_version = catalog.version
        self._keys = {key.digest: key for key in catalog.keys}
        before, self._endpoints = self._endpoints, {entry.endpoint: entry for entry in catalog.endpoints}
        batch_before, self._batch = self._batch, {entry.serves: entry for entry in catalog.batch}
        self._elsewhere = {
            entry.endpoint: Elsewhere(entry.overflow, entry.fallback, entry.resident)
            for entry in catalog.endpoints
            if entry.overflow or entry.fallback
        }
        self._dispatch.prompt = bool(catalog.batch) or any(e.mode is Mode.BATCH for e in catalog.endpoints)
        self.limiter.rules(catalog.limits, self._endpoints, self._clock.now_ms())
        for entry in catalog.endpoints:
            self._route_elsewhere(before.get(entry.endpoint), entry)
        gone = before.keys() - self._endpoints.keys()
        gone |= set(map(_lane, batch_before.values())) - set(map(_lane, catalog.batch))
        for name in gone:
            self._handle(EndpointRemoved(name))
            self._metrics.forget(name)

    def _route_elsewhere(self, before: EndpointEntry | None, entry: EndpointEntry) -> None:
        """An endpoint served by an API elsewhere is routed by its entry; of any other, control sends the routes."""
        if before is not None and (before.remote is None) != (entry.remote is None):
            self._handle(EndpointRemoved(entry.endpoint))  # from now on somebody else numbers its routes
        if entry.remote is not None:
            self._handle(route_of(entry, entry.remote, self._catalog_version))

    async def _report(self, link: Link) -> None:
        """Sends fences and demand: at once when urgent, otherwise what has gathered in `demand_ms`."""
        while True:
            await self._news.wait()
            self._news.clear()
            fences, self._fences = self._fences, []
            demands, self._demands = self._demands, set()
            try:
                for replica, fence in fences:
                    await link.send(FenceConfirmed(self._gateway, replica, fence))
                if self.limiter.dirty:
                    await link.send(self.limiter.use())
                await self._tell_services(link, baseline=False)
                for endpoint in demands:
                    demand = self._dispatch.demand(endpoint, self._clock.now_ms())
                    await link.send(
                        DemandReported(
                            self._gateway,
                            endpoint,
                            demand.queued,
                            demand.in_flight,
                            demand.arrivals_total,
                            demand.oldest_wait_ms,
                            demand.busy,
                        )
                    )
            except LinkFault:
                # `receive` sees the same and ends the session; the next one reports everything anew.
                return

    async def _tell_services(self, link: Link, *, baseline: bool) -> None:
        """Of every endpoint at the beginning of a link, from then on of those with news."""
        for name, served, attained, failed in self._metrics.services(every=baseline):
            await link.send(ServiceReported(self._gateway, name, served, attained, failed, baseline))


def _lane(entry: EndpointEntry) -> str:
    """Where its requests wait: an adapter's with those of its base, whose replicas serve both."""
    return entry.base or entry.endpoint
