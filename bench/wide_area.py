"""Machines far apart, on one machine: a network namespace a site, and packets between them that take their time.

Each site has a TUN device (Linux, tun(4)); one thread reads every packet, waits as long as the way takes, and writes it
to the site it is for, or drops it while a site is cut off. So TCP, its retransmissions and its timeouts are the real
ones, and a cable can be cut without anybody being told. Needs root, ``ip`` (iproute2) and /dev/net/tun; no netem.
"""

import asyncio
import contextlib
import fcntl
import os
import struct
import subprocess
import threading
from collections.abc import Mapping
from types import TracebackType

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES_MAX = 2_048
PREFIX = "tgb-"


class Network:
    """`one_way_ms` by pair of sites. The site ``here`` is this process's own namespace."""

    def __init__(self, one_way_ms: Mapping[frozenset[str], float]) -> None:
        sites = sorted({site for pair in one_way_ms for site in pair})
        self.address = {site: f"10.77.0.{number}" for number, site in enumerate(sites, 1)}
        self._delay_s = {pair: ms / 1_000 for pair, ms in one_way_ms.items()}
        self._devices: dict[str, int] = {}
        self._cut: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Network":
        for site in self.address:
            self._devices[site] = self._site(site)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        for device in self._devices.values():
            os.close(device)
        for site in self.address:
            if site != "here":
                subprocess.run(["ip", "netns", "del", PREFIX + site], check=False, capture_output=True)

    def command(self, site: str, *arguments: str) -> list[str]:
        """What runs `arguments` at `site`."""
        return list(arguments) if site == "here" else ["ip", "netns", "exec", PREFIX + site, *arguments]

    def cut(self, site: str) -> None:
        """From now on nothing reaches or leaves it."""
        self._loop.call_soon_threadsafe(self._cut.add, site)

    def mend(self, site: str) -> None:
        self._loop.call_soon_threadsafe(self._cut.discard, site)

    def _site(self, site: str) -> int:
        name = f"{PREFIX}{site}"[:15]
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        inside: list[str] = []
        if site != "here":
            # A run that was killed may have left its namespace; one that is not there is what we want.
            subprocess.run(["ip", "netns", "del", PREFIX + site], check=False, capture_output=True)
            _ip("netns", "add", PREFIX + site)
            _ip("link", "set", name, "netns", PREFIX + site)
            inside = ["-n", PREFIX + site]
            _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "addr", "add", f"{self.address[site]}/24", "dev", name)
        _ip(*inside, "link", "set", name, "up")
        return device

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        for site, device in self._devices.items():
            self._loop.add_reader(device, self._read, site, device)
        self._loop.run_forever()
        self._loop.close()

    def _read(self, site: str, device: int) -> None:
        by_address = {address: other for other, address in self.address.items()}
        with contextlib.suppress(BlockingIOError):
            while True:
                packet = os.read(device, PACKET_BYTES_MAX)
                there = by_address.get(".".join(map(str, packet[16:20])))
                if packet[0] >> 4 == 4 and there is not None and not {site, there} & self._cut:
                    self._loop.call_later(self._delay_s[frozenset((site, there))], self._write, there, packet)

    def _write(self, site: str, packet: bytes) -> None:
        if site not in self._cut:
            with contextlib.suppress(BlockingIOError):  # a full device drops packets, as any does
                os.write(self._devices[site], packet)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
