"""Regions as machines far apart: nearest gateway, home full, home dead, home back, and a cable cut mid-stream.

Run: ``python -m bench.regions [--seconds N]`` as root (network namespaces). Kept figures: bench/results/regions.md.

The platform (control plane, gateway, ledger) is at `hub`; `eu` and `us` each have a node, `us` a gateway too. They are
namespaces that share nothing but delayed packets (`bench.wide_area`) and join over mutual TLS with tokens, as machines
do. A client asks `acme/free` (home eu, then us) all the while; `acme/bound` may be served in eu only. What was served
where is taken from the answers, the nodes' own logs and the ledger, which must agree. Latencies are beside those of the
same question asked the other way in the same run.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from bench.wide_area import Network
from tests.e2e.platform import wait_until
from tidegate import demo_models

ONE_WAY_MS = {
    frozenset(pair): ms
    for pair, ms in {
        ("hub", "eu"): 10.0, ("hub", "us"): 40.0, ("eu", "us"): 45.0,
        ("hub", "here"): 0.5, ("eu", "here"): 0.5, ("us", "here"): 0.5,
    }.items()
}  # fmt: skip
PORT, LINKS_PORT = 8_000, 7_443
ANSWERED: Counter[str] = Counter()  # requests answered with 200, by endpoint
FILLERS = ("filler-a", "filler-b")  # one for each accelerator of eu
MODEL = str(demo_models.path("tides"))
MEMORY = "160MiB"  # of the 256 MiB of an accelerator: two never fit
CONFIG = """region = "hub"
demo = false
[[tenants]]
id = "acme"
[accelerators]
count = 1
memory = "1MiB"
[links]
listen = "{hub}:{port}"
"""


class World:
    """The sites, their processes, and clients of the platform."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.network, self.directory = network, directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.ready: dict[str, Any] = {}
        self.key = ""

    def tidegate(self, site: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / f"{name}.log").open("ab") as log:
            command = self.network.command(site, sys.executable, "-m", "tidegate", *arguments)
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.directory / site)
        return self.processes[name]

    def up(self) -> None:
        for site in ("hub", "eu", "us"):
            (self.directory / site).mkdir()
        hub = self.network.address["hub"]
        (self.directory / "hub" / "tidegate.toml").write_text(CONFIG.format(hub=hub, port=LINKS_PORT))
        ready = self.directory / "ready.json"
        self.tidegate("hub", "hub", "up", "--host", hub, "--port", str(PORT), "--ready-file", str(ready))
        self.ready = wait_until(lambda: ready.exists() and json.loads(ready.read_text()), "the platform")
        for site in ("eu", "us"):
            self.join_node(site, self.token("node", f"{site}-1", site))
        gateway = ("gateway", "--name", "us-gw", "--region", "us", "--host", self.network.address["us"])
        token = self.token("gateway", "us-gw", "us")
        self.tidegate("us", "us-gw", "join", *gateway, "--port", str(PORT), "--data-dir", "gw", "--token", token)
        wait_until(lambda: self.regions() == {"hub", "eu", "us"}, "both nodes")
        with self.admin() as admin:
            self.key = admin.post("/api/v1/keys", json={"tenant": "acme"}).json()["secret"]
        wait_until(lambda: self.answers("us"), "the gateway in us")

    def join_node(self, site: str, token: str = "") -> None:
        shape = ("--accelerators", "2", "--accelerator-memory", "256MiB", "--data-dir", "node")
        given = ("--token", token) if token else ()
        self.tidegate(site, f"{site}-1", "join", "node", f"{site}-1", "--region", site, *shape, *given)

    def token(self, role: str, name: str, region: str) -> str:
        made = subprocess.run(
            [sys.executable, "-m", "tidegate", "join", "token", role, name, "--region", region],
            check=True, capture_output=True, cwd=self.directory / "hub",
        )  # fmt: skip
        return made.stdout.decode().strip()

    def close(self) -> None:
        for name, process in reversed(self.processes.items()):
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                if process.poll() is None:
                    print(f"{name} had to be killed", file=sys.stderr)
                    process.kill()

    def admin(self) -> httpx.Client:
        return self.client("hub", str(self.ready["admin_key"]))

    def client(self, site: str, key: str = "") -> httpx.Client:
        url = f"http://{self.network.address[site]}:{PORT}"
        return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key or self.key}"}, timeout=60)

    def answers(self, site: str) -> bool:
        with self.client(site) as client, contextlib.suppress(httpx.TransportError):
            return client.get("/readyz").status_code == 200
        return False

    def regions(self) -> set[str]:
        with self.admin() as admin:
            return {node["region"] for node in admin.get("/api/v1/nodes").json()["data"]}

    def apply(self, name: str, regions: list[str], **more: object) -> None:
        body = {"model": MODEL, "regions": regions, "accelerator_memory": MEMORY, **more}
        with self.admin() as admin:
            reply = admin.put(f"/api/v1/endpoints/acme/{name}", json=body)
            assert reply.status_code == 200, reply.text

    def usage(self) -> dict[str, Any]:
        with self.admin() as admin:
            rows = admin.get("/api/v1/usage?by=endpoint").json()["rows"]
        return {row["group"]: row for row in rows}

    def requests(self, name: str) -> int:
        return int(self.usage().get(f"acme/{name}", {"billed_requests": 0})["billed_requests"])

    def node_log(self, site: str) -> str:
        return (self.directory / site / "node" / "logs" / "node.log").read_text()


def ask(client: httpx.Client, name: str, tokens: int = 2) -> tuple[int, str]:
    """(status, region or refusal code)."""
    body = {"model": f"acme/{name}", "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    reply = client.post("/v1/chat/completions", json=body)
    if reply.status_code != 200:
        return reply.status_code, str(reply.json()["error"]["code"])
    ANSWERED[name] += 1
    return 200, reply.headers["x-tidegate-region"]


class Asking(threading.Thread):
    """One client that asks `acme/free` through the hub, every 100 ms; what came back, by phase."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self._world, self._stop_asked = world, threading.Event()
        self.phase = "home"
        self.seen: dict[str, Counter[str]] = {}
        self.slowest_ms: dict[str, float] = {}

    def run(self) -> None:
        with self._world.client("hub") as client:
            while not self._stop_asked.wait(0.1):
                phase, began = self.phase, time.monotonic()
                status, found = ask(client, "free")
                self.seen.setdefault(phase, Counter())[found if status == 200 else f"{status} {found}"] += 1
                took_ms = (time.monotonic() - began) * 1_000
                self.slowest_ms[phase] = max(self.slowest_ms.get(phase, 0.0), took_ms)

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(90)


def nearest(world: World, count: int) -> dict[str, Any]:
    """A client at us asks an endpoint served in us: by the gateway there, and by the one at the hub."""
    world.apply("near", ["us"], max_replicas=1)
    found: dict[str, Any] = {}
    for gateway in ("us", "hub"):
        url = f"http://{world.network.address[gateway]}:{PORT}"
        printed = subprocess.run(
            world.network.command("us", sys.executable, "-m", "bench.regions", "--client", url, world.key, str(count)),
            check=True, capture_output=True, cwd=Path(__file__).parent.parent, timeout=300,
        )  # fmt: skip
        found[f"by_{gateway}_gateway"] = json.loads(printed.stdout)
    found["p50_ratio"] = round(found["by_us_gateway"]["p50_ms"] / found["by_hub_gateway"]["p50_ms"], 3)
    return found


def client_there(url: str, key: str, count: int) -> None:
    """Runs at a site: one question after the other on one connection."""
    took = []
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        for number in range(count + 3):
            began = time.perf_counter()
            status, region = ask(client, "near", 1)
            assert (status, region) == (200, "us"), (status, region)
            if number >= 3:  # connections are made by the first
                took.append((time.perf_counter() - began) * 1_000)
    took.sort()
    print(json.dumps({"p50_ms": round(statistics.median(took), 1), "p95_ms": round(took[len(took) * 95 // 100], 1)}))


def until(check: Callable[[], bool], what: str, seconds: float = 90) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    wait_until(check, what, seconds)
    return round(time.monotonic() - began, 2)


def regions(world: World, seconds: float) -> dict[str, Any]:
    """Home full, dead and back while a client asks; what may be served in eu only is never served elsewhere."""
    world.apply("free", ["eu", "us"], max_replicas=1)
    world.apply("bound", ["eu"], max_replicas=1)
    result: dict[str, Any] = {}
    with world.client("hub") as client:
        assert ask(client, "bound") == (200, "eu")
        assert ask(client, "free") == (200, "eu")
        asking = Asking(world)
        asking.start()

        def served_in(region: str) -> Callable[[], bool]:
            return lambda: ask(client, "free") == (200, region)

        time.sleep(seconds)
        asking.phase = "home full"
        for filler in FILLERS:
            world.apply(filler, ["eu"], mode="dedicated")
        result["home_full_borrowed_after_s"] = until(served_in("us"), "borrowed in us")
        time.sleep(seconds)
        asking.phase = "home has room again"
        with world.admin() as admin:
            for filler in FILLERS:
                assert admin.delete(f"/api/v1/endpoints/acme/{filler}").status_code < 300
        result["home_room_returned_after_s"] = until(served_in("eu"), "returned to eu")
        wait_until(lambda: ask(client, "bound") == (200, "eu"), "the bound one at home again")
        asking.phase = "home dead"
        world.processes["eu-1"].kill()
        result["home_dead_borrowed_after_s"] = until(served_in("us"), "borrowed in us")
        result["bound_while_home_is_dead"] = list(ask(client, "bound"))
        time.sleep(seconds)
        asking.phase = "home back"
        world.join_node("eu")  # without a token: it has its certificate
        result["home_back_bound_served_after_s"] = until(lambda: ask(client, "bound") == (200, "eu"), "bound at home")
        result["home_back_returned_after_s"] = until(served_in("eu"), "returned to eu")
        time.sleep(seconds)
        asking.stop()
    names = ("free", "bound")
    with contextlib.suppress(AssertionError):  # told below
        wait_until(lambda: [world.requests(name) for name in names] == [ANSWERED[name] for name in names], "usage", 30)
    result["answered"] = {name: ANSWERED[name] for name in names}
    result["in_the_ledger"] = {name: world.requests(name) for name in names}
    result["asked"] = {phase: dict(counts) for phase, counts in asking.seen.items()}
    result["slowest_ms"] = {phase: round(ms) for phase, ms in asking.slowest_ms.items()}
    result["us_log_names_bound"] = "acme.bound" in world.node_log("us") or "acme/bound" in world.node_log("us")
    result["us_log_names_free"] = "acme.free" in world.node_log("us")
    return result


def cable_cut(world: World) -> dict[str, Any]:
    """The us site is cut off in the middle of a stream that the hub's gateway carries, and comes back."""
    with world.client("hub") as client:
        assert ask(client, "near")[0] == 200
        body = {
            "model": "acme/near",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 450,
            "stream": True,
        }
        time.sleep(2)
        before = world.usage()["acme/near"]
        delivered, last, cut_at = 0, "", 0.0
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            replica = reply.headers["x-tidegate-replica"]
            for line in reply.iter_lines():
                delivered = int(line[4:]) if line.startswith("id: ") else delivered
                last = line[6:] if line.startswith("data: ") else last
                if delivered >= 1 and not cut_at:
                    world.network.cut("us")
                    cut_at = time.monotonic()
        error_after_s = round(time.monotonic() - cut_at, 2)
        gone_after_s = until(lambda: "us" not in world.regions(), "the platform takes us for gone")
        world.network.mend("us")
        back_after_s = until(lambda: "us" in world.regions(), "us is back")
        served_after_s = until(lambda: ask(client, "near")[0] == 200, "served in us again")
        same = client.post("/v1/chat/completions", json={**body, "stream": False, "max_tokens": 1})
        wait_until(lambda: world.usage()["acme/near"]["requests"] >= before["requests"] + 3, "usage")
        after = world.usage()["acme/near"]
    starts = [line for line in world.node_log("us").splitlines() if "Start acme.near" in line]
    billed = after["output_tokens"] - before["output_tokens"] - 2 - 1
    return {
        "ended_with_an_error_event": '"error"' in last, "error_after_s": error_after_s,
        "node_gone_after_s": gone_after_s, "node_back_after_s": back_after_s, "served_again_after_s": served_after_s,
        "tokens_delivered": delivered, "tokens_billed": billed,
        "same_engine_after": same.headers.get("x-tidegate-replica") == replica, "engine_starts": len(starts),
    }  # fmt: skip


@contextlib.contextmanager
def platform(directory: Path) -> Iterator[World]:
    with Network(ONE_WAY_MS) as network:
        world = World(network, directory)
        try:
            world.up()
            yield world
        finally:
            world.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each phase goes on once it has settled")
    parser.add_argument("--requests", type=int, default=50, help="questions for the nearest gateway")
    parser.add_argument("--client", nargs=3, metavar=("URL", "KEY", "N"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        client_there(given.client[0], given.client[1], int(given.client[2]))
        return
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.W_OK):
        sys.exit("network namespaces and /dev/net/tun need root; tests/e2e/test_machines.py does what goes without")
    with tempfile.TemporaryDirectory(prefix="regions-") as directory, platform(Path(directory)) as world:
        result = {
            "one_way_ms": {" ".join(sorted(pair)): ms for pair, ms in ONE_WAY_MS.items()},
            "nearest": nearest(world, given.requests),
            "regions": regions(world, given.seconds),
            "cable_cut": cable_cut(world),
            "load_average": os.getloadavg()[0],
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
