"""Money under SIGKILL: real journals, a real database, and processes that die at random instants, hundreds of seeds.

Shows that the ledger is what was delivered: every request whose client saw its end is billed to the token, nothing is
billed twice, and what a killed gateway leaves unbilled of running streams is about one checkpoint interval. Run:
``python -m bench.faults [--seeds N] [--database sqlite|postgresql] [--first N]``; kept figures are in
bench/results/faults.md.

Each seed is a gateway process that writes the journal as the gateway does (checkpoints of running streams, a final
record durable before the client sees the end), an ingest process that posts it, and a killer. The traffic is mixed:
streams, unary answers, embeddings, aborts after any number of tokens (none too), engines that die before or amid an
answer, refusals, and records that come twice. Clients are stood in for by a file to which every delivered token is
written as it is delivered; it survives the kill, and it is what the ledger is compared with. Time runs a hundred times
faster than live: checkpoints are 10 ms apart instead of 1 s. The engine is a function of the request's id: the whole
platform with real engines, at fewer seeds, is ``python -m bench.exactness``.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from sqlalchemy import create_engine, make_url, text

from tests import postgres
from tests.money import NOVEMBER_MS, StillClock, price, usage
from tidegate.billing import service
from tidegate.billing.service import Billing
from tidegate.domain.errors import StoreFault
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.money.prices import PriceTable
from tidegate.money.rating import rate
from tidegate.stores.database import migrate, open_database
from tidegate.stores.journal import SegmentJournal
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.prices import SqlPriceBook

FAULTS = ("none", "gateway", "ingest", "engine", "all")
DATABASE_FAULTS = ("database", "everything")
VICTIMS = {
    "none": (), "gateway": ("gateway",), "ingest": ("ingest",), "engine": (), "all": ("gateway", "ingest"),
    "database": ("database",), "everything": ("gateway", "ingest", "database"),
}  # fmt: skip
DYING_ENGINES = ("engine", "all", "everything")
CHECKPOINT_MS = 10
TOKEN_MS_MAX = 2.0
STREAMS = 12
KILLS = 3
REPLAYS = 5
EVER = 10**14


@dataclass(frozen=True, slots=True)
class Request:
    """What one request will be, told by its id alone. `ends_at`: tokens after which its client or engine is gone."""

    id: str
    kind: str  # stream | unary | embedding | refused
    tokens: int
    outcome: Outcome
    ends_at: int

    @staticmethod
    def of(request_id: str, *, engine_deaths: bool) -> "Request":
        dice = Random(request_id)
        kind = dice.choices(("stream", "unary", "embedding", "refused"), (6, 2, 1, 1))[0]
        tokens = 0 if kind in ("embedding", "refused") else dice.randrange(1, 30)
        outcome, ends_at = Outcome.REFUSED if kind == "refused" else Outcome.COMPLETED, tokens
        if kind == "stream" and dice.random() < 0.3:
            outcome, ends_at = Outcome.CLIENT_ABORTED, dice.randrange(tokens + 1)
        elif kind in ("stream", "unary") and dice.random() < (0.3 if engine_deaths else 0.05):
            outcome, ends_at = Outcome.ENGINE_LOST, dice.randrange(tokens + 1) if kind == "stream" else 0
        return Request(request_id, kind, tokens, outcome, ends_at)

    def record(self, boot: str, outcome: Outcome, tokens: int) -> UsageRecord:
        dice = Random(self.id + "/record")
        return usage(
            self.id,
            gateway=boot,
            tenant=dice.choice(("acme", "birch")),
            mode=dice.choice(("serverless", "dedicated_serverless", "batch")),
            input_tokens=dice.randrange(1, 400),
            cached_tokens=0,
            output_tokens=tokens,
            outcome=outcome,
            arrived_ms=NOVEMBER_MS + dice.randrange(3 * 3_600_000),
        )


# --- the processes ------------------------------------------------------------------------------------------------


class Gateway:
    """The gateway's part of a record's life, with the real journal. Runs in a process of its own."""

    def __init__(self, folder: Path, boot: str, seed: int, *, engine_deaths: bool) -> None:
        self._boot, self._dice, self._engine_deaths = boot, Random(f"{seed}/{boot}"), engine_deaths
        self._truth = os.open(folder / "truth", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._journal = SegmentJournal(folder / "journal", boot)
        self._running: dict[str, tuple[Request, int]] = {}
        self._stop = asyncio.Event()
        self._replay = [line.split()[1] for line in (folder / "truth").read_text().splitlines() if line[0] == "F"]

    async def run(self) -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        for request_id in self._replay[-REPLAYS:]:  # what is told twice counts once
            request = Request.of(request_id, engine_deaths=self._engine_deaths)
            await self._journal.append(request.record(self._boot, request.outcome, request.ends_at))
        checkpoints = asyncio.create_task(self._checkpoint())
        await asyncio.gather(*(self._client(number) for number in range(STREAMS)))
        checkpoints.cancel()
        await asyncio.wait({checkpoints})
        self._journal.close()

    async def _client(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            request = Request.of(f"{self._boot}-{number}-{count}", engine_deaths=self._engine_deaths)
            self._say("S", request.id)
            await (self._stream(request) if request.kind == "stream" else self._unary(request))

    async def _stream(self, request: Request) -> None:
        for sent in range(1, request.ends_at + 1):
            await asyncio.sleep(self._dice.random() * TOKEN_MS_MAX / 1_000)
            self._running[request.id] = (request, sent)
            self._say("T", request.id, sent)
        await asyncio.sleep(self._dice.random() * TOKEN_MS_MAX / 1_000)
        self._running.pop(request.id, None)
        await self._journal.append(request.record(self._boot, request.outcome, request.ends_at))
        self._say("F", request.id, request.ends_at)

    async def _unary(self, request: Request) -> None:
        await asyncio.sleep(self._dice.random() * 10 * TOKEN_MS_MAX / 1_000)
        await self._journal.append(request.record(self._boot, request.outcome, request.ends_at))
        self._say("T", request.id, request.ends_at)
        self._say("F", request.id, request.ends_at)

    async def _checkpoint(self) -> None:
        while True:
            await asyncio.sleep(CHECKPOINT_MS / 1_000)
            records = [request.record(self._boot, Outcome.OPEN, sent) for request, sent in self._running.values()]
            await asyncio.gather(*(self._journal.append(record) for record in records))

    def _say(self, what: str, request_id: str, tokens: int = 0) -> None:
        """One write: either the client has the token or it has not, whenever the kill comes."""
        os.write(self._truth, f"{what} {request_id} {tokens} {time.monotonic() * 1_000:.3f}\n".encode())


def billing(folder: Path, url: str) -> Billing:
    engine = open_database(url)
    return Billing(
        reader=SegmentJournalReader(folder / "journal"),
        ledger=SqlLedger(engine),
        prices=SqlPriceBook(engine),
        clock=StillClock(),
        endpoint_facts=dict,
    )


def start(work: Callable[[], Any]) -> int:
    """`work` in a process of its own; its id. Forked before this process has any thread."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _end(work)
    return child


def _end(work: Callable[[], Any]) -> NoReturn:
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what a dying database makes it say
        work()
        status = 0
    finally:
        os._exit(status)


def kill(child: int, number: int = signal.SIGKILL) -> None:
    os.kill(child, number)
    os.waitpid(child, 0)


# --- one seed -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """Sums over seeds. `under`: delivered and not billed, of streams a gateway died under (`under_ms_max`: the longest
    such stretch before its death); `unseen`: billed answers whose last bytes never left. `wrong`: a finished request
    that is not billed as delivered; `over`: tokens nobody got. These, `twice` and `unbalanced` must be 0.
    """

    seeds: int = 0
    kills: int = 0
    requests: int = 0
    finished: int = 0
    delivered_tokens: int = 0
    billed_tokens: int = 0
    wrong: int = 0
    over: int = 0
    under: int = 0
    under_ms_max: float = 0.0
    unseen: int = 0
    twice: int = 0
    unbalanced: int = 0
    problems: list[str] = field(default_factory=list)


def run_seed(seed: int, fault: str, folder: Path, url: str, crash: Callable[[], None] | None, tally: Tally) -> None:
    dice = Random(f"{seed}/{fault}")
    boots = 0

    def gateway() -> int:
        nonlocal boots
        boots += 1
        boot = f"boot-{seed}-{boots}"
        deaths = fault in DYING_ENGINES
        return start(lambda: asyncio.run(_gateway(folder, boot, seed, deaths)))

    def ingest() -> int:
        return start(lambda: asyncio.run(billing(folder, url).run()))

    victims = VICTIMS[fault]
    starts = {"gateway": gateway, "ingest": ingest}
    running = {name: begin() for name, begin in starts.items()}
    try:
        time.sleep(0.03)
        for _ in range(KILLS):
            time.sleep(dice.random() * 0.06)
            if not victims:
                continue
            tally.kills += 1
            victim = dice.choice(victims)
            if victim == "database":
                assert crash is not None, "SQLite has no server to kill"
                crash()
            else:
                kill(running.pop(victim))
                running[victim] = starts[victim]()
        time.sleep(0.03)
        kill(running.pop("gateway"), signal.SIGTERM)
    finally:
        for child in running.values():
            kill(child)
    left = billing(folder, url)
    asyncio.run(_drain(left))
    judge(folder, left.ledger, tally, engine_deaths=fault in DYING_ENGINES)
    tally.seeds += 1


async def _gateway(folder: Path, boot: str, seed: int, engine_deaths: bool) -> None:
    await Gateway(folder, boot, seed, engine_deaths=engine_deaths).run()


async def _drain(left: Billing) -> None:
    """Until nothing more comes; a database that is just back may refuse a while."""
    for _ in range(100):
        try:
            while await left.drain():
                pass
            return
        except StoreFault:
            await asyncio.sleep(0.1)
    raise SystemExit("the database did not come back")


def judge(folder: Path, ledger: Any, tally: Tally, *, engine_deaths: bool) -> None:
    started: set[str] = set()
    delivered: dict[str, dict[int, float]] = {}
    finished: dict[str, int] = {}
    died_ms: dict[str, float] = {}  # boot -> its last sign of life
    for line in (folder / "truth").read_text().splitlines():
        what, request_id, count, at_ms = line.split()
        died_ms[request_id.rsplit("-", 2)[0]] = float(at_ms)
        match what:
            case "S":
                started.add(request_id)
            case "T":
                delivered.setdefault(request_id, {})[int(count)] = float(at_ms)
            case "F":
                finished[request_id] = int(count)
    rows = ledger.records_after(0, 10**9)
    refused = {request_id for request_id in started if Request.of(request_id, engine_deaths=False).kind == "refused"}
    billed = {row.record.id: row.record for row in rows}
    prices = PriceTable([price(effective_ms=0)])
    owed = 0
    for row in rows:
        expected = rate(row.record, prices.in_force("default", row.record.arrived_ms))
        amount = sum(entry.amount for entry in expected.entries[:1])
        owed += amount
        if row.nano_usd != amount:
            tally.problems.append(f"{row.record.id}: {row.nano_usd} instead of {amount} nano-USD")
    tally.twice += len(rows) - len(billed)
    for request_id in started - refused:
        request = Request.of(request_id, engine_deaths=engine_deaths)
        seen = max(delivered.get(request_id, {0: 0.0}))
        record = billed.get(request_id)
        tokens = record.output_tokens if record is not None else 0
        tally.delivered_tokens += seen
        tally.billed_tokens += tokens
        if request_id in finished:
            if record is None or tokens != finished[request_id] or record.outcome is not request.outcome:
                tally.wrong += 1
                tally.problems.append(f"{request_id}: delivered {finished[request_id]}, billed {record}")
        elif tokens > seen:
            tally.unseen += request.kind == "unary"
            tally.over += tokens - seen if request.kind != "unary" else 0
        elif tokens < seen:
            lost_ms = died_ms[request_id.rsplit("-", 2)[0]] - delivered[request_id][tokens + 1]
            tally.under += seen - tokens
            tally.under_ms_max = max(tally.under_ms_max, lost_ms)
    tally.requests += len(started)
    tally.finished += len(finished)
    balances = ledger.balances()
    tenants = sum(amount for name, amount in balances.items() if name.startswith("tenant/"))
    tally.unbalanced += (sum(balances.values()) != 0) + (tenants != owed)
    tally.unbalanced += ledger.sums(0, EVER, hourly=True) != ledger.fold(0, EVER)


# --- all of them --------------------------------------------------------------------------------------------------


def run(seeds: int = 40, first: int = 1, database: str = "sqlite", faults: tuple[str, ...] = FAULTS) -> dict[str, Any]:
    """A table: a row a fault."""
    service.POLL_MS = 3
    with ExitStack() as stack:
        new_url, crash = stack.enter_context(_sqlite() if database == "sqlite" else _postgresql())
        chosen = (*faults, *DATABASE_FAULTS) if crash is not None and faults == FAULTS else faults
        table = [_row(fault, seeds, first, new_url, crash) for fault in chosen]
    return {"database": database, "seeds_a_fault": seeds, "checkpoint_ms": CHECKPOINT_MS, "table": table}


def _row(
    fault: str, seeds: int, first: int, new_url: Callable[[Path], str], crash: Callable[[], None] | None
) -> dict[str, Any]:
    tally = Tally()
    for seed in range(first, first + seeds):
        with tempfile.TemporaryDirectory(prefix="tidegate-faults-") as folder:
            before = len(tally.problems)
            run_seed(seed, fault, Path(folder), new_url(Path(folder)), crash, tally)
            if len(tally.problems) > before:
                tally.problems[before:] = [f"seed {seed}: {found}" for found in tally.problems[before:]]
    found = {name: getattr(tally, name) for name in Tally.__slots__}
    found["under_ms_max"] = round(tally.under_ms_max, 1)
    found["problems"] = tally.problems[:5]
    return {"fault": fault, **found}


@contextmanager
def _sqlite() -> Iterator[tuple[Callable[[Path], str], None]]:
    with tempfile.TemporaryDirectory(prefix="tidegate-faults-") as folder:
        empty = Path(folder) / "empty.db"
        _prepare(f"sqlite:///{empty}")

        def new_url(at: Path) -> str:
            shutil.copy(empty, at / "ledger.db")
            return f"sqlite:///{at / 'ledger.db'}"

        yield new_url, None


@contextmanager
def _postgresql() -> Iterator[tuple[Callable[[Path], str], Callable[[], None]]]:
    pg_ctl = postgres.find_pg_ctl()
    if pg_ctl is None:
        raise SystemExit("PostgreSQL is not installed")
    with postgres.server(pg_ctl) as server:  # without fsync: what dies is the server, not the machine under it
        template = make_url(postgres.new_database(server))
        _prepare(template.render_as_string(hide_password=False))

        def new_url(_: Path) -> str:
            made = f"faults_{os.urandom(6).hex()}"
            admin = create_engine(template.set(database="postgres"), isolation_level="AUTOCOMMIT")
            with admin.connect() as connection:
                connection.execute(text(f"CREATE DATABASE {made} TEMPLATE {template.database}"))
            admin.dispose()
            return template.set(database=made).render_as_string(hide_password=False)

        yield new_url, server.crash


def _prepare(url: str) -> None:
    engine = open_database(url)
    migrate(engine)
    SqlPriceBook(engine).add(replace(price(effective_ms=0), id=0))
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40, help="a fault")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS))
    options = parser.parse_args()
    found = run(options.seeds, options.first, options.database, tuple(options.faults))
    print(json.dumps(found, indent=2))
    sys.exit(any(row["wrong"] or row["over"] or row["twice"] or row["unbalanced"] for row in found["table"]))
