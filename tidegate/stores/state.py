"""Desired state (tenants, API keys, deployments) and the audit log in SQL: the `StateStore` port.

Synchronous: services call it through ``asyncio.to_thread``. Every failure of the database leaves as a StoreFault.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
from sqlalchemy import Connection, Engine, Table, delete, func, insert, select, update
from sqlalchemy.exc import SQLAlchemyError

from tidegate.domain.endpoint import ApiKey, Deployment, Tenant
from tidegate.domain.errors import CommitConflict, StoreFault
from tidegate.domain.limits import Limits
from tidegate.domain.ports import Activity, Change, State
from tidegate.stores import database
from tidegate.stores.contract_tables import limits
from tidegate.stores.schema import activity, api_keys, deployments, state_version, tenants

ACTIVITY_ROWS_MAX = 100_000
TRIM_EVERY_ROWS = 1_000  # trimming costs a range delete: once in a while, not with every batch

_decode_deployment = msgspec.json.Decoder(Deployment).decode
_decode_limits = msgspec.json.Decoder(Limits).decode


class SqlStateStore:
    """One row holds the version of everything; whoever moves it from the expected value wins, all others conflict."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last = State(-1)  # what the last load or commit saw, so that a commit need not read everything again
        self._untrimmed_rows = TRIM_EVERY_ROWS  # so that the first batch after a start trims what an earlier run left

    def load(self) -> State:
        """Everything, at one version. Raises StoreFault."""
        with _faults("desired state cannot be read"), database.read(self._engine) as connection:
            self._last = _load(connection)
        return self._last

    def commit(self, expected_version: int, change: Change) -> State:
        """Applies `change` whole and returns the new state. Removing a tenant removes its keys.

        Raises CommitConflict when somebody else committed since `expected_version`, StoreFault when the database fails.
        """
        with _faults("desired state cannot be written"), database.write(self._engine) as connection:
            moved = connection.execute(
                update(state_version)
                .where(state_version.c.id == 1, state_version.c.version == expected_version)
                .values(version=expected_version + 1)
            )
            if moved.rowcount != 1:
                raise CommitConflict(f"desired state is no longer at version {expected_version}")
            for endpoint in change.remove_deployments:
                connection.execute(delete(deployments).where(deployments.c.endpoint == endpoint))
            for tenant in change.remove_tenants:
                connection.execute(delete(api_keys).where(api_keys.c.tenant == tenant))
                connection.execute(delete(tenants).where(tenants.c.id == tenant))
            for scope, subject in change.remove_limits:
                connection.execute(delete(limits).where(limits.c.scope == scope.value, limits.c.subject == subject))
            for thing in change.put:
                _put(connection, thing)
            known = self._last.version == expected_version
            after = _changed(self._last, change) if known else _load(connection)
        self._last = after  # only now: the transaction above may still have failed at its commit
        return after

    def record(self, activity_lines: Sequence[Activity]) -> None:
        """Appends to the audit log; only the newest `ACTIVITY_ROWS_MAX` lines are kept. Raises StoreFault."""
        if not activity_lines:
            return
        rows = [
            {"at_ms": a.at_ms, "actor": a.actor, "kind": a.kind, "subject": a.subject, "reason": a.reason}
            for a in activity_lines
        ]
        with _faults("the audit log cannot be written"), database.write(self._engine) as connection:
            connection.execute(insert(activity), rows)
            self._untrimmed_rows += len(rows)
            if self._untrimmed_rows >= TRIM_EVERY_ROWS:
                newest = connection.execute(select(func.max(activity.c.id))).scalar_one()
                connection.execute(delete(activity).where(activity.c.id <= newest - ACTIVITY_ROWS_MAX))
                self._untrimmed_rows = 0

    def activity(self, limit: int, subject: str | None = None) -> Sequence[Activity]:
        """At most `limit` lines, newest first, of one subject or of all. Raises StoreFault."""
        query = select(activity).order_by(activity.c.id.desc()).limit(limit)
        if subject is not None:
            query = query.where(activity.c.subject == subject)
        with _faults("the audit log cannot be read"), database.read(self._engine) as connection:
            return [Activity(r.at_ms, r.actor, r.kind, r.subject, r.reason) for r in connection.execute(query)]


@contextmanager
def _faults(what: str) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreFault(what) from error


def _load(connection: Connection) -> State:
    version = connection.execute(select(state_version.c.version)).scalar_one()
    documents = connection.execute(select(deployments.c.document)).scalars()
    return _state(
        version,
        (Tenant(**row) for row in connection.execute(select(tenants)).mappings()),
        (ApiKey(**row) for row in connection.execute(select(api_keys)).mappings()),
        map(_decode_deployment, documents),
        map(_decode_limits, connection.execute(select(limits.c.document)).scalars()),
    )


def _state(
    version: int,
    tenants_: Iterable[Tenant],
    keys: Iterable[ApiKey],
    deployments_: Iterable[Deployment],
    limits_: Iterable[Limits],
) -> State:
    """Sorted here and not in SQL, where the order of names depends on the database's locale."""
    return State(
        version=version,
        tenants=tuple(sorted(tenants_, key=lambda tenant: tenant.id)),
        keys=tuple(sorted(keys, key=lambda key: (key.created_ms, key.id))),
        deployments=tuple(sorted(deployments_, key=lambda deployment: deployment.endpoint)),
        limits=tuple(sorted(limits_, key=lambda rule: (rule.scope, rule.subject))),
    )


def _changed(before: State, change: Change) -> State:
    """What `_load` would read after `change` was written to `before`."""
    tenants_ = {t.id: t for t in before.tenants if t.id not in change.remove_tenants}
    keys = {k.id: k for k in before.keys if k.tenant not in change.remove_tenants}
    deployments_ = {d.endpoint: d for d in before.deployments if d.endpoint not in change.remove_deployments}
    limits_ = {(r.scope, r.subject): r for r in before.limits if (r.scope, r.subject) not in change.remove_limits}
    for thing in change.put:
        match thing:
            case Tenant():
                tenants_[thing.id] = thing
            case ApiKey():
                keys[thing.id] = thing
            case Deployment():
                deployments_[thing.endpoint] = thing
            case Limits():
                limits_[thing.scope, thing.subject] = thing
    return _state(before.version + 1, tenants_.values(), keys.values(), deployments_.values(), limits_.values())


def _put(connection: Connection, thing: Tenant | ApiKey | Deployment | Limits) -> None:
    """Insert or replace whole. Delete and insert rather than an upsert, whose syntax differs between databases."""
    table: Table
    match thing:
        case Tenant():
            table, key = tenants, tenants.c.id == thing.id
            row: dict[str, object] = {"id": thing.id, "created_ms": thing.created_ms}
        case ApiKey():
            table, key = api_keys, api_keys.c.id == thing.id
            row = {column.name: getattr(thing, column.name) for column in api_keys.columns}
        case Deployment():
            table, key = deployments, deployments.c.endpoint == thing.endpoint
            row = {
                "endpoint": thing.endpoint,
                "tenant": thing.tenant,
                "generation": thing.generation,
                "document": msgspec.json.encode(thing).decode(),
            }
        case Limits():
            table, key = limits, (limits.c.scope == thing.scope.value) & (limits.c.subject == thing.subject)
            document = msgspec.json.encode(thing).decode()
            row = {"scope": thing.scope.value, "subject": thing.subject, "document": document}
    connection.execute(delete(table).where(key))
    connection.execute(insert(table), row)
