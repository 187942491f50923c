"""The world of ``bench.soak``: a platform in several processes, what may be done to it, and what was done when."""

import contextlib
import os
import random
import signal
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.e2e.platform import Platform, free_port, joined, wait_until

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

    def now_s(self) -> float:
        return time.monotonic() - self.began

    # --- its parts ------------------------------------------------------------------------------------------------

    def part(self, name: str) -> None:
        """Starts one more node or gateway of the platform, or starts it again."""
        arguments = {
            "near": ("node", "near", "--region", "local", *SHAPE),
            "far": ("node", "far", "--region", "east", *SHAPE),
            "gateway": ("gateway", "--region", "east", "--port", str(self.port)),
        }[name]
        self.parts[name] = self.stack.enter_context(joined(self.platform, *arguments))

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
        wait_until(lambda: self.regions() == {"local", "east"}, "both regions")
        for endpoint in (*ENDPOINTS, EMBED):
            assert (said := self.apply(endpoint, _base(endpoint))) == "200", f"{endpoint}: {said}"
        wait_until(lambda: not self.coming(), "first loads", 120)

    def regions(self) -> set[str]:
        return {node["region"] for node in self.admin("GET", "/api/v1/nodes").json()["data"]}

    def coming(self) -> list[str]:
        views = self.admin("GET", "/api/v1/endpoints").json()["data"]
        return [v["endpoint"] for v in views if v["state"] in ("creating", "loading")]

    def processes(self) -> list[psutil.Process]:
        """Everything of this platform, its parts on this machine included."""
        roots = [self.platform.process, *self.parts.values()]
        found: list[psutil.Process] = []
        for root in roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(root.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def engines(self) -> list[psutil.Process]:
        """Forked from a template, so they carry its command line; a template's parent does not."""
        return [p for p in self.processes() if _is_template(p) and (parent := p.parent()) and _is_template(parent)]

    def templates(self) -> list[psutil.Process]:
        engines = self.engines()
        return [p for p in self.processes() if _is_template(p) and p not in engines]

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
        return _said(reply)

    def new_key(self, tenant: str) -> str:
        reply = self.admin("POST", "/api/v1/keys", {"tenant": tenant})
        if reply.status_code != 201:
            return _said(reply)
        before, made = self.keys.get(tenant), reply.json()
        self.keys[tenant] = Key(made["id"], made["secret"])
        if before is None:
            return "first"
        time.sleep(0.3)  # gateways hear of the new one
        before.revoked_s = self.now_s()
        return _said(self.admin("DELETE", f"/api/v1/keys/{before.id}"))


def _is_template(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "tidegate.torch_engine.template" in process.cmdline()
    return False


def _said(reply: httpx.Response) -> str:
    return str(reply.status_code) if reply.status_code < 300 else f"{reply.status_code} {reply.json()['error']['code']}"


# --- what may be done: each returns what came of it -------------------------------------------------------------------


def _endpoint(dice: random.Random) -> str:
    return dice.choice(list(ENDPOINTS))


def change(world: World, dice: random.Random, endpoint: str) -> str:
    mode = dice.choice(("serverless", "dedicated_serverless", "dedicated" if endpoint == "cedar/b" else "serverless"))
    more = {"slots": dice.randint(2, 6), "mode": mode, "price_plan": dice.choice(("default", "gold"))}
    body = world.bodies.get(endpoint, _base(endpoint)) | more | {"max_replicas": dice.randint(1, 2)}
    body.pop("canary", None)
    if dice.random() < 0.5:
        body["model"] = _other(body["model"])
    return f"{more} {world.apply(endpoint, body)}"


def canary(world: World, dice: random.Random, endpoint: str) -> str:
    body = world.bodies.get(endpoint, _base(endpoint))
    return world.apply(endpoint, body | {"canary": _other(body["model"])})


def rollback(world: World, dice: random.Random, endpoint: str) -> str:
    """Back to what it was before, and from there to what it was at first: one truth again."""
    said = _said(world.admin("POST", f"/api/v1/endpoints/{endpoint}/rollback"))
    return said + " " + world.apply(endpoint, _base(endpoint))


def pause(world: World, dice: random.Random, endpoint: str) -> str:
    body = world.bodies.get(endpoint, _base(endpoint))
    said = world.apply(endpoint, body | {"paused": True})
    time.sleep(dice.uniform(0.2, 2))
    return said + " " + world.apply(endpoint, body | {"paused": False})


def remove(world: World, dice: random.Random, endpoint: str) -> str:
    said = _said(world.admin("DELETE", f"/api/v1/endpoints/{endpoint}"))
    time.sleep(dice.uniform(0, 1.5))
    return said + " " + world.apply(endpoint, _base(endpoint))


def wake(world: World, dice: random.Random, endpoint: str) -> str:
    return _said(world.admin("POST", f"/api/v1/endpoints/{endpoint}/wake"))


def sleep(world: World, dice: random.Random, endpoint: str) -> str:
    return _said(world.admin("POST", f"/api/v1/endpoints/{endpoint}/sleep"))


def price(world: World, dice: random.Random, endpoint: str) -> str:
    body = {
        "plan": dice.choice(("default", "gold")), "input_usd_per_million": "0.4",
        "output_usd_per_million": str(dice.randint(1, 9)), "accelerator_hour_usd": "1",
    }  # fmt: skip
    return _said(world.admin("POST", "/api/v1/prices", body))


def rotate(world: World, dice: random.Random, endpoint: str) -> str:
    return world.new_key(endpoint.partition("/")[0])


def budget(world: World, dice: random.Random, endpoint: str) -> str:
    """One that runs out, or a rate that is soon used up; taken away again."""
    body = {"scope": "endpoint", "subject": endpoint}
    body |= {"budget_day_usd": "0.000001"} if dice.random() < 0.5 else {"requests_per_minute": 5, "concurrency": 2}
    said = _said(world.admin("PUT", "/api/v1/limits", body))
    time.sleep(dice.uniform(0.5, 2))
    return said + " " + _said(world.admin("DELETE", f"/api/v1/limits?scope=endpoint&subject={endpoint}"))


def tenant_gone(world: World, dice: random.Random, endpoint: str) -> str:
    """A tenant with everything it has, while its requests run; then it comes back."""
    tenant = endpoint.partition("/")[0]
    mine = [name for name in world.bodies if name.startswith(tenant + "/")]
    said = [_said(world.admin("DELETE", f"/api/v1/endpoints/{name}")) for name in mine]
    world.keys[tenant].revoked_s = world.now_s()
    said.append(_said(world.admin("DELETE", f"/api/v1/tenants/{tenant}")))
    time.sleep(dice.uniform(0, 1))
    said.append(_said(world.admin("POST", "/api/v1/tenants", {"id": tenant})))
    del world.keys[tenant]
    world.new_key(tenant)
    said += [world.apply(name, _base(name)) for name in mine]
    return " ".join(sorted(set(said)))


def kill_engine(world: World, dice: random.Random, endpoint: str) -> str:
    return _kill(dice, world.engines())


def kill_template(world: World, dice: random.Random, endpoint: str) -> str:
    return _kill(dice, world.templates())


def stop_engine(world: World, dice: random.Random, endpoint: str) -> str:
    engines = world.engines()
    if engines:
        world.stop_for(dice.choice(engines), dice.uniform(0.5, 4))
    return f"of {len(engines)}"


def kill_node(world: World, dice: random.Random, endpoint: str) -> str:
    name = dice.choice(("near", "far"))
    return _again(world, dice, name)


def stop_node(world: World, dice: random.Random, endpoint: str) -> str:
    name = dice.choice(("near", "far"))
    world.stop_for(psutil.Process(world.parts[name].pid), seconds := dice.choice((1.0, 3.0, 7.0)))
    return f"{name} {seconds}"


def kill_gateway(world: World, dice: random.Random, endpoint: str) -> str:
    if dice.random() < 0.4:
        return _again(world, dice, "gateway")
    return _kill(dice, world.platform.gateways())


def stop_gateway(world: World, dice: random.Random, endpoint: str) -> str:
    chosen = dice.choice([*world.platform.gateways(), psutil.Process(world.parts["gateway"].pid)])
    world.stop_for(chosen, dice.uniform(0.5, 3))
    return str(chosen.pid)


def crash(world: World, dice: random.Random, endpoint: str) -> str:
    world.platform.crash()
    return ""


def stop_platform(world: World, dice: random.Random, endpoint: str) -> str:
    world.stop_for(psutil.Process(world.platform.process.pid), seconds := dice.choice((0.5, 2.0, 6.0)))
    return str(seconds)


def full_disk(world: World, dice: random.Random, endpoint: str) -> str:
    """Takes every byte that is left of the file system of the platform, for a while; nothing where it has none of its
    own.
    """
    if not os.path.ismount(world.platform.directory):
        return "not its own"
    filler = world.platform.directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 4_096):
            continue
    time.sleep(dice.uniform(0.5, 3))
    filler.unlink()
    return "freed"


def _kill(dice: random.Random, victims: list[psutil.Process]) -> str:
    if victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            dice.choice(victims).kill()
    return f"of {len(victims)}"


def _again(world: World, dice: random.Random, name: str) -> str:
    """SIGKILL, and the same command again after a while."""
    world.parts[name].kill()
    world.parts[name].wait(10)
    time.sleep(dice.uniform(0, 2))
    world.part(name)
    return name


def _base(endpoint: str) -> dict[str, Any]:
    if endpoint == EMBED:
        return {"model": "embed", "regions": ["local", "east"]}
    number = list(ENDPOINTS).index(endpoint)
    return {"model": f"m{number}", "regions": ENDPOINTS[endpoint], "slots": 4, "accelerator_memory": REPLICA_MEMORY}


def _other(model: str) -> str:
    """Each endpoint has two models that nobody else has: m3 and n3."""
    return ("n" if model[0] == "m" else "m") + model[1:]


OPERATIONS = {
    change: 8, canary: 3, rollback: 2, pause: 2, remove: 2, wake: 2, sleep: 3, price: 1, rotate: 2, budget: 2,
    tenant_gone: 1,
}  # fmt: skip
FAULTS = {
    kill_engine: 5, stop_engine: 3, kill_template: 1, kill_node: 2, stop_node: 2, kill_gateway: 2, stop_gateway: 1,
    crash: 1, stop_platform: 1, full_disk: 1,
}  # fmt: skip


def do(world: World, dice: random.Random, only: set[str]) -> None:
    """One of them, written down with its time; of those in `only` if there are any."""
    table = {act: weight for act, weight in (OPERATIONS | FAULTS).items() if not only or act.__name__ in only}
    (chosen,) = dice.choices(list(table), list(table.values()))
    endpoint = _endpoint(dice)
    op = Op(chosen.__name__, endpoint if chosen in OPERATIONS else "", world.now_s())
    world.ops.append(op)
    try:
        op.said = chosen(world, dice, endpoint)
    except AssertionError as error:
        op.said = f"FAILED {error}"
        world.problems.append(str(op))
    op.to_s = world.now_s()


def restore(world: World) -> None:
    """Everything runs and is wanted as at the beginning."""
    for process in list(world.stopped):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
    for name, process in list(world.parts.items()):
        if process.poll() is not None:
            world.problems.append(f"{name} ended by itself with {process.returncode}")
            world.part(name)
    wait_until(lambda: world.regions() == {"local", "east"}, "both regions again")
    for endpoint in (*ENDPOINTS, EMBED):
        if (said := world.apply(endpoint, _base(endpoint))) != "200":
            world.problems.append(f"{endpoint} is not taken back: {said}")
