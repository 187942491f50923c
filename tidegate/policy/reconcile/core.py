"""FleetCore: events in, commands out. It composes the policies and is the only place where capacity is decided.

It never reads a clock, a socket, a file or a random source: the same events at the same instants give the same
commands.
"""

from typing import assert_never

from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.fleet import Node, Tier
from tidegate.domain.plan import Command, DemandReported, Event, ReplicaStatus
from tidegate.domain.replica import ReplicaState
from tidegate.policy.reconcile import lifecycle, prewarm, regret, routes, serving, steering
from tidegate.policy.reconcile.fleet import Endpoint, Fleet, Replica, runtime_key
from tidegate.policy.reconcile.settings import CoreSettings
from tidegate.policy.scaling import PeakWindow
from tidegate.policy.view import FleetView

S = ReplicaState
STEERS_PER_EVENT_MAX = 100_000


class FleetCore:
    """Holds every decision about capacity. One owner calls `handle` with each event in order."""

    def __init__(self, settings: CoreSettings | None = None) -> None:
        self._fleet = Fleet(settings or CoreSettings())

    def handle(self, event: Event, now_ms: int) -> list[Command]:
        """Take one event at `now_ms` (epoch milliseconds, never going back); the commands to carry out, in order."""
        fleet = self._fleet
        fleet.began_ms = fleet.began_ms or now_ms
        match event:
            case DemandReported():
                self._demand(event, now_ms)
            case plan.ReplicaChanged(status):
                lifecycle.reported(fleet, status, now_ms)
            case plan.FenceConfirmed(gateway, replica_id, fence):
                replica = fleet.replicas.get(replica_id)
                if replica is not None:
                    lifecycle.fenced(fleet, replica, gateway, fence, now_ms)
            case plan.Tick():
                pass
            case plan.EndpointApplied(deployment):
                self._applied(deployment, now_ms)
            case plan.EndpointRemoved(name):
                if name in fleet.endpoints:
                    fleet.endpoints[name].removed = True
                    fleet.touch(name)
            case plan.NodeJoined(node, statuses):
                self._node_joined(node, statuses, now_ms)
            case plan.NodeLost(node_id):
                self._node_lost(node_id, now_ms)
            case plan.GatewayJoined(gateway, region):
                fleet.gateways[gateway] = region
            case plan.GatewayLost(gateway):
                self._gateway_lost(gateway, now_ms)
            case plan.WeightsChanged(node_id, digests):
                self._weights_changed(node_id, digests)
            case plan.ManualAction(name, action):
                self._manual(name, action, now_ms)
            case _:
                assert_never(event)
        self._ring(now_ms)
        self._settle(now_ms)
        commands, fleet.out = fleet.out, []
        return commands

    def next_tick_ms(self) -> int | None:
        """The instant by which a Tick is wanted; None while nothing is awaited."""
        return self._fleet.next_timer_ms()

    def view(self) -> FleetView:
        """The core's beliefs, for people. Costs a pass over the fleet."""
        return routes.view(self._fleet)

    # --- events ---------------------------------------------------------------------------------------------------

    def _demand(self, event: DemandReported, now_ms: int) -> None:
        fleet = self._fleet
        endpoint = fleet.endpoints.get(event.endpoint)
        if endpoint is None or event.gateway not in fleet.gateways:
            return
        last = endpoint.demand.get(event.gateway)
        if last is None:
            fleet.gateway_demand.setdefault(event.gateway, {})[event.endpoint] = None
        was_busy = endpoint.busy
        endpoint.demand[event.gateway] = event
        queued, running = event.queued - (last.queued if last else 0), event.in_flight - (last.in_flight if last else 0)
        arrived = event.arrivals_total - (last.arrivals_total if last else 0)
        full = endpoint.ready_count() if endpoint.queued else 0
        endpoint.service.observe(now_ms, endpoint.in_flight, arrived - queued - running, full)
        endpoint.queued += queued
        endpoint.in_flight += running
        if arrived > 0:
            regret.gap_ended(fleet, endpoint, now_ms)
            endpoint.history.observe(now_ms, arrived)
            if endpoint.ahead_until_ms:  # its keep-alive counts again, and ends sooner than its timer
                endpoint.ahead_until_ms, endpoint.timer_ms = 0, None
        if arrived > 0 or endpoint.busy:
            endpoint.quiet_since_ms = now_ms
        if arrived > 0 or event.queued > 0:
            endpoint.slept_by_hand = False
        if fleet.batch and event.busy != (last.busy if last else ()):
            for replica in endpoint.replicas.values():
                fleet.stir(replica)
        if was_busy and not endpoint.busy:  # its replicas have become candidates
            for replica in endpoint.replicas.values():
                fleet.room_nodes[replica.node] = None
        if not steering.absorb(fleet, endpoint, now_ms):
            fleet.touch(event.endpoint)

    def _applied(self, deployment: Deployment, now_ms: int) -> None:
        fleet = self._fleet
        endpoint = fleet.endpoints.get(deployment.endpoint)
        down_ms = deployment.scaling.down_window_ms
        window = PeakWindow(fleet.settings.stable_window_ms if down_ms is None else down_ms)
        if endpoint is None:
            endpoint = Endpoint(deployment.endpoint, deployment, window, quiet_since_ms=now_ms)
            fleet.endpoints[deployment.endpoint] = endpoint
        elif runtime_key(endpoint.deployment) != runtime_key(deployment):
            for activation in list(endpoint.activations.values()):
                lifecycle.cancel(fleet, activation)
        if deployment != endpoint.deployment:
            endpoint.failures, endpoint.retry_ms, endpoint.failed_reason = 0, 0, ""
        if window.window_ms != endpoint.window.window_ms:
            endpoint.window = window
        endpoint.removed = False
        endpoint.redeploy(deployment)
        fleet.batch.pop(deployment.endpoint, None)
        if deployment.mode is Mode.BATCH:
            fleet.batch[deployment.endpoint] = None
        for replica in endpoint.replicas.values():  # perhaps not of batch mode any more
            if replica.paused_ms is not None:
                lifecycle.pause(fleet, replica, now_ms, "")
        self._prefetch(deployment)
        fleet.touch(deployment.endpoint)

    def _prefetch(self, deployment: Deployment) -> None:
        """One node of the home region fetches a remote model ahead of its first demand: the one with the fewest. The
        others fetch it only when a replica is started on them, so a source never meets the whole fleet at once.
        """
        fleet, model = self._fleet, deployment.model
        nodes = [node for node in fleet.region_nodes.get(deployment.regions[0], ()) if node in fleet.on_disk]
        if nodes and fleet.cold_tier(model, *fleet.nodes) is Tier.REMOTE:
            node = min(nodes, key=lambda name: len(fleet.on_disk[name]))
            fleet.fetching[model.digest] = node
            fleet.out.append(plan.Prefetch(node, model, plan.Reason("prefetch", (("endpoint", deployment.endpoint),))))

    def _weights_changed(self, node: str, digests: tuple[str, ...]) -> None:
        fleet = self._fleet
        first = node in fleet.nodes and node not in fleet.on_disk
        fleet.ends_fetching(node)  # they are there, or could not be had: a start will say why
        if node in fleet.nodes:
            fleet.on_disk[node] = frozenset(digests)
        for endpoint in fleet.endpoints.values() if first else ():
            self._prefetch(endpoint.deployment)

    def _manual(self, name: str, action: str, now_ms: int) -> None:
        fleet = self._fleet
        endpoint = fleet.endpoints.get(name)
        if endpoint is None:
            return
        assert action in ("wake", "sleep"), f"unknown manual action {action!r}"
        endpoint.slept_by_hand = action == "sleep"
        endpoint.woken_until_ms = now_ms + fleet.settings.idle_ms_max if action == "wake" else 0
        if action == "wake":
            endpoint.failures, endpoint.retry_ms, endpoint.failed_reason = 0, 0, ""
        fleet.touch(name)

    def _gateway_lost(self, gateway: str, now_ms: int) -> None:
        """It sends nothing more, so every fence it owed is complete, and what it held is gone."""
        fleet = self._fleet
        if fleet.gateways.pop(gateway, None) is None:
            return
        for name in fleet.gateway_demand.pop(gateway, {}):
            endpoint = fleet.endpoints.get(name)
            if endpoint is not None and (last := endpoint.demand.pop(gateway, None)) is not None:
                endpoint.queued -= last.queued
                endpoint.in_flight -= last.in_flight
                fleet.touch(name)
        fleet.dirty.update(fleet.batch)
        for replica in list(fleet.replicas.values()):
            fleet.room_nodes[replica.node] = None
            if gateway in replica.fences:
                lifecycle.fenced(fleet, replica, gateway, replica.fence, now_ms)

    def _node_lost(self, node_id: str, now_ms: int) -> None:
        fleet = self._fleet
        node = fleet.nodes.get(node_id)
        if node is None:
            return
        for accelerator in node.accelerators:
            for activation in list(fleet.pending[node_id, accelerator.id].values()):
                lifecycle.cancel(fleet, activation)
        for replica in list(fleet.node_replicas[node_id].values()):
            lifecycle.drop_wake_plans(fleet, replica)
            fleet.forget(replica)
        for accelerator in node.accelerators:
            place = (node_id, accelerator.id)
            assert fleet.idle_bytes.pop(place) == 0, f"{place} lost with idle bytes counted"
            del fleet.pending[place], fleet.residents[place]
        fleet.on_disk.pop(node_id, None)
        fleet.ends_fetching(node_id)
        fleet.book.close(node)
        fleet.region_nodes[node.region].remove(node_id)
        del fleet.node_replicas[node_id], fleet.nodes[node_id]
        if not fleet.region_nodes[node.region]:
            fleet.empty_since_ms[node.region] = now_ms
            fleet.dirty.update(dict.fromkeys(fleet.endpoints))  # some may not be served at all any more
        fleet.room_nodes.pop(node_id, None)

    def _node_joined(self, node: Node, statuses: tuple[ReplicaStatus, ...], now_ms: int) -> None:
        """A node's word on what is alive there replaces every belief about it."""
        fleet = self._fleet
        self._node_lost(node.id, now_ms)
        fleet.nodes[node.id] = node
        fleet.region_nodes.setdefault(node.region, []).append(node.id)
        fleet.node_replicas[node.id] = {}
        fleet.book.open(node)
        for accelerator in node.accelerators:
            fleet.pending[node.id, accelerator.id] = {}
            fleet.residents[node.id, accelerator.id] = {}
            fleet.idle_bytes[node.id, accelerator.id] = 0
        for status in statuses:
            if status.state is not S.STOPPED:
                self._adopt(node, status, now_ms)
        fleet.room_nodes[node.id] = None
        if len(fleet.region_nodes[node.region]) == 1:
            fleet.dirty.update(dict.fromkeys(fleet.endpoints))

    def _adopt(self, node: Node, status: ReplicaStatus, now_ms: int) -> None:
        fleet = self._fleet
        endpoint = fleet.endpoints.get(status.endpoint)
        deployment = endpoint.deployment if endpoint is not None else None
        if deployment is not None and deployment.generation != status.generation:
            deployment = None
        known = {a.id for a in node.accelerators}
        places = tuple((node.id, a) for a in status.accelerators if a in known)
        name, generation = status.endpoint, status.generation
        replica = Replica(status.replica, name, node.id, places, deployment, generation, status.state, now_ms)
        replica.ready_ms, replica.address, replica.paused_ms = now_ms, status.address, now_ms if status.paused else None
        fleet.add(replica)
        fleet.found_in_host(replica, status)
        asleep = status.state is S.ASLEEP and status.accelerator_bytes <= fleet.settings.slept_accelerator_bytes_max
        if not asleep:
            reserved = deployment.accelerator_bytes if deployment is not None else 0
            fleet.settle_on(replica, places, max(status.accelerator_bytes, reserved), found=True)
        if endpoint is not None and status.state in (S.READY, S.ASLEEP):
            endpoint.loaded_once = True
            endpoint.quiet_since_ms = now_ms
        settled = asleep or status.state in (S.READY, S.STARTING, S.WAKING)
        if endpoint is None or not settled:  # halfway through a step whose order is lost: end it cleanly
            lifecycle.stop(fleet, replica, now_ms, "found_on_node", (("state", status.state.value),))
        elif status.state in (S.STARTING, S.WAKING):
            lifecycle.watch(fleet, replica, fleet.settings.start_ms_max)

    # --- composition ----------------------------------------------------------------------------------------------

    def _ring(self, now_ms: int) -> None:
        """Whatever event came, timers that are due by now count as rung."""
        fleet = self._fleet
        for kind, key, stamp in fleet.due(now_ms):
            if kind == "replica":
                lifecycle.overdue(fleet, key, stamp, now_ms)
            elif (endpoint := fleet.endpoints.get(key)) is not None:
                if kind == "ahead":
                    prewarm.look(fleet, endpoint, now_ms)
                elif endpoint.timer_ms == stamp:
                    endpoint.timer_ms = None
                else:
                    continue  # overtaken by an earlier one since: heard, each of them would arm another, for ever
                fleet.touch(key)

    def _settle(self, now_ms: int) -> None:
        """Steer what was touched until nothing is, serve who waits, then announce what changed."""
        fleet = self._fleet
        steers = 0
        while fleet.dirty or (fleet.room_nodes and fleet.waiting):
            touched, fleet.dirty = fleet.dirty, {}
            for name in touched:
                endpoint = fleet.endpoints.get(name)
                if endpoint is not None:
                    steering.steer(fleet, endpoint, now_ms)
                    steers += 1
            assert steers < STEERS_PER_EVENT_MAX, "steering does not come to rest"
            serving.serve_waiting(fleet, touched, now_ms)
        fleet.room_nodes.clear()
        routed, fleet.unrouted = fleet.unrouted, {}
        for name in routed:
            endpoint = fleet.endpoints.get(name)
            if endpoint is not None:
                routes.announce(fleet, endpoint, now_ms)
                if endpoint.removed and not endpoint.replicas and not endpoint.activations:
                    del fleet.endpoints[name]
                    fleet.batch.pop(name, None)
