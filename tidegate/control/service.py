"""The control plane as one object: what the admin API and the assembly ask of it."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from tidegate.control import adapters, batch_lanes, canaries, elsewhere, http, remotes
from tidegate.control.activity import ActivityLog
from tidegate.control.attainment import Keeping, Load, Save
from tidegate.control.budgets import Budgets
from tidegate.control.catalog import catalog, model_name
from tidegate.control.deployments import Facts, deployment, rolled_back, split_name, succeed
from tidegate.control.desired import DesiredState
from tidegate.control.loop import FleetLoop
from tidegate.control.meters import Meters
from tidegate.control.sessions import serve_links
from tidegate.control.settings import ControlSettings
from tidegate.control.tenancy import Tenancy
from tidegate.domain.contract import Contract
from tidegate.domain.endpoint import Deployment, ModelProfile
from tidegate.domain.errors import Refusal
from tidegate.domain.limits import Scope
from tidegate.domain.plan import EndpointApplied, EndpointRemoved, ManualAction
from tidegate.domain.ports import AdapterInspector, Change, Clock, Listener, ModelInspector, State, StateStore
from tidegate.domain.price import PriceVersion
from tidegate.money.accelerator_time import AcceleratorTime
from tidegate.policy.reconcile import FleetCore
from tidegate.quota.treasury import Spent
from tidegate.wire import admin


class Control:
    """`run` serves until cancelled. The other methods may be called while it runs; `actor` goes to the audit log.

    `price_plans` names the plans an endpoint may have (read in a worker thread with each apply). `time_marks`: node →
    the instant up to which its accelerator time is in the ledger. `spent` is what the ledger has of each budget, None
    while it does not know; `prices` reads the price book (in a worker thread); `contracts` are those that refuse what
    they do not cover. `distant` is where parts on other machines come in. `load_counts` and `save_counts` keep the
    counts of service levels (in a worker thread).
    """

    def __init__(
        self,
        *,
        store: StateStore,
        inspector: ModelInspector,
        adapter_inspector: AdapterInspector,
        core: FleetCore,
        listener: Listener,
        clock: Clock,
        settings: ControlSettings,
        price_plans: Callable[[], Collection[str]] = lambda: ("default",),
        time_marks: Mapping[str, int] | None = None,
        spent: Callable[[], Spent | None] = lambda: None,
        prices: Callable[[], Sequence[PriceVersion]] = tuple,
        contracts: Callable[[], Sequence[Contract]] = tuple,
        distant: Listener | None = None,
        load_counts: Load = tuple,
        save_counts: Save = lambda rows, gone: None,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.meters = Meters(settings.thrash_ms, AcceleratorTime(clock.now_ms(), time_marks))
        self.activity = ActivityLog(store, clock)
        self._keeping = Keeping(self.meters.attainment, clock, load_counts, save_counts)
        self.loop = FleetLoop(core, self.activity, self.meters, clock, settings.relay_address)
        self.desired = DesiredState(store, self._changed)
        self.tenancy = Tenancy(self.desired, self.activity, clock)
        self.budgets = Budgets(self.desired, self.loop, clock, spent, prices, contracts)
        self.authorize = http.authorizer(self.desired, clock)
        self._inspector = inspector
        self._adapter_inspector = adapter_inspector
        self._listeners = [listener, *([distant] if distant is not None else [])]
        self._price_plans = price_plans
        self._loaded = asyncio.Event()
        self._telling = asyncio.Lock()
        self._batch_wanted: dict[str, bool] = {}
        self._lanes: dict[str, Deployment] = {}
        self._lane_changes = 0

    async def run(self) -> None:
        """Loads desired state, then feeds the core and serves links for ever. Raises StoreFault at the start only."""
        await self._keeping.load()
        state = await self.desired.load()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.loop.run())  # first: with many endpoints the inbox fills before all are told
                group.create_task(self.activity.run())
                group.create_task(self.budgets.run())
                group.create_task(self._keeping.run())
                await self._changed(State(0), state)
                self._loaded.set()
                for listener in self._listeners:
                    group.create_task(serve_links(listener, self.loop, self.budgets, self.clock))
        finally:
            self.activity.end_subscriptions()

    @property
    def ready(self) -> bool:
        """Desired state is loaded and a node is there."""
        return self._loaded.is_set() and bool(self.loop.nodes)

    async def until_ready(self, *, gateways: int = 0) -> None:
        """Returns once desired state is loaded, a node has joined and at least `gateways` gateways have."""
        await self._loaded.wait()
        await self.loop.until_joined(nodes=1, gateways=gateways)

    # --- endpoints ------------------------------------------------------------------------------------------------

    async def apply(self, endpoint: str, body: admin.EndpointApply, actor: str) -> Deployment:
        """Makes `endpoint` be as `body` says; the same again changes nothing. Raises Refusal naming what is wrong."""
        tenant, _ = split_name(endpoint)
        model = await self._inspect(endpoint, body)
        canary = await asyncio.to_thread(self._inspector.inspect, body.canary.model) if body.canary else None
        facts = self._facts(await asyncio.to_thread(self._price_plans))

        def build(state: State) -> Change | None:
            if all(known.id != tenant for known in state.tenants):
                text = f"`name`: there is no tenant {tenant!r}; accepted: a tenant that was created before"
                raise Refusal("invalid_configuration", text, param="name")
            previous = next((d for d in state.deployments if d.endpoint == endpoint), None)
            others = {d.endpoint: d for d in state.deployments if d is not previous}
            if body.base is None:
                wanted = deployment(endpoint, body, model, facts, self.settings, self.clock.now_ms())
            else:
                base = adapters.find_base(endpoint, body.base, others)
                wanted = adapters.deployment(endpoint, tenant, body, model, base, self.clock.now_ms())
            if body.canary is not None and canary is not None:
                asked = msgspec.structs.replace(body, model=body.canary.model)
                made = deployment(endpoint, asked, canary, facts, self.settings, self.clock.now_ms())
                wanted = canaries.beside(wanted, made, body.canary.weight)
            wanted = succeed(previous, elsewhere.resolved(wanted, others))
            elsewhere.check(wanted, others)
            adapters.check(wanted, others)
            return None if wanted is previous else Change(put=(wanted,))

        before = self.desired.state.version
        try:
            state = await self.desired.change(build)
        except Refusal as refusal:
            if refusal.code == "residency_denied":
                self.meters.residency_denied(endpoint)
                self.activity.note(actor, "residency_denied", endpoint, refusal.message)
            raise
        wanted = next(d for d in state.deployments if d.endpoint == endpoint)
        if state.version != before:
            reason = f"generation={wanted.generation} mode={wanted.mode.value} model={model_name(wanted.model)}"
            self.activity.note(actor, "apply", endpoint, reason)
        await self.loop.settled()
        return wanted

    async def rollback(self, endpoint: str, actor: str) -> Deployment:
        """Drops the canary, or goes back to what was before the last change. Raises Refusal not_found, conflict."""

        def build(state: State) -> Change:
            present = next((d for d in state.deployments if d.endpoint == endpoint), None)
            if present is None:
                raise no_endpoint(endpoint)
            wanted = rolled_back(present)
            others = {d.endpoint: d for d in state.deployments if d is not present}
            elsewhere.check(wanted, others)
            adapters.check(wanted, others)
            return Change(put=(wanted,))

        wanted = next(d for d in (await self.desired.change(build)).deployments if d.endpoint == endpoint)
        self.activity.note(
            actor, "rollback", endpoint, f"generation={wanted.generation} model={model_name(wanted.model)}"
        )
        await self.loop.settled()
        return wanted

    async def _inspect(self, endpoint: str, body: admin.EndpointApply) -> ModelProfile:
        if body.base is None:
            if body.model.startswith(remotes.SCHEME):
                return remotes.profile(body.model, self.settings.providers)
            return await asyncio.to_thread(self._inspector.inspect, body.model)
        known = {d.endpoint: d for d in self.desired.state.deployments}
        base = adapters.find_base(endpoint, body.base, known)
        return await asyncio.to_thread(self._adapter_inspector.inspect, body.model, base.model.source)

    async def remove(self, endpoint: str, actor: str) -> None:
        """Drains and removes it; its usage and bills stay. Raises Refusal not_found."""

        def build(state: State) -> Change:
            if not any(d.endpoint == endpoint for d in state.deployments):
                raise no_endpoint(endpoint)
            if users := elsewhere.users(endpoint, {d.endpoint: d for d in state.deployments}):
                raise Refusal("conflict", f"{', '.join(users)} overflow or fall back to it: change them first")
            if carried := adapters.users(endpoint, {d.endpoint: d for d in state.deployments}):
                raise Refusal("conflict", f"it carries {', '.join(carried[:10])}: remove them first")
            rule = (Scope.ENDPOINT, endpoint)
            limited = any((r.scope, r.subject) == rule for r in state.limits)
            return Change(remove_deployments=(endpoint,), remove_limits=(rule,) if limited else ())

        await self.desired.change(build)
        self.activity.note(actor, "remove", endpoint, "")
        await self.loop.settled()

    async def manual(self, endpoint: str, action: str, actor: str) -> None:
        """`action` is ``wake`` or ``sleep``. Raises Refusal not_found, or conflict where the mode forbids it."""
        wanted = self.desired.deployment(endpoint)
        if wanted is None:
            raise no_endpoint(endpoint)
        if wanted.base:
            raise Refusal("conflict", f"it is an adapter: its base {wanted.base} is what wakes and sleeps")
        if action == "sleep" and wanted.min_replicas > 0:
            raise Refusal(
                "conflict",
                f"`min_replicas` = {wanted.min_replicas} are always ready; apply 0 or pause the endpoint instead",
                param="min_replicas",
            )
        self.activity.note(actor, action, endpoint, "asked for by hand")
        await self.loop.tell(ManualAction(endpoint, action))
        await self.loop.settled()

    # --- between desired state and the loop -----------------------------------------------------------------------

    async def batch_work(self, wanted: Mapping[str, bool]) -> None:
        """Which endpoints have batch lines to do; True where they may compete with serverless endpoints."""
        async with self._telling:
            self._batch_wanted = dict(wanted)
            await self._tell_lanes(self.desired.state)

    async def _tell_lanes(self, state: State) -> None:
        before, self._lanes = self._lanes, batch_lanes.lanes(state.deployments, self._batch_wanted)
        self._lane_changes += before != self._lanes
        plain = canaries.with_entries(catalog(state, self.settings), state.deployments, self.settings)
        digest = self.settings.runner_digest
        await self.loop.tell(batch_lanes.with_lanes(plain, self._lanes, self._lane_changes, digest, self.settings))
        for name, lane in self._lanes.items():
            if before.pop(name, None) != lane:
                await self.loop.tell(EndpointApplied(lane))
        for name in before:
            await self.loop.tell(EndpointRemoved(name))

    async def _changed(self, before: State, after: State) -> None:
        async with self._telling:
            await self._tell_lanes(after)
            await self._tell_deployments(before, after)

    async def _tell_deployments(self, before: State, after: State) -> None:
        known = canaries.placed(adapters.placed(before.deployments))
        for wanted in canaries.placed(adapters.placed(after.deployments)).values():
            if known.pop(wanted.endpoint, None) != wanted:
                await self.loop.tell(EndpointApplied(wanted))
        for endpoint in known:
            await self.loop.tell(EndpointRemoved(endpoint))

    def _facts(self, price_plans: Collection[str]) -> Facts:
        memory: dict[str, int] = {}
        most: dict[str, int] = {}
        for session in self.loop.nodes:
            region, accelerators = session.node.region, session.node.accelerators
            memory[region] = max([memory.get(region, 0), *(a.memory_bytes for a in accelerators)])
            most[region] = max(most.get(region, 0), len(accelerators))
        return Facts(price_plans, memory, most, self.meters.start_ms)


def no_endpoint(endpoint: str) -> Refusal:
    """The same words whether it does not exist or belongs to somebody else."""
    return Refusal("not_found", f"there is no endpoint {endpoint!r}")
