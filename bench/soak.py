"""The whole platform under everything at once, from one seed: what went wrong, and the list of what was done.

Run: ``python -m bench.soak [--seed N] [--seeds N] [--seconds S] [--clients N] [--only KIND,KIND] [--keep DIR]``; kept
results are in bench/results/soak.md. A platform, two joined nodes and a joined gateway; three tenants with nine
generative endpoints, one for embeddings, and batches, on three accelerators that hold two replicas each. Clients ask
without a pause (unary, streams, some hang up, embeddings, WebSocket sessions, batches), while endpoints are changed,
removed, paused, put to sleep, tenants deleted, keys and prices exchanged, budgets used up, processes killed or stopped
and the disk filled (`bench.soak_acts`). In the end everything is wanted as at first. Then (`bench.soak_judge`):

* every request ended once: with the answer of a model its endpoint has had, as ``transformers`` greedily says it; or
  with a documented error that something done at that time explains; or cut off by what happened to its gateway
* the ledger has each finished request once, with the tokens its client got, and balances; batches have each line once
* all endpoints answer again within `RECOVER_S_MAX`; replicas, engines and sockets are as many; nothing is left after
  the end, and no file holds a traceback or a prompt

Where something is wrong, `problems` says what and `done` lists everything that was done. As root the platform has a
small file system of its own, so that the disk can be full.
"""

import asyncio
import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench import exactness, main, soak_acts, soak_judge, soak_world
from bench.live import load_average
from bench.soak_clients import Clients
from bench.soak_world import EMBED, ENDPOINTS, World
from tests.e2e.platform import free_port, running

RECOVER_S_MAX = 60.0
DISK = "size=256m,mode=700"


@functools.cache
def models() -> dict[str, Path]:
    """Two for each endpoint, and nobody else's."""
    from transformers.utils import logging

    from tests import models as make

    logging.disable_progress_bar()
    found = {
        f"{kind}{n}": make.llama(seed=1_000 * i + n) for n in range(len(ENDPOINTS)) for i, kind in enumerate("mn", 2)
    }
    return found | {"embed": make.bert_embedding()}


@functools.cache
def truths() -> dict[tuple[str, str, int], str]:
    """What each model says, kept beside the models: the reference is slow and never changes."""
    from tests import models as make

    kept = Path(tempfile.gettempdir()) / f"tidegate-soak-{make.LAYOUT_VERSION}-{len(ENDPOINTS)}.json"
    if not kept.exists():
        said = exactness.truths({name: path for name, path in models().items() if name != "embed"})
        kept.write_text(json.dumps([[*key, text] for key, text in said.items()]))
    return {(model, prompt, count): text for model, prompt, count, text in json.loads(kept.read_text())}


def run_seed(seed: int, seconds: float, clients: int, only: set[str], directory: Path) -> dict[str, Any]:
    made, said = models(), truths()
    with contextlib.ExitStack() as stack:
        links = f'[links]\nlisten = "127.0.0.1:{free_port()}"\n'
        platform = stack.enter_context(running(directory, config=soak_world.CONFIG + links))
        world = World(platform, made, seed)
        stack.enter_context(world.stack)
        world.up()
        asking = Clients(world, clients)
        at_first = soak_judge.resources(world)
        figures = asyncio.run(_drive(world, asking, seconds, only))
        figures |= soak_judge.judge(world, asking.seen, said)
        soak_judge.as_many_as_there_should_be(world)
        figures["resources"] = {"at_first": at_first, "at_last": soak_judge.resources(world)}
        processes = world.processes()
        world.stack.close()
        if code := platform.stop():
            world.problems.append(f"the platform ended with {code}")
        soak_judge.left_over(world, processes)
    figures["ops"] = dict(Counter(op.kind for op in world.ops))
    figures["problems"] = [problem.replace(str(directory), "…") for problem in world.problems]
    if world.problems:
        figures["done"] = [str(op) for op in world.ops]
    return {"seed": seed, "load_average": load_average(), **figures}


async def _drive(world: World, asking: Clients, seconds: float, only: set[str]) -> dict[str, Any]:
    """Clients, operations and faults for `seconds`, then everything as at first, and how long until all answer."""
    world.began = time.monotonic()
    traffic = asyncio.create_task(asking.run())
    await asyncio.gather(*(_act(world, seconds, table, only) for table in (soak_acts.OPERATIONS, soak_acts.FAULTS)))
    await asyncio.to_thread(soak_acts.restore, world)
    began = time.monotonic()
    await asyncio.gather(*(_until_served(world, asking, endpoint) for endpoint in (*ENDPOINTS, EMBED)))
    recovered_s = time.monotonic() - began
    asking.over.set()
    await traffic
    return {"seconds": round(world.now_s(), 1), "recovered_s": round(recovered_s, 1)}


async def _act(world: World, seconds: float, table: Mapping[soak_acts.Act, int], only: set[str]) -> None:
    """One act of `table` after the other, in the order of the seed."""
    wanted = {act: weight for act, weight in table.items() if not only or act.__name__ in only}
    dice = random.Random(f"{world.seed}/{len(table)}")
    while wanted and world.now_s() < seconds:
        await asyncio.sleep(dice.expovariate(1.5))
        await asyncio.to_thread(soak_acts.do, world, dice, wanted)


async def _until_served(world: World, asking: Clients, endpoint: str) -> None:
    deadline = time.monotonic() + RECOVER_S_MAX
    while (seen := await asking.ask_once(endpoint)).outcome != "answered":
        if time.monotonic() > deadline:
            world.problems.append(f"does not answer {RECOVER_S_MAX:.0f} s after everything was restored: {seen}")
            return
        await asyncio.sleep(0.3)


@contextlib.contextmanager
def _folder(keep: Path | None, seed: int) -> Iterator[Path]:
    """A directory, its data on a file system of its own where that may be mounted; a copy is kept if asked for."""
    with tempfile.TemporaryDirectory(prefix="tidegate-soak-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", str(data)]
        mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        try:
            yield Path(folder)
            if keep is not None:
                ignored = shutil.ignore_patterns("*.sock", "run")
                shutil.copytree(folder, keep / f"seed-{seed}", ignore=ignored, dirs_exist_ok=True)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(data)], check=True)


def run(
    seed: int = 1, seeds: int = 1, seconds: float = 60.0, clients: int = 8, only: str = "", keep: Path | None = None
) -> dict[str, Any]:
    """`seeds` of them from `seed` on. `only`: names of acts, comma-separated; `keep`: where directories are kept, with
    all logs.
    """
    found = []
    for number in range(seed, seed + seeds):
        with _folder(keep, number) as at:
            found.append(run_seed(number, seconds, clients, {name for name in only.split(",") if name}, at))
        if found[-1]["problems"]:
            print(json.dumps(found[-1], indent=2), file=sys.stderr, flush=True)
    return {"seeds": found, "problems": sum(len(one["problems"]) for one in found)}


if __name__ == "__main__":
    # Told to end, it still ends its processes and takes its file system away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main(run)
