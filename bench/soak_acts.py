"""What ``bench.soak`` does to its world while clients ask: operations of an operator, and faults."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Mapping

import psutil

from bench.soak_world import EMBED, ENDPOINTS, Op, World, base, said
from tests.e2e.platform import wait_until

Act = Callable[[World, random.Random, str], str]
"""Does it to an endpoint, or to whatever the dice say; what came of it."""


def change(world: World, dice: random.Random, endpoint: str) -> str:
    mode = dice.choice(("serverless", "dedicated_serverless", "dedicated" if endpoint == "cedar/b" else "serverless"))
    more = {"slots": dice.randint(2, 6), "mode": mode, "price_plan": dice.choice(("default", "gold"))}
    body = world.bodies.get(endpoint, base(endpoint)) | more | {"max_replicas": dice.randint(1, 2)}
    body.pop("canary", None)
    if dice.random() < 0.5:
        body["model"] = _other(body["model"])
    return f"{more} {world.apply(endpoint, body)}"


def canary(world: World, dice: random.Random, endpoint: str) -> str:
    body = world.bodies.get(endpoint, base(endpoint))
    return world.apply(endpoint, body | {"canary": _other(body["model"])})


def rollback(world: World, dice: random.Random, endpoint: str) -> str:
    """Back to what it was before, and from there to what it was at first: one truth again."""
    first = said(world.admin("POST", f"/api/v1/endpoints/{endpoint}/rollback"))
    return first + " " + world.apply(endpoint, base(endpoint))


def pause(world: World, dice: random.Random, endpoint: str) -> str:
    body = world.bodies.get(endpoint, base(endpoint))
    first = world.apply(endpoint, body | {"paused": True})
    time.sleep(dice.uniform(0.2, 2))
    return first + " " + world.apply(endpoint, body | {"paused": False})


def remove(world: World, dice: random.Random, endpoint: str) -> str:
    first = said(world.admin("DELETE", f"/api/v1/endpoints/{endpoint}"))
    time.sleep(dice.uniform(0, 1.5))
    return first + " " + world.apply(endpoint, base(endpoint))


def wake(world: World, dice: random.Random, endpoint: str) -> str:
    return said(world.admin("POST", f"/api/v1/endpoints/{endpoint}/wake"))


def sleep(world: World, dice: random.Random, endpoint: str) -> str:
    return said(world.admin("POST", f"/api/v1/endpoints/{endpoint}/sleep"))


def price(world: World, dice: random.Random, endpoint: str) -> str:
    body = {
        "plan": dice.choice(("default", "gold")), "input_usd_per_million": "0.4",
        "output_usd_per_million": str(dice.randint(1, 9)), "accelerator_hour_usd": "1",
    }  # fmt: skip
    return said(world.admin("POST", "/api/v1/prices", body))


def rotate(world: World, dice: random.Random, endpoint: str) -> str:
    return world.new_key(endpoint.partition("/")[0])


def budget(world: World, dice: random.Random, endpoint: str) -> str:
    """One that runs out, or a rate that is soon used up; taken away again."""
    body: dict[str, str | int] = {"scope": "endpoint", "subject": endpoint}
    body |= {"budget_day_usd": "0.000001"} if dice.random() < 0.5 else {"requests_per_minute": 5, "concurrency": 2}
    first = said(world.admin("PUT", "/api/v1/limits", body))
    time.sleep(dice.uniform(0.5, 2))
    return first + " " + said(world.admin("DELETE", f"/api/v1/limits?scope=endpoint&subject={endpoint}"))


def tenant_gone(world: World, dice: random.Random, endpoint: str) -> str:
    """A tenant with everything it has, while its requests run; then it comes back."""
    tenant = endpoint.partition("/")[0]
    mine = [name for name in world.bodies if name.startswith(tenant + "/")]
    answers = [said(world.admin("DELETE", f"/api/v1/endpoints/{name}")) for name in mine]
    world.keys[tenant].revoked_s = world.now_s()
    answers.append(said(world.admin("DELETE", f"/api/v1/tenants/{tenant}")))
    time.sleep(dice.uniform(0, 1))
    answers.append(said(world.admin("POST", "/api/v1/tenants", {"id": tenant})))
    del world.keys[tenant]
    world.new_key(tenant)
    answers += [world.apply(name, base(name)) for name in mine]
    return " ".join(sorted(set(answers)))


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
    world.stop_for(psutil.Process(world.parts[name].pid), seconds := dice.choice((1.0, 3.0, 7.0, 7.0, 20.0)))
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
    data = world.platform.directory / "data"
    if not os.path.ismount(data):
        return "not its own"
    filler = data / "filler"
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
    wait_until(lambda: world.is_there(name), f"{name} to be back")
    return name


def _other(model: str) -> str:
    """Each endpoint has two models that nobody else has: m3 and n3."""
    return ("n" if model[0] == "m" else "m") + model[1:]


OPERATIONS: dict[Act, int] = {
    change: 8, canary: 3, rollback: 2, pause: 2, remove: 2, wake: 2, sleep: 3, price: 1, rotate: 2, budget: 2,
    tenant_gone: 1,
}  # fmt: skip
FAULTS: dict[Act, int] = {
    kill_engine: 5, stop_engine: 3, kill_template: 1, kill_node: 2, stop_node: 2, kill_gateway: 2, stop_gateway: 1,
    crash: 1, stop_platform: 1, full_disk: 1,
}  # fmt: skip


def do(world: World, dice: random.Random, table: Mapping[Act, int]) -> None:
    """One of `table`, by its weight, written down with its time."""
    (chosen,) = dice.choices(list(table), list(table.values()))
    endpoint = dice.choice(list(ENDPOINTS))
    op = Op(chosen.__name__, endpoint if chosen in OPERATIONS else "", world.now_s())
    world.ops.append(op)
    try:
        op.said = chosen(world, dice, endpoint)
    except psutil.NoSuchProcess as gone:  # something else had ended it
        op.said = str(gone)
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
    wait_until(lambda: all(world.is_there(name) for name in world.parts), "all parts again")
    for endpoint in (*ENDPOINTS, EMBED):
        if (answer := world.apply(endpoint, base(endpoint))) != "200":
            world.problems.append(f"{endpoint} is not taken back: {answer}")
