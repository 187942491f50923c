"""The book of reservations: every byte of accelerator and host memory is written down before it is used.

Per accelerator three sums are kept, so that a decision never rescans a fleet:

* *reserved*: bytes of replicas that hold, or may still hold, memory there. Only a measured release takes them out.
* *releasing*: the part of *reserved* whose replicas are on their way out (draining, sleeping, stopping).
* *pledged*: bytes promised to activations that wait for a release. They become *reserved* the moment they fit.

``free = capacity - reserved`` may be used now; ``headroom = free + releasing - pledged`` may be promised.
"""

from dataclasses import dataclass, field

from tidegate.domain.fleet import Node

Place = tuple[str, str]
"""An accelerator: (node id, accelerator id)."""


@dataclass(slots=True)
class Account:
    """The sums of one accelerator, in bytes."""

    place: Place
    capacity: int
    reserved: int = 0
    releasing: int = 0
    pledged: int = 0

    @property
    def free(self) -> int:
        return self.capacity - self.reserved

    @property
    def headroom(self) -> int:
        return self.capacity - self.reserved + self.releasing - self.pledged


@dataclass(slots=True)
class Holding:
    """What one replica (or one waiting activation) has on each of `places`."""

    places: tuple[Place, ...]
    bytes_each: int
    releasing: bool = False


@dataclass(slots=True)
class HostAccount:
    capacity: int
    reserved: int = 0
    holders: dict[str, int] = field(default_factory=dict)

    @property
    def free(self) -> int:
        return self.capacity - self.reserved


class Book:
    """Reservations of one fleet. Breaking one of its laws is a bug and raises AssertionError."""

    def __init__(self) -> None:
        self.accounts: dict[Place, Account] = {}
        self._hosts: dict[str, HostAccount] = {}
        self._holdings: dict[str, Holding] = {}
        self._pledges: dict[str, Holding] = {}

    def open(self, node: Node) -> None:
        for accelerator in node.accelerators:
            place = (node.id, accelerator.id)
            self.accounts[place] = Account(place, accelerator.memory_bytes)
        self._hosts[node.id] = HostAccount(node.host_memory_bytes)

    def close(self, node: Node) -> None:
        """The node is gone; every replica and pledge on it must have been released before."""
        for accelerator in node.accelerators:
            account = self.accounts.pop((node.id, accelerator.id))
            assert account.reserved == account.pledged == 0, f"{account.place} closed with bytes on the book"
        del self._hosts[node.id]

    def reserve(self, replica: str, places: tuple[Place, ...], bytes_each: int, *, found: bool = False) -> None:
        """Write `bytes_each` on each place. `found`: the replica was met alive on a node that came back, so the bytes
        are in use whatever the book would have allowed; free memory may then be negative until something leaves.
        """
        assert replica not in self._holdings, f"{replica} reserved twice"
        for place in places:
            account = self.accounts[place]
            assert found or account.free >= bytes_each, f"{place} over-reserved for {replica}"
            account.reserved += bytes_each
        self._holdings[replica] = Holding(places, bytes_each)

    def holds(self, replica: str) -> bool:
        return replica in self._holdings

    def bytes_each(self, replica: str) -> int:
        """What the replica has on each of its accelerators."""
        return self._holdings[replica].bytes_each

    def release(self, replica: str) -> tuple[Place, ...]:
        """Take the replica's accelerator bytes out; call it on a report that shows them freed. Idempotent."""
        holding = self._holdings.pop(replica, None)
        if holding is None:
            return ()
        for place in holding.places:
            account = self.accounts[place]
            account.reserved -= holding.bytes_each
            if holding.releasing:
                account.releasing -= holding.bytes_each
        return holding.places

    def set_releasing(self, replica: str, releasing: bool) -> None:
        holding = self._holdings.get(replica)
        if holding is None or holding.releasing == releasing:
            return
        holding.releasing = releasing
        for place in holding.places:
            self.accounts[place].releasing += holding.bytes_each if releasing else -holding.bytes_each

    def pledge(self, activation: str, places: tuple[Place, ...], bytes_each: int) -> None:
        assert activation not in self._pledges, f"{activation} pledged twice"
        self._pledges[activation] = Holding(places, bytes_each)
        for place in places:
            self.accounts[place].pledged += bytes_each

    def unpledge(self, activation: str) -> None:
        pledge = self._pledges.pop(activation)
        for place in pledge.places:
            self.accounts[place].pledged -= pledge.bytes_each

    def fits_now(self, places: tuple[Place, ...], bytes_each: int) -> bool:
        return all(self.accounts[place].free >= bytes_each for place in places)

    def host_free(self, node: str) -> int:
        return self._hosts[node].free

    def host_capacity(self, node: str) -> int:
        return self._hosts[node].capacity

    def reserve_host(self, replica: str, node: str, nbytes: int, *, found: bool = False) -> None:
        """Set (not add) the host bytes of a replica, or of the copy that some share. Going up needs room, unless the
        bytes were `found` in use.
        """
        host = self._hosts[node]
        grown = nbytes - host.holders.get(replica, 0)
        assert found or grown <= max(host.free, 0), f"host memory of {node} over-reserved for {replica}"
        host.reserved += grown
        if nbytes:
            host.holders[replica] = nbytes
        else:
            host.holders.pop(replica, None)

    def host_bytes(self, replica: str, node: str) -> int:
        return self._hosts[node].holders.get(replica, 0)
