"""The laws of the simulator hold over many seeds, with and without faults.

The world raises LawBroken by itself when memory is over-committed, an engine is put to sleep under a running request,
or a request never ends. A failure prints its seed: `pytest "tests/sim/test_laws.py::test_laws_through_faults[SEED]"`
replays it.
"""

from dataclasses import replace
from random import Random

import pytest

from tidegate.domain import plan
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.policy.reconcile import CoreSettings, FleetCore
from tidegate.sim import api, profile, workload
from tidegate.sim.faults import Faults, FaultyWorld
from tidegate.sim.meter import Meter
from tidegate.sim.nodes import SimNode
from tidegate.sim.trace import EndpointTotals, TraceSummary
from tidegate.sim.workload import Traffic

MINUTES = 60_000.0
SHAPES = ("poisson", "gamma", "on_off")


def small_fleet() -> profile.FleetProfile:
    built_in = profile.load(None)
    return replace(
        built_in, node=replace(built_in.node, accelerators=2, host_memory_bytes=int(200e9), start_ms=2_000.0)
    )


def scene(seed: int, faults: Faults) -> tuple[FaultyWorld, list[Traffic], float]:
    """A random small fleet: 2 or 3 nodes, 6 to 12 endpoints of 14B, ten minutes, everything from `seed`."""
    dice = Random(seed)
    fleet = small_fleet()
    settings = CoreSettings(
        wait_ms_max=dice.choice((2_000, 10_000)),
        residency_ms_min=dice.choice((0, 1_000)),
        idle_ms_max=dice.choice((20_000, 600_000)),
        start_ms_max=60_000,
        wake_ms_max=20_000,
        sleep_ms_max=20_000,
        stop_ms_max=5_000,
    )
    meter = Meter(2_000.0, 100.0)
    world = FaultyWorld(fleet, FleetCore(settings), meter, faults, seed)
    for number in range(dice.choice((2, 3))):
        world.add_node(SimNode(f"node-{number}", 2, fleet, gangs=True))
    names = [f"e{i}" for i in range(dice.randrange(6, 13))]
    summary = TraceSummary({n: EndpointTotals(1, 4_000, 500, 100, busiest=30) for n in names}, len(names), 0.0)
    for deployment in api.deployments(fleet, summary, 2_000.0):
        dedicated = dice.random() < 0.1
        mode = Mode.DEDICATED if dedicated else Mode.DEDICATED_SERVERLESS
        world.apply(replace(deployment, mode=mode, min_replicas=int(dedicated), max_replicas=2))
    traffic = [Traffic(n, dice.choice(SHAPES), dice.choice((0.02, 0.1, 0.5))) for n in names]
    return world, traffic, 5 * MINUTES


def watch_dedicated(world: FaultyWorld, wanted: dict[str, Deployment]) -> None:
    def see(command: plan.Command, _: float) -> None:
        if isinstance(command, plan.Drain) and wanted[command.endpoint].mode is Mode.DEDICATED:
            assert not command.reason.rule.startswith("evict"), f"dedicated evicted: {command}"

    world.watch.append(see)


@pytest.mark.parametrize("seed", range(60))
def test_laws_in_good_weather(seed: int) -> None:
    world, traffic, duration = scene(seed, Faults())
    watch_dedicated(world, {e.endpoint: _applied(world, e.endpoint) for e in world.core.view().endpoints})
    rows = list(workload.rows(traffic, duration, seed))
    world.run(iter(rows))
    meter = world.meter
    assert meter.requests == len(rows), "each request ends exactly once"
    assert "refused" not in meter.misses, "nothing is refused while every engine is well"
    assert meter.output_tokens == sum(row[3] for row in rows), "what is counted is what was produced"


@pytest.mark.parametrize("seed", range(100, 160))
def test_laws_through_faults(seed: int) -> None:
    faults = Faults(
        slow=0.05,
        hang=0.02,
        lost=0.02,
        doubled=0.1,
        crash_every_ms=40_000.0,
        power_cut_every_ms=120_000.0,
        until_ms=5 * MINUTES,
    )
    world, traffic, duration = scene(seed, faults)
    rows = list(workload.rows(traffic, duration, seed))
    world.run(iter(rows))
    assert world.meter.requests == len(rows), "each request ends exactly once"
    world.run_until(world.now_ms + 8 * MINUTES + 17_777)
    for process in (p for node in world.nodes.values() for p in node.processes.values()):
        assert process.state.value in ("ready", "asleep"), f"{process.replica} never came to rest: {process.state}"


def test_the_same_seed_gives_the_same_run() -> None:
    def once() -> list[plan.Command]:
        world, traffic, duration = scene(7, Faults(crash_every_ms=30_000.0, doubled=0.2, until_ms=MINUTES))
        log: list[plan.Command] = []
        world.watch.append(lambda command, _: log.append(command))
        world.run(workload.rows(traffic, duration, 7))
        return log

    first = once()
    assert first == once()
    assert len(first) > 10


def _applied(world: FaultyWorld, name: str) -> Deployment:
    return world.core._fleet.endpoints[name].deployment
