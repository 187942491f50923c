"""Contracts, adjustments and alerts in SQL (the `Contracts` port), in the ledger's database and by its rules.

Synchronous: services call it through ``asyncio.to_thread``. Every failure of the database leaves as a StoreFault.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from tidegate.domain.contract import Alert, Contract, Drawn, Rerate
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import Adjustment, Entry
from tidegate.money.rerate import undone
from tidegate.stores.contract_tables import adjustments, contract_alerts, contracts, rerates
from tidegate.stores.database import read, write
from tidegate.stores.faults import sql_faults
from tidegate.stores.ledger import move_drawn, post_transactions
from tidegate.stores.ledger_tables import entries

_decode = msgspec.json.Decoder(Contract).decode


class SqlContracts:
    """Implements `ports.Contracts`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, contract: Contract, purchase: Adjustment) -> None:
        with sql_faults("contracts cannot be written"), write(self._engine) as connection:
            known = connection.execute(select(contracts.c.document).where(contracts.c.id == contract.id)).scalar()
            if known is not None:
                if _decode(known) != contract:
                    raise Refusal("conflict", f"there is another contract {contract.id!r}", param="id")
                return
            document = msgspec.json.encode(contract).decode()
            row = {"id": contract.id, "tenant": contract.tenant, "document": document}
            none = {"used_tokens": 0, "rolled_tokens": 0, "lapsed_tokens": 0}
            connection.execute(insert(contracts), row | none)
            _post(connection, [purchase])

    def all(self) -> Sequence[tuple[Contract, Drawn]]:
        query = select(contracts).order_by(contracts.c.tenant, contracts.c.id)
        with sql_faults("contracts cannot be read"), read(self._engine) as connection:
            return [
                (_decode(row.document), Drawn(row.used_tokens, row.rolled_tokens, row.lapsed_tokens))
                for row in connection.execute(query)
            ]

    def lapse(self, contract: str, before: Drawn, after: Drawn, lapse: Adjustment) -> None:
        with sql_faults("contracts cannot be written"), write(self._engine) as connection:
            move_drawn(connection, contract, before, after)
            _post(connection, [lapse])

    def adjust(self, wanted: Sequence[Adjustment]) -> int:
        with sql_faults("adjustments cannot be written"), write(self._engine) as connection:
            return _post(connection, wanted)

    def adjustments(self, start_ms: int, end_ms: int, tenant: str | None = None) -> Sequence[Adjustment]:
        query = select(adjustments).where(adjustments.c.at_ms >= start_ms, adjustments.c.at_ms < end_ms)
        if tenant is not None:
            query = query.where(adjustments.c.tenant == tenant)
        with sql_faults("adjustments cannot be read"), read(self._engine) as connection:
            rows = connection.execute(query.order_by(adjustments.c.at_ms, adjustments.c.transaction_id)).mappings()
            return [_adjustment(connection, row) for row in rows.all()]

    def rerate(self, rerate: Rerate, made: Sequence[Adjustment]) -> None:
        with sql_faults("a re-rating cannot be written"), write(self._engine) as connection:
            for other in _rerates(connection):
                if other.id == rerate.id:
                    raise Refusal("conflict", f"there is a re-rating {rerate.id!r} already", param="id")
                if other.reversed_ms is None and rerate.start_ms < other.end_ms and other.start_ms < rerate.end_ms:
                    message = f"a part of that period was rated again as {other.id!r}: undo that first"
                    raise Refusal("conflict", message, param="from")
            connection.execute(insert(rerates), {name: getattr(rerate, name) for name in Rerate.__slots__})
            _post(connection, made)

    def undo_rerate(self, rerate: str, now_ms: int) -> Rerate:
        with sql_faults("a re-rating cannot be written"), write(self._engine) as connection:
            found = next((r for r in _rerates(connection) if r.id == rerate), None)
            if found is None:
                raise Refusal("not_found", f"there is no re-rating {rerate[:64]!r}")
            if found.reversed_ms is not None:
                return found
            query = select(adjustments).where(adjustments.c.reference == rerate).order_by(adjustments.c.transaction_id)
            posted = [_adjustment(connection, row) for row in connection.execute(query).mappings().all()]
            _post(connection, [undone(a, now_ms) for a in posted if a.kind in ("rerate", "rerate_reversal")])
            connection.execute(update(rerates).where(rerates.c.id == rerate).values(reversed_ms=now_ms))
            return replace(found, reversed_ms=now_ms)

    def rerates(self) -> Sequence[Rerate]:
        with sql_faults("re-ratings cannot be read"), read(self._engine) as connection:
            return _rerates(connection)

    def cross(self, contract: str, percents: Sequence[int], now_ms: int) -> None:
        with sql_faults("alerts cannot be written"), write(self._engine) as connection:
            query = select(contract_alerts.c.percent).where(contract_alerts.c.contract == contract)
            known = set(connection.execute(query).scalars())
            for percent in percents:
                if percent not in known:
                    connection.execute(insert(contract_alerts), _row(Alert(contract, percent, now_ms, 0, now_ms)))

    def alerts(self, contract: str | None = None) -> Sequence[Alert]:
        t = contract_alerts.c
        query = select(contract_alerts).order_by(t.contract, t.percent)
        query = query.where(t.ended_ms.is_(None) if contract is None else t.contract == contract)
        with sql_faults("alerts cannot be read"), read(self._engine) as connection:
            return [Alert(**row) for row in connection.execute(query).mappings()]

    def alerted(self, alert: Alert) -> None:
        t = contract_alerts.c
        same = (t.contract == alert.contract, t.percent == alert.percent)
        with sql_faults("alerts cannot be written"), write(self._engine) as connection:
            connection.execute(update(contract_alerts).where(*same).values(_row(alert)))


def _rerates(connection: Connection) -> list[Rerate]:
    query = select(rerates).order_by(rerates.c.at_ms, rerates.c.id)
    return [Rerate(**row) for row in connection.execute(query).mappings()]


def _post(connection: Connection, wanted: Sequence[Adjustment]) -> int:
    """Those whose ids are not known, each a transaction of the ledger."""
    ids = [adjustment.id for adjustment in wanted]
    known = set(connection.execute(select(adjustments.c.id).where(adjustments.c.id.in_(ids))).scalars())
    fresh = [adjustment for adjustment in wanted if adjustment.id not in known]
    if not fresh:
        return 0
    number = post_transactions(connection, [adjustment.entries for adjustment in fresh])
    names = [column.name for column in adjustments.columns if column.name != "transaction_id"]
    rows = [{name: getattr(adjustment, name) for name in names} for adjustment in fresh]
    connection.execute(insert(adjustments), [{"transaction_id": number + n, **row} for n, row in enumerate(rows)])
    return len(fresh)


def _adjustment(connection: Connection, row: RowMapping) -> Adjustment:
    query = select(entries.c.account, entries.c.quantity, entries.c.amount)
    mine = query.where(entries.c.transaction_id == row["transaction_id"]).order_by(entries.c.account)
    fields = {name: value for name, value in row.items() if name not in ("transaction_id", "nano_usd")}
    return Adjustment(**fields, entries=tuple(Entry(*entry) for entry in connection.execute(mine)))


def _row(alert: Alert) -> dict[str, object]:
    return {name: getattr(alert, name) for name in Alert.__slots__}
