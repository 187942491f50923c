"""How fast money is: journal to rated entry, beside what the database alone could do and beside the peers' way.

Run: ``python -m bench.ledger``; kept figures are in bench/results/ledger.md. Figures are of one
run on one machine; only their ratios mean anything elsewhere.

* ledger: usage records from a journal on disk to rated, deduplicated, balanced entries with rollups and cursor.
* insert: the very rows the ledger wrote (records and entries), made beforehand, by the driver's ``executemany`` alone,
in transactions of the same size into the same tables of another database.
* bulk: the same rows in the way the ledger itself writes them (COPY on PostgreSQL, as insert on SQLite), nothing else.
* counter: one UPDATE of a spend counter and one commit a request, as gateways that keep a running total do.
* stream_end: what the journal adds to the end of a stream and to its first token, at the gateway's own port.
* rollups: the sums of a day from rollups and from the raw records, equal.
* append: what the journal adds to the end of a stream at 100 requests/s, beside a bare write and fdatasync of the same
  bytes at the same pace.
* invoice: a tenant's month from the rollups of 100 million requests.

PostgreSQL (with fsync) is measured where it is installed.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import uvloop
from sqlalchemy import Connection, Engine, Table, select

from bench import main
from tests import postgres
from tests.money import HOUR_MS, NOVEMBER_MS, StillClock, price, usage
from tidegate.assemble import collector
from tidegate.billing import ingest
from tidegate.billing.periods import Period
from tidegate.billing.service import Billing
from tidegate.domain.usage import UsageRecord
from tidegate.stores.bulk import Row, insert_rows, insert_sql
from tidegate.stores.database import migrate, open_database, write
from tidegate.stores.journal import SegmentJournal
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.ledger_tables import entries, usage_records, usage_rollups
from tidegate.stores.prices import SqlPriceBook

RECORDS = 40_000
ROUNDS = 3
PAGE = ingest.PAGE_RECORDS_MAX
COUNTER_UPDATES = 1_500
APPENDS_A_SECOND = 100
APPENDS = 1_000
STREAMS = 1_200


def run() -> dict[str, Any]:
    """Medians of `ROUNDS` interleaved rounds a database; records/s, ms, s."""
    collector.tune()  # as the platform does
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        directory = Path(folder)
        figures: dict[str, Any] = {
            "records": RECORDS,
            "rounds": ROUNDS,
            "cpus": len(os.sched_getaffinity(0)),
            "load_average_at_start": round(os.getloadavg()[0], 1),
        }
        figures["sqlite"] = _database(_sqlite(directory), directory)
        pg_ctl = postgres.find_pg_ctl()
        if pg_ctl is not None:
            with postgres.server(pg_ctl, fsync=True) as server:
                figures["postgresql"] = _database(lambda: postgres.new_database(server), directory)
        figures["append"] = asyncio.run(_append(directory))
        (directory / "gateway").mkdir()
        figures["stream_end"] = _with_uvloop(_stream_end(directory / "gateway"))
        figures["rollups"] = _rollups(directory)
        figures["invoice"] = _invoice(directory)
    return figures


def _sqlite(directory: Path) -> Callable[[], str]:
    return lambda: f"sqlite:///{directory / os.urandom(6).hex()}.db"


def _database(new_url: Callable[[], str], directory: Path) -> dict[str, Any]:
    rounds = [_round(new_url, directory, seed) for seed in range(ROUNDS)]
    figures: dict[str, Any] = {
        f"{name}_{unit}": _median([getattr(found[name], unit) for found in rounds])
        for name in rounds[0]
        for unit in ("records_per_s", "cpu_us_per_record")
    }
    figures["ratios"] = {
        "ledger_to_insert": _median([r["ledger"].records_per_s / r["insert"].records_per_s for r in rounds]),
        "ledger_to_insert_target": 0.5,
        "ledger_to_insert_by_cpu": _median(
            [r["insert"].cpu_us_per_record / r["ledger"].cpu_us_per_record for r in rounds]
        ),
        "ledger_to_bulk": _median([r["ledger"].records_per_s / r["bulk"].records_per_s for r in rounds]),
        "ledger_to_counter": _median([r["ledger"].records_per_s / r["counter"].records_per_s for r in rounds]),
    }
    return figures


@dataclass(frozen=True, slots=True)
class Pace:
    """By the clock on the wall, and by the time this process computed (a database server's own is not in it)."""

    records_per_s: float
    cpu_us_per_record: float


def _pace(records: int, work: Callable[[], object]) -> Pace:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Pace(records / (time.perf_counter() - wall), (time.process_time() - cpu) / records * 1e6)


def _median(values: list[float]) -> float:
    found = statistics.median(values)
    return round(found, 3) if found < 100 else round(found)


def _round(new_url: Callable[[], str], directory: Path, seed: int) -> dict[str, Pace]:
    journals = directory / f"journal-{os.urandom(4).hex()}"
    asyncio.run(_fill(journals, seed))
    opened = (_opened(new_url()) for _ in range(4))
    with next(opened) as engine, next(opened) as plain, next(opened) as bulked, next(opened) as counters:
        ledger = _pace(RECORDS, lambda: asyncio.run(_ingest(journals, engine)))
        with engine.connect() as connection:
            rows: dict[Table, list[Row]] = {
                t: [tuple(row) for row in connection.execute(select(t))] for t in (usage_records, entries)
            }
        assert len(rows[usage_records]) == RECORDS
        insert = _pace(RECORDS, lambda: _insert(plain, rows, _plain_insert))
        bulk = _pace(RECORDS, lambda: _insert(bulked, rows, insert_rows))
        counter = _pace(COUNTER_UPDATES, lambda: _count(counters))
        return {"ledger": ledger, "insert": insert, "bulk": bulk, "counter": counter}


@contextmanager
def _opened(url: str) -> Iterator[Engine]:
    engine = open_database(url)
    migrate(engine)
    yield engine
    engine.dispose()


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


async def _fill(journals: Path, seed: int) -> None:
    """The journal of a day of mixed traffic in the order it happens: 8 tenants, 40 endpoints, ids as a gateway makes
    them.
    """
    dice = Random(seed)
    arrivals = iter(sorted(NOVEMBER_MS + dice.randrange(24 * HOUR_MS) for _ in range(RECORDS)))
    journal = SegmentJournal(journals, "boot-1")
    for _ in range(RECORDS // PAGE):
        await asyncio.gather(*(journal.append(_record(dice, next(arrivals))) for _ in range(PAGE)))
    journal.close()


def _record(dice: Random, arrived_ms: int) -> UsageRecord:
    tenant = f"tenant-{dice.randrange(8)}"
    return usage(
        f"req-{dice.getrandbits(128):032x}",
        tenant=tenant,
        key=f"key-{tenant}",
        endpoint=f"{tenant}/endpoint-{dice.randrange(5)}",
        replica=f"{tenant}-{dice.getrandbits(32):08x}",
        mode=dice.choice(["serverless", "dedicated_serverless", "batch"]),
        input_tokens=100 + dice.randrange(2_000),
        cached_tokens=dice.choice([0, 0, 96]),
        output_tokens=dice.randrange(600),
        arrived_ms=arrived_ms,
    )


async def _ingest(journals: Path, engine: Engine) -> None:
    prices = SqlPriceBook(engine)
    prices.add(price())
    billing = Billing(
        reader=SegmentJournalReader(journals),
        ledger=SqlLedger(engine),
        prices=prices,
        clock=StillClock(),
        endpoint_facts=lambda: None,
    )
    assert await billing.drain() == RECORDS


def _insert(engine: Engine, rows: dict[Table, list[Row]], into: Callable[[Connection, Table, list[Row]], None]) -> None:
    pages = RECORDS // PAGE
    for number in range(pages):
        with write(engine) as connection:
            for table, found in rows.items():
                size = -(-len(found) // pages)
                into(connection, table, found[number * size : (number + 1) * size])


def _plain_insert(connection: Connection, table: Table, rows: list[Row]) -> None:
    connection.exec_driver_sql(insert_sql(table, connection.dialect), rows)


def _count(engine: Engine) -> None:
    with write(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE spend (tenant BIGINT PRIMARY KEY, nano_usd BIGINT NOT NULL)")
        connection.exec_driver_sql("INSERT INTO spend VALUES (0,0),(1,0),(2,0),(3,0),(4,0),(5,0),(6,0),(7,0)")
    for number in range(COUNTER_UPDATES):
        with write(engine) as connection:
            connection.exec_driver_sql(f"UPDATE spend SET nano_usd = nano_usd + 4000 WHERE tenant = {number % 8}")


# --- the journal --------------------------------------------------------------------------------------------------


async def _append(directory: Path) -> dict[str, Any]:
    """Added latency of an append, and of a bare write and fdatasync, taken in turns."""
    journal = SegmentJournal(directory / "appends", "boot-1")
    record = replace(usage("r"), model="a-model-with-a-name-of-usual-length@1")
    bare_fd = os.open(directory / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    data = b"x" * 560
    loop = asyncio.get_running_loop()
    appended, bare = [], []

    def write_bare() -> None:
        os.write(bare_fd, data)
        os.fdatasync(bare_fd)

    for number in range(APPENDS):
        begin = time.perf_counter()
        await journal.append(replace(record, id=f"req-{number}"))
        middle = time.perf_counter()
        await loop.run_in_executor(None, write_bare)
        end = time.perf_counter()
        appended.append((middle - begin) * 1000)
        bare.append((end - middle) * 1000)
        await asyncio.sleep(max(0, 1 / APPENDS_A_SECOND - (end - begin)))
    journal.close()
    os.close(bare_fd)
    return {
        **{f"journal_ms_{name}": value for name, value in _quantiles(appended).items()},
        **{f"bare_fdatasync_ms_{name}": value for name, value in _quantiles(bare).items()},
        "target_ms_p99": 5.0,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": round(ordered[len(ordered) * q // 100], 3) for q in (50, 95, 99)}


async def _stream_end(directory: Path) -> dict[str, Any]:
    """What a client of the gateway sees with the journal and without it, streams in turns at 100 a second: time to the
    first token, and from the last token to the end of the stream (which waits for the record to be on disk).
    """
    from tests.gateway import rig

    seen: dict[str, list[tuple[float, float]]] = {"journal": [], "none": []}
    async with rig.rig(directory) as gateway:
        await gateway.control.route(gateway.target(slots=64))
        journal = SegmentJournal(directory / "journal", "boot-1")
        nothing = gateway.journal.append

        async def append(record: UsageRecord) -> None:
            await (journal.append(record) if record.endpoint in with_journal else nothing(record))

        with_journal: set[str] = set()
        gateway.journal.append = append  # type: ignore[method-assign]
        for number in range(STREAMS):
            name = "journal" if number % 2 else "none"
            (with_journal.add if name == "journal" else with_journal.discard)("acme/chat")
            began = time.perf_counter()
            seen[name].append(await _one_stream(gateway))
            await asyncio.sleep(max(0, 1 / APPENDS_A_SECOND - (time.perf_counter() - began)))
        journal.close()
    figures: dict[str, Any] = {"streams": STREAMS}
    for name, pairs in seen.items():
        figures |= {f"{name}_ttft_ms_{q}": value for q, value in _quantiles([first for first, _ in pairs]).items()}
        figures |= {f"{name}_end_ms_{q}": value for q, value in _quantiles([end for _, end in pairs]).items()}
    figures["added_end_ms_p99"] = round(figures["journal_end_ms_p99"] - figures["none_end_ms_p99"], 3)
    figures["added_ttft_ms_p50"] = round(figures["journal_ttft_ms_p50"] - figures["none_ttft_ms_p50"], 3)
    return figures | {"target_added_end_ms_p99": 5.0}


async def _one_stream(gateway: Any) -> tuple[float, float]:
    """Milliseconds to the first token, and from the last token to the end."""
    from tests.gateway import rig

    client = await gateway.client()
    began = time.perf_counter()
    await client.post("/v1/chat/completions", rig.chat(stream=True, max_tokens=3, pause=0.001))
    await client.head()
    instants = [began]
    while data := await client.chunk():
        if b"[DONE]" not in data:
            instants.append(time.perf_counter())
    end = time.perf_counter()
    client.hang_up()
    return (instants[1] - began) * 1_000, (end - instants[-1]) * 1_000


# --- invoices -----------------------------------------------------------------------------------------------------


def _rollups(directory: Path) -> dict[str, Any]:
    """The same sums of one tenant's day from rollups and from every record and entry; they are equal, or this fails."""
    journals = directory / "journal-rollups"
    asyncio.run(_fill(journals, 9))
    with _opened(_sqlite(directory)()) as engine:
        asyncio.run(_ingest(journals, engine))
        ledger, day = SqlLedger(engine), (NOVEMBER_MS, NOVEMBER_MS + 24 * HOUR_MS)
        kept: list[Any] = []
        rollups_s = _timed(lambda: kept.append(ledger.sums(*day, hourly=True)))
        fold_s = _timed(lambda: kept.append(ledger.fold(*day)))
        assert kept[0] == kept[1], "rollups differ from the records they sum"
        rows = len(kept[0])
    return {
        "records": RECORDS,
        "rollup_rows": rows,
        "rollups_s": round(rollups_s, 3),
        "fold_s": round(fold_s, 3),
        "fold_s_of_100_million_extrapolated": round(fold_s * 100_000_000 / RECORDS),
    }


def _with_uvloop(main: Any) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the loop a gateway has in production
        return runner.run(main)


def _invoice(directory: Path) -> dict[str, Any]:
    """A month of 100 million requests: 720 hours × 300 combinations of endpoint, key and mode."""
    hours, combinations = 720, 300
    with _opened(_sqlite(directory)()) as engine:
        requests = 100_000_000 // (hours * combinations)
        tokens = (requests * 800, 0, requests * 200)
        measured = (requests, requests, 0, *tokens, *tokens, requests * 800 * 200, 0, requests * 200 * 800, 0, 0, 0)
        with write(engine) as connection:
            rows = [
                (
                    NOVEMBER_MS + hour * HOUR_MS,
                    f"tenant-{n % 30}",
                    f"key-{n}",
                    f"e-{n}",
                    "m",
                    "serverless",
                    1,
                    *measured,
                )
                for hour in range(hours)
                for n in range(combinations)
            ]
            connection.exec_driver_sql(insert_sql(usage_rollups, connection.dialect), rows)
        prices = SqlPriceBook(engine)
        prices.add(price())
        billing = Billing(
            reader=SegmentJournalReader(directory / "none"),
            ledger=SqlLedger(engine),
            prices=prices,
            clock=StillClock(),
            endpoint_facts=lambda: None,
        )
        month = Period(NOVEMBER_MS, NOVEMBER_MS + hours * HOUR_MS)
        one_s = _timed(lambda: billing.statements.invoice("tenant-1", month, month.end_ms))
        all_s = _timed(lambda: billing.statements.invoices(month, month.end_ms))
    return {"rollup_rows": hours * combinations, "one_tenant_s": round(one_s, 3), "all_tenants_s": round(all_s, 3)}


if __name__ == "__main__":
    main(run)
