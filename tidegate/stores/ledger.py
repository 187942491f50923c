"""The ledger in SQL (the `Ledger` port): usage records, double entries, cursors, and the sums kept along with them.

A page of a journal is posted in one transaction: records, entries, rollups, balances, checkpoints and the cursor, or
nothing. So a crash anywhere leaves the ledger as it was, the page is read again, and every record counts once: the
cursor says so, and the unique id says so again. Nothing but rollups, balances and cursors is ever updated.

Synchronous: services call it through ``asyncio.to_thread``. Every failure of the database leaves as a StoreFault.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec
from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from tidegate.domain.contract import Drawn
from tidegate.domain.errors import Refusal, StoreFault
from tidegate.domain.ledger import (
    NO_PRICE,
    REVENUE_DRAWDOWN,
    Charged,
    EndpointFacts,
    Entry,
    ExportRow,
    FactsSpan,
    OverflowSum,
    Posted,
    RatedTime,
    RatedUsage,
    StateSum,
    TimeCell,
    TimePage,
    TimeSum,
    UsageKey,
    UsageSum,
)
from tidegate.domain.limits import Spending
from tidegate.domain.money_ports import LedgerPage
from tidegate.domain.ports import Cursor
from tidegate.domain.units import MS_PER_HOUR
from tidegate.domain.usage import UsageRecord
from tidegate.stores import ledger_reads, ledger_rows
from tidegate.stores.bulk import add_rows, insert_rows, marks
from tidegate.stores.contract_tables import contracts
from tidegate.stores.database import read, write
from tidegate.stores.faults import sql_faults
from tidegate.stores.ledger_tables import (
    accelerator_states,
    accelerator_time,
    balances,
    cursors,
    deliveries,
    endpoint_facts,
    entries,
    ledger_state,
    open_records,
    retention,
    time_marks,
    usage_records,
    usage_rollups,
)

IDS_A_QUERY_MAX = 1_000

_decode_record = msgspec.json.Decoder(UsageRecord).decode


class SqlLedger:
    """Implements `ports.Ledger`. Several may exist on one database; their writes take turns."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # --- posting --------------------------------------------------------------------------------------------------

    def cursor(self, boot: str) -> Cursor:
        with sql_faults("the ledger's cursor cannot be read"), read(self._engine) as connection:
            return _cursor(connection, boot)

    def post(self, page: LedgerPage) -> Posted:
        """A record that is known already is rare: a page is posted as if none were, and looked through only when the
        unique id says no.
        """
        with sql_faults("the ledger cannot be written"):
            try:
                return self._post(page, look=False)
            except IntegrityError:
                return self._post(page, look=True)

    def _post(self, page: LedgerPage, *, look: bool) -> Posted:
        ids = {rated.record.id for rated in page.final}
        assert len(ids) == len(page.final), "an id occurs once in a page"
        with write(self._engine) as connection:
            number = _lock_numbers(connection)
            if _cursor(connection, page.start.boot) != page.start:
                raise StoreFault("another process posts the same journal")
            known = _known_ids(connection, {record.id for record in page.open} | (ids if look else set()))
            fresh = [rated for rated in page.final if rated.record.id not in known]
            if page.drawn:
                _draw(connection, page, fresh)
            _insert_usage(connection, fresh, number)
            _keep_checkpoints(connection, [r for r in page.open if r.id not in known], ids)
            _set_numbers(connection, number + len(fresh))
            _move_cursor(connection, page)
        unrated = sum(rated.price_version == NO_PRICE and rated.record.billable for rated in fresh)
        return Posted(len(fresh), len(page.final) - len(fresh), unrated)

    def known(self, ids: Collection[str]) -> Collection[str]:
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            return _known_ids(connection, ids)

    def open_records(self, boot: str) -> Sequence[UsageRecord]:
        query = select(open_records.c.document).where(open_records.c.boot == boot).order_by(open_records.c.id)
        with sql_faults("checkpoints cannot be read"), read(self._engine) as connection:
            return [_decode_record(document) for document in connection.execute(query).scalars()]

    def post_time(self, times: Sequence[RatedTime]) -> int:
        with sql_faults("accelerator time cannot be written"), write(self._engine) as connection:
            number = _lock_numbers(connection)
            hours = {time.hour_ms for time in times}
            query = select(accelerator_time.c.endpoint, accelerator_time.c.hour_ms)
            known = set(map(tuple, connection.execute(query.where(accelerator_time.c.hour_ms.in_(hours)))))
            fresh = [time for time in times if (time.endpoint, time.hour_ms) not in known]
            rows = [ledger_rows.time_row(time, number + index) for index, time in enumerate(fresh)]
            insert_rows(connection, accelerator_time, rows)
            _insert_entries(connection, [time.entries for time in fresh], number)
            _set_numbers(connection, number + len(fresh))
        return len(fresh)

    def time_marks(self) -> Mapping[str, int]:
        with sql_faults("accelerator time cannot be read"), read(self._engine) as connection:
            return {row.node: row.until_ms for row in connection.execute(select(time_marks))}

    def add_time(self, page: TimePage) -> None:
        with sql_faults("accelerator time cannot be written"), write(self._engine) as connection:
            _lock_numbers(connection)
            of_node = time_marks.c.node == page.node
            until_ms = connection.execute(select(time_marks.c.until_ms).where(of_node)).scalar_one_or_none()
            if until_ms is not None and until_ms >= page.until_ms:
                return
            if until_ms is not None and until_ms > page.start_ms:
                raise StoreFault(f"another process adds the time of node {page.node!r}")
            add_rows(connection, accelerator_states, [(*cell[:6], cell.state.value, *cell[7:]) for cell in page.cells])
            connection.execute(delete(time_marks).where(of_node))
            connection.execute(insert(time_marks), {"node": page.node, "until_ms": page.until_ms})

    def state_sums(self, start_ms: int, end_ms: int) -> Sequence[StateSum]:
        with sql_faults("accelerator time cannot be read"), read(self._engine) as connection:
            return ledger_reads.state_sums(connection, start_ms, end_ms)

    def accelerator_sums(self, start_ms: int, end_ms: int) -> Sequence[TimeCell]:
        with sql_faults("accelerator time cannot be read"), read(self._engine) as connection:
            return ledger_reads.accelerator_sums(connection, start_ms, end_ms)

    # --- endpoints ------------------------------------------------------------------------------------------------

    def observe(self, now_ms: int, facts: Mapping[str, EndpointFacts]) -> None:
        """An endpoint seen for the first time counts from its creation, every later change from `now_ms`."""
        with sql_faults("endpoint facts cannot be written"), write(self._engine) as connection:
            latest = {span.endpoint: span for span in ledger_reads.spans(connection)}
            changed = [
                FactsSpan(endpoint, min(found.created_ms, now_ms), found)
                if endpoint not in latest
                else FactsSpan(endpoint, max(latest[endpoint].start_ms, now_ms), found)
                for endpoint, found in facts.items()
                if endpoint not in latest or latest[endpoint].facts != found
            ]
            changed += [
                FactsSpan(endpoint, max(span.start_ms, now_ms), None)
                for endpoint, span in latest.items()
                if span.facts is not None and endpoint not in facts
            ]
            for span in changed:
                same = (endpoint_facts.c.endpoint == span.endpoint) & (endpoint_facts.c.start_ms == span.start_ms)
                connection.execute(delete(endpoint_facts).where(same))
            insert_rows(connection, endpoint_facts, [ledger_rows.span_row(span) for span in changed])

    def spans(self) -> Sequence[FactsSpan]:
        with sql_faults("endpoint facts cannot be read"), read(self._engine) as connection:
            return ledger_reads.spans(connection)

    # --- retention ------------------------------------------------------------------------------------------------

    def purge(self, before_ms: int, delivered: int | None, rows_max: int) -> int:
        t = usage_records.c
        old = select(t.transaction_id).where(t.arrived_ms < before_ms)
        if delivered is not None:
            old = old.where(t.transaction_id <= delivered)
        with sql_faults("old usage records cannot be removed"), write(self._engine) as connection:
            some = connection.execute(old.order_by(t.arrived_ms).limit(rows_max)).scalars().all()
            if some:
                reached = retention.c.records_from_ms < before_ms
                connection.execute(update(retention).where(reached).values(records_from_ms=before_ms))
            for at in range(0, len(some), IDS_A_QUERY_MAX):
                connection.execute(delete(usage_records).where(t.transaction_id.in_(some[at : at + IDS_A_QUERY_MAX])))
        return len(some)

    def records_from_ms(self) -> int:
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            return _records_from_ms(connection)

    # --- sums -----------------------------------------------------------------------------------------------------

    def sums(
        self, start_ms: int, end_ms: int, tenant: str | None = None, *, hourly: bool = False
    ) -> Sequence[tuple[UsageKey, UsageSum]]:
        """Whole hours come from the rollups, the ragged ends of the period from the records themselves."""
        first_ms = -(-start_ms // MS_PER_HOUR) * MS_PER_HOUR
        last_ms = end_ms // MS_PER_HOUR * MS_PER_HOUR
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            gone_ms = _records_from_ms(connection)
            if (start_ms < min(first_ms, gone_ms)) or (last_ms < min(end_ms, gone_ms)):
                raise Refusal("invalid_request", "the records of this period are gone: give whole hours", param="from")
            if first_ms >= last_ms:
                cells = ledger_reads.fold(connection, start_ms, end_ms, tenant)
            else:
                cells = ledger_reads.rollups(connection, first_ms, last_ms, tenant, hourly=hourly)
                cells += ledger_reads.fold(connection, start_ms, first_ms, tenant)
                cells += ledger_reads.fold(connection, last_ms, end_ms, tenant)
        return ledger_rows.merge(cells, None if hourly else start_ms)

    def fold(self, start_ms: int, end_ms: int) -> Sequence[tuple[UsageKey, UsageSum]]:
        """The same hourly sums without rollups, from every record and entry: for proving the rollups right."""
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            return ledger_rows.merge(ledger_reads.fold(connection, start_ms, end_ms, None), None)

    def time_sums(self, start_ms: int, end_ms: int, tenant: str | None = None) -> Sequence[TimeSum]:
        with sql_faults("accelerator time cannot be read"), read(self._engine) as connection:
            return ledger_reads.time_sums(connection, start_ms, end_ms, tenant)

    def overflow_sums(self, start_ms: int, end_ms: int, tenant: str | None = None) -> Sequence[OverflowSum]:
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            return ledger_reads.overflow_sums(connection, start_ms, end_ms, tenant)

    def time_posted_until(self) -> int:
        with sql_faults("accelerator time cannot be read"), read(self._engine) as connection:
            return ledger_reads.time_posted_until(connection)

    def spent(self, of: Spending, end_ms: int, boots: Collection[str]) -> Mapping[str, int]:
        with sql_faults("what was spent cannot be read"), read(self._engine) as connection:
            own = ledger_reads.spent_by(connection, of, max(of.start_ms, of.since_ms), end_ms, boots)
            whole = ledger_reads.spent(connection, of, end_ms)
        return {**own, "": whole - sum(own.values())}

    def balances(self) -> Mapping[str, int]:
        with sql_faults("balances cannot be read"), read(self._engine) as connection:
            return ledger_reads.balances(connection)

    def export(
        self, start_ms: int, end_ms: int, tenant: str | None, after: tuple[int, int], rows_max: int
    ) -> Sequence[ExportRow]:
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            return ledger_reads.export(connection, start_ms, end_ms, tenant, after, rows_max)

    def records(
        self, start_ms: int, end_ms: int, tenant: str | None, after: tuple[int, int], rows_max: int
    ) -> Sequence[Charged]:
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            return ledger_reads.records(connection, start_ms, end_ms, tenant, after, rows_max)

    def entries(self, numbers: Collection[int]) -> Mapping[int, tuple[Entry, ...]]:
        with sql_faults("entries cannot be read"), read(self._engine) as connection:
            return ledger_reads.entries_of(connection, numbers)

    def records_after(self, number: int, rows_max: int) -> Sequence[Charged]:
        with sql_faults("usage cannot be read"), read(self._engine) as connection:
            return ledger_reads.records_after(connection, number, rows_max)

    def delivered(self, sink: str) -> int:
        with sql_faults("deliveries cannot be read"), read(self._engine) as connection:
            return ledger_reads.delivered(connection, sink)

    def set_delivered(self, sink: str, number: int) -> None:
        with sql_faults("deliveries cannot be written"), write(self._engine) as connection:
            connection.execute(delete(deliveries).where(deliveries.c.sink == sink))
            connection.execute(insert(deliveries), {"sink": sink, "delivered": number})


def _records_from_ms(connection: Connection) -> int:
    return connection.execute(select(retention.c.records_from_ms)).scalar_one_or_none() or 0


def _cursor(connection: Connection, boot: str) -> Cursor:
    query = select(cursors.c.segment, cursors.c.offset).where(cursors.c.boot == boot)
    row = connection.execute(query).one_or_none()
    return Cursor(boot, row.segment, row.offset) if row else Cursor(boot, 1, 0)


def _move_cursor(connection: Connection, page: LedgerPage) -> None:
    if page.next == page.start:
        return
    boot, segment, offset = page.next.boot, page.next.segment, page.next.offset
    moved = connection.execute(update(cursors).where(cursors.c.boot == boot).values(segment=segment, offset=offset))
    if moved.rowcount == 0:
        connection.execute(insert(cursors), {"boot": boot, "segment": segment, "offset": offset})


def _draw(connection: Connection, page: LedgerPage, fresh: Sequence[RatedUsage]) -> None:
    """What the page takes from commitments, which must be as they were when it was rated."""
    if len(fresh) != len(page.final) and any(
        entry.account == REVENUE_DRAWDOWN for rated in set(page.final) - set(fresh) for entry in rated.entries
    ):
        raise StoreFault("another process posts the same usage")
    for contract, (before, after) in page.drawn.items():
        move_drawn(connection, contract, before, after)


def move_drawn(connection: Connection, contract: str, before: Drawn, after: Drawn) -> None:
    """Compare and set. StoreFault when the contract is not as it was."""
    c = contracts.c
    same = (c.id == contract, c.used_tokens == before.used, c.rolled_tokens == before.rolled)
    values = {"used_tokens": after.used, "rolled_tokens": after.rolled, "lapsed_tokens": after.lapsed}
    moved = connection.execute(update(contracts).where(*same, c.lapsed_tokens == before.lapsed).values(values))
    if moved.rowcount != 1:
        raise StoreFault(f"another process draws from contract {contract!r}")


def post_transactions(connection: Connection, transactions: Sequence[tuple[Entry, ...]]) -> int:
    """Posts entries within the caller's transaction; the number of the first."""
    number = _lock_numbers(connection)
    _insert_entries(connection, transactions, number)
    _set_numbers(connection, number + len(transactions))
    return number


def _lock_numbers(connection: Connection) -> int:
    """The next transaction number; holds its row until the commit, so that two writers cannot take the same one."""
    query = select(ledger_state.c.next_transaction).where(ledger_state.c.id == 1).with_for_update()
    number: int = connection.execute(query).scalar_one()
    return number


def _set_numbers(connection: Connection, following: int) -> None:
    connection.execute(update(ledger_state).where(ledger_state.c.id == 1).values(next_transaction=following))


def _known_ids(connection: Connection, ids: Iterable[str]) -> set[str]:
    known: set[str] = set()
    ordered = sorted(ids)
    for at in range(0, len(ordered), IDS_A_QUERY_MAX):
        some = ordered[at : at + IDS_A_QUERY_MAX]
        query = f"SELECT id FROM usage_records WHERE id IN ({marks(connection.dialect, len(some))})"
        known.update(connection.exec_driver_sql(query, tuple(some)).scalars())
    return known


def _insert_usage(connection: Connection, fresh: Sequence[RatedUsage], number: int) -> None:
    rows = [ledger_rows.usage_row(rated, number + index) for index, rated in enumerate(fresh)]
    insert_rows(connection, usage_records, rows)
    _insert_entries(connection, [rated.entries for rated in fresh], number)
    add_rows(connection, usage_rollups, ledger_rows.rollup_rows(fresh))


def _insert_entries(connection: Connection, transactions: Sequence[tuple[Entry, ...]], number: int) -> None:
    """Entries of consecutively numbered transactions, and their sums on the balances."""
    rows, sums = ledger_rows.entry_rows(transactions, number)
    insert_rows(connection, entries, rows)
    add_rows(connection, balances, sorted(sums.items()))


def _keep_checkpoints(connection: Connection, open_now: Sequence[UsageRecord], ended: set[str]) -> None:
    """Replaces the checkpoints of streams still running; drops those of requests that have ended."""
    kept = set(connection.execute(select(open_records.c.id)).scalars())  # as many as streams run: few
    gone = sorted(kept & (ended | {record.id for record in open_now}))
    for at in range(0, len(gone), IDS_A_QUERY_MAX):
        connection.execute(delete(open_records).where(open_records.c.id.in_(gone[at : at + IDS_A_QUERY_MAX])))
    insert_rows(connection, open_records, [ledger_rows.checkpoint_row(record) for record in open_now])
