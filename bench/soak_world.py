"""The world of ``bench.soak``: a platform in several processes, what it is wanted to be, and what was done when."""

import contextlib
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.platform import Platform, free_port, join_token, joined, joining, wait_until

REPLICA_MEMORY = "48MiB"
ACCELERATOR_MEMORY = "96MiB"  # holds two replicas
ADMIN_S_MAX = 30.0
CONFIG = f"""
demo = false
[accelerators]
kind = "cpu"
count = 1
memory = "{ACCELERATOR_MEMORY}"
[engine]
threads = 1
[capacity]
residency_ms_min = 200
wait_ms_max = 3000
[prices.default]
input_usd_per_million_tokens = "0.2"
output_usd_per_million_tokens = "0.8"
[prices.gold]
input_usd_per_million_tokens = "2"
output_usd_per_million_tokens = "8"
"""
ENDPOINTS = {
    "acme/a": ["local"], "acme/b": ["local", "east"], "acme/c": ["east", "local"],
    "birch/a": ["local"], "birch/b": ["east"], "birch/c": ["local", "east"],
    "cedar/a": ["local", "east"], "cedar/b": ["local"], "acme/bulk": ["local", "east"],
}  # fmt: skip
EMBED = "birch/embed"
TEMPLATE = "tidegate.torch_engine.template"
TENANTS = ("acme", "birch", "cedar")
SHAPE = ("--accelerators", "1", "--accelerator-memory", ACCELERATOR_MEMORY)


@dataclass(slots=True)
class Op:
    """One thing that was done: from when to when, what, to whom, and what came of it."""

    kind: str
    subject: str
    from_s: float
    to_s: float = float("inf")
    said: str = ""

    def __str__(self) -> str:
        return f"{self.from_s:7.2f}–{self.to_s:7.2f} {self.kind} {self.subject} {self.said}"


@dataclass(slots=True)
class Key:
    id: str
    secret: str = field(repr=False)
    revoked_s: float = float("inf")


@dataclass
class World:
    """`models`: name → folder; `bodies`: what each endpoint is wanted to be now; `spoken`: the models it ever had."""

    platform: Platform
    models: dict[str, Path]
    seed: int
    began: float = field(default_factory=time.monotonic)
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    spoken: dict[str, set[str]] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    parts: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopped: list[psutil.Process] = field(default_factory=list)
    batches: dict[str, tuple[str, bool]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)
    port: int = field(default_factory=free_port)
    relay_port: int = field(default_factory=free_port)

    def now_s(self) -> float:
        return time.monotonic() - self.began

    # --- its parts ------------------------------------------------------------------------------------------------

    def part(self, name: str) -> None:
        """Starts one more node or gateway of the platform, or starts it again. With an even seed those of the other
        region join as from another machine: over mutual TLS, with directories, a relay and a journal of their own.
        """
        arguments = {
            "near": ("node", "near", "--region", "local", *SHAPE),
            "far": ("node", "far", "--region", "east", *SHAPE),
            "gateway": ("gateway", "--region", "east", "--port", str(self.port)),
        }[name]
        if name == "near" or self.seed % 2:
            self.parts[name] = self.stack.enter_context(joined(self.platform, *arguments))
            return
        arguments += ("--data-dir", str(self.platform.directory / name))
        relay = f"127.0.0.1:{self.relay_port}"
        arguments += ("--listen", relay, "--address", relay) if name == "far" else ("--name", name)
        if name not in self.parts:
            role = "node" if name == "far" else "gateway"
            arguments += ("--token", join_token(self.platform, role, name, "east"))
        self.parts[name] = self.stack.enter_context(joining(self.platform, *arguments))

    @property
    def urls(self) -> tuple[str, str]:
        """The platform's own gateway, and the one that joined."""
        return self.platform.base_url, f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        for name in ("near", "far", "gateway"):
            self.part(name)
        for tenant in TENANTS:
            self.admin("POST", "/api/v1/tenants", {"id": tenant})
            self.new_key(tenant)
        wait_until(lambda: all(self.is_there(name) for name in self.parts), "all parts")
        for endpoint in (*ENDPOINTS, EMBED):
            assert (answer := self.apply(endpoint, base(endpoint))) == "200", f"{endpoint}: {answer}"
        wait_until(lambda: not self.coming(), "first loads", 120)

    def is_there(self, name: str) -> bool:
        """A node that the control plane knows, or a gateway that answers."""
        if name != "gateway":
            return name in {node["id"] for node in self.admin("GET", "/api/v1/nodes").json()["data"]}
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.urls[1]}/readyz", timeout=5).status_code == 200
        return False

    def coming(self) -> list[str]:
        views = self.admin("GET", "/api/v1/endpoints").json()["data"]
        return [v["name"] for v in views if v["state"] in ("creating", "loading")]

    def processes(self) -> list[psutil.Process]:
        """Everything of this platform and of its parts, engines whose template was killed included."""
        found = set(self._forked())
        for root in (self.platform.process, *self.parts.values()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {psutil.Process(root.pid), *psutil.Process(root.pid).children(recursive=True)}
        return sorted(found, key=lambda process: process.pid)

    def engines(self) -> list[psutil.Process]:
        """Forked from a template, so they carry its command line; a template's parent is the platform or a node."""
        return [process for process in self._forked() if process not in self.templates()]

    def templates(self) -> list[psutil.Process]:
        owners = {self.platform.process.pid, *(part.pid for part in self.parts.values())}
        return [process for process in self._forked() if _parent(process) in owners]

    def _forked(self) -> list[psutil.Process]:
        mine = str(self.platform.directory)
        return [p for p in psutil.process_iter() if TEMPLATE in (words := _words(p)) and mine in " ".join(words)]

    def stop_for(self, process: psutil.Process, seconds: float) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGSTOP)
            self.stopped.append(process)
            time.sleep(seconds)
            process.send_signal(signal.SIGCONT)
            self.stopped.remove(process)

    # --- its admin API ----------------------------------------------------------------------------------------------

    def admin(self, method: str, path: str, body: object = None) -> httpx.Response:
        """Asked again while the platform is on its way back; what answers 5xx then is a problem."""
        headers = {"authorization": f"Bearer {self.platform.ready['admin_key']}"}
        deadline = time.monotonic() + ADMIN_S_MAX
        while True:
            try:
                url = self.platform.base_url + path
                reply = httpx.request(method, url, json=body, headers=headers, timeout=ADMIN_S_MAX)
                last = reply.text[:200]
                if reply.status_code < 500:
                    return reply
                if reply.status_code != 503:
                    self.problems.append(f"{method} {path}: {reply.status_code} {reply.text[:200]}")
                    return reply
            except httpx.TransportError as error:
                last = repr(error)
            if time.monotonic() > deadline:
                raise AssertionError(f"no answer to {method} {path} within {ADMIN_S_MAX:.0f} s: {last}")
            time.sleep(0.2)

    def apply(self, endpoint: str, body: dict[str, Any]) -> str:
        """`model` (and that of a canary) is a name of `models`."""
        named = [body["model"], *([body["canary"]] if "canary" in body else [])]
        self.spoken.setdefault(endpoint, set()).update(named)
        wanted = body | {"model": str(self.models[body["model"]])}
        if "canary" in body:
            wanted["canary"] = {"model": str(self.models[body["canary"]]), "weight": 0.3}
        reply = self.admin("PUT", f"/api/v1/endpoints/{endpoint}", wanted)
        if reply.status_code == 200:
            self.bodies[endpoint] = body
        return said(reply)

    def new_key(self, tenant: str) -> str:
        reply = self.admin("POST", "/api/v1/keys", {"tenant": tenant})
        if reply.status_code != 201:
            return said(reply)
        before, made = self.keys.get(tenant), reply.json()
        self.keys[tenant] = Key(made["id"], made["secret"])
        if before is None:
            return "first"
        time.sleep(0.3)  # gateways hear of the new one
        before.revoked_s = self.now_s()
        return said(self.admin("DELETE", f"/api/v1/keys/{before.id}"))


def _words(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.cmdline())
    return []


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return int(process.ppid())
    return 0


def said(reply: httpx.Response) -> str:
    return str(reply.status_code) if reply.status_code < 300 else f"{reply.status_code} {reply.json()['error']['code']}"


def base(endpoint: str) -> dict[str, Any]:
    if endpoint == EMBED:
        return {"model": "embed", "regions": ["local", "east"]}
    number = list(ENDPOINTS).index(endpoint)
    return {"model": f"m{number}", "regions": ENDPOINTS[endpoint], "slots": 4, "accelerator_memory": REPLICA_MEMORY}
