"""What goes wrong in a simulated fleet, from one seed: engines crash and hang, loads are slow, reports are lost and
doubled, nodes lose power and come back. The laws must hold through all of it.
"""

from dataclasses import dataclass
from random import Random

from tidegate.domain import plan
from tidegate.domain.replica import ReplicaState
from tidegate.policy.reconcile import FleetCore
from tidegate.sim.meter import Meter
from tidegate.sim.nodes import Process, SimNode
from tidegate.sim.profile import FleetProfile
from tidegate.sim.world import World

S = ReplicaState


@dataclass(frozen=True, slots=True)
class Faults:
    """Chances by step (slow, hang, lost and doubled reports), and mean times between crashes and power cuts (0: never).

    A lost report, or a lost order to stand still or go on, stands for a broken link: the node joins again after
    `rejoin_ms` and tells what is alive.
    """

    slow: float = 0.0
    hang: float = 0.0
    lost: float = 0.0
    doubled: float = 0.0
    crash_every_ms: float = 0.0
    power_cut_every_ms: float = 0.0
    until_ms: float = 0.0
    slow_factor: float = 10.0
    rejoin_ms: float = 3_000.0
    down_ms: float = 30_000.0


class FaultyWorld(World):
    """A world in which `faults` happen until `faults.until_ms`."""

    def __init__(self, profile: FleetProfile, core: FleetCore, meter: Meter, faults: Faults, seed: int) -> None:
        self.faults = faults
        self.dice = Random(seed)
        self.injected: dict[str, int] = {}
        super().__init__(profile, core, meter)
        for every_ms, happening in (
            (faults.crash_every_ms, self._crash_one),
            (faults.power_cut_every_ms, self._cut_power),
        ):
            if every_ms:
                self.at(self.dice.expovariate(1.0 / every_ms), happening)

    def _finish_at(self, node: SimNode, process: Process, until_ms: float) -> None:
        faulty = self.now_ms < self.faults.until_ms and process.state is not S.STOPPING
        if faulty and self._roll("hang", self.faults.hang):
            return  # until the core loses patience and stops it
        if faulty and self._roll("slow", self.faults.slow):
            until_ms = self.now_ms + (until_ms - self.now_ms) * self.faults.slow_factor
        super()._finish_at(node, process, until_ms)

    def _pause(self, command: plan.Pause) -> None:
        node = self.nodes.get(command.node)
        if node is not None and self.now_ms < self.faults.until_ms and self._roll("lost_pause", self.faults.lost):
            self.at(self.now_ms + self.faults.rejoin_ms, lambda: self._rejoin(node))
            return
        super()._pause(command)

    def report(self, node: SimNode, process: Process, reason: str = "") -> None:
        if self.now_ms < self.faults.until_ms:
            if self._roll("lost", self.faults.lost):
                self.at(self.now_ms + self.faults.rejoin_ms, lambda: self._rejoin(node))
                return
            if self._roll("doubled", self.faults.doubled):
                event = plan.ReplicaChanged(node.status(process, self.now_ms, reason))
                self.at(self.now_ms + self.dice.uniform(1.0, 2_000.0), lambda: self.tell(event))
        super().report(node, process, reason)

    def _rejoin(self, node: SimNode) -> None:
        if node.node.id in self.nodes:
            statuses = tuple(node.status(p, self.now_ms) for p in node.processes.values())
            self.tell(plan.NodeJoined(node.node, statuses))

    def _crash_one(self) -> None:
        if self.now_ms >= self.faults.until_ms:
            return
        alive = [(n, p) for n in self.nodes.values() for p in n.processes.values()]
        if alive:
            self.injected["crash"] = self.injected.get("crash", 0) + 1
            self.crash(*self.dice.choice(alive))
        self.at(self.now_ms + self.dice.expovariate(1.0 / self.faults.crash_every_ms), self._crash_one)

    def _cut_power(self) -> None:
        if self.now_ms >= self.faults.until_ms:
            return
        if len(self.nodes) > 1:
            self.injected["power_cut"] = self.injected.get("power_cut", 0) + 1
            name = self.dice.choice(list(self.nodes))
            lost = self.lose_node(name)
            again = SimNode(name, len(lost.devices), self.profile, gangs=lost.gangs)
            self.at(self.now_ms + self.faults.down_ms, lambda: self.add_node(again))
        self.at(self.now_ms + self.dice.expovariate(1.0 / self.faults.power_cut_every_ms), self._cut_power)

    def _roll(self, name: str, chance: float) -> bool:
        if chance and self.dice.random() < chance:
            self.injected[name] = self.injected.get(name, 0) + 1
            return True
        return False
