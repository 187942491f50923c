"""The state store on real SQLite and PostgreSQL: compare-and-commit, round trips, the bounded audit log, faults."""

import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from tidegate.domain.endpoint import ApiKey, Deployment, Mode, ModelKind, ModelProfile, Slo, Tenant
from tidegate.domain.errors import CommitConflict, StoreFault
from tidegate.domain.ports import Activity, Change
from tidegate.stores import database, schema, state
from tidegate.stores.state import SqlStateStore

MODEL = ModelProfile("file:///m", "d1", ModelKind.GENERATIVE, 4_000_000, 4_096, 512, params=2_000_000)
DEPLOYMENT = Deployment(
    "acme/tides", "acme", MODEL, Mode.DEDICATED, min_replicas=1, slo=Slo(ttft_ms=500), regions=("eu", "us"),
    engine_args=(("threads", "2"),),
)  # fmt: skip


@pytest.fixture
def engine(sql_engine: Engine) -> Engine:
    return sql_engine


def test_a_new_database_is_empty_at_version_0(engine: Engine) -> None:
    loaded = SqlStateStore(engine).load()
    assert (loaded.version, loaded.tenants, loaded.keys, loaded.deployments) == (0, (), (), ())


def test_what_is_committed_comes_back_whole_after_reopening(engine: Engine) -> None:
    key = ApiKey("k1", "acme", "ab" * 32, "tg-…wxyz", 5, expires_ms=9)
    committed = SqlStateStore(engine).commit(0, Change(put=(Tenant("acme", 1), key, DEPLOYMENT)))
    engine.dispose()
    assert SqlStateStore(engine).load() == committed
    assert committed.version == 1
    assert committed.tenants == (Tenant("acme", 1),)
    assert committed.keys == (key,)
    assert committed.deployments == (DEPLOYMENT,)


def test_put_replaces_and_remove_removes_a_tenants_keys_with_it(engine: Engine) -> None:
    store = SqlStateStore(engine)
    keys = (ApiKey("k1", "acme", "aa", "h", 1), ApiKey("k2", None, "bb", "h", 2))
    store.commit(0, Change(put=(Tenant("acme", 1), *keys, DEPLOYMENT)))
    revoked = ApiKey("k1", "acme", "aa", "h", 1, revoked_ms=7)
    assert store.commit(1, Change(put=(revoked,))).keys[0] == revoked
    left = store.commit(2, Change(remove_tenants=("acme",), remove_deployments=("acme/tides",)))
    assert (left.tenants, left.keys, left.deployments) == ((), (keys[1],), ())


tenant_ids, endpoints = st.sampled_from(["a", "b", "c"]), st.sampled_from(["a/x", "a/y", "b/x"])
things = st.one_of(
    st.builds(Tenant, tenant_ids, st.integers(0, 9)),
    st.builds(
        lambda i, tenant, at, gone: ApiKey(f"k{i}", tenant, f"{i:064x}", "h", at, revoked_ms=gone),
        st.integers(0, 5), st.none() | tenant_ids, st.integers(0, 3), st.none() | st.integers(0, 9),
    ),
    st.builds(
        lambda endpoint, generation: replace(DEPLOYMENT, endpoint=endpoint, generation=generation),
        endpoints, st.integers(1, 9),
    ),
)  # fmt: skip
changes = st.builds(
    Change, st.lists(things, max_size=4).map(tuple), st.lists(tenant_ids, max_size=2).map(tuple),
    st.lists(endpoints, max_size=2).map(tuple),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(changes, st.booleans()), max_size=6))
def test_what_a_commit_returns_is_what_a_fresh_reader_loads(history: list[tuple[Change, bool]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        engine = database.open_database(f"sqlite:///{directory}/state.sqlite")
        database.migrate(engine)
        store = SqlStateStore(engine)
        for version, (change, by_another) in enumerate(history):
            after = (SqlStateStore(engine) if by_another else store).commit(version, change)
            assert after == SqlStateStore(engine).load()
        engine.dispose()


def test_a_stale_commit_conflicts_and_changes_nothing(engine: Engine) -> None:
    store = SqlStateStore(engine)
    store.commit(0, Change(put=(Tenant("acme", 1),)))
    with pytest.raises(CommitConflict):
        store.commit(0, Change(put=(Tenant("late", 1),)))
    assert store.load().tenants == (Tenant("acme", 1),)


def test_a_commit_that_fails_half_way_changes_nothing(engine: Engine) -> None:
    store = SqlStateStore(engine)
    store.commit(0, Change(put=(ApiKey("k1", None, "same digest", "h", 1),)))
    with pytest.raises(StoreFault):
        store.commit(1, Change(put=(Tenant("acme", 1), ApiKey("k2", None, "same digest", "h", 2))))
    loaded = store.load()
    assert (loaded.version, loaded.tenants) == (1, ())


def test_of_many_writers_at_one_version_exactly_one_wins(engine: Engine) -> None:
    outcomes: list[str] = []

    def write(name: str) -> None:
        try:
            SqlStateStore(engine).commit(0, Change(put=(Tenant(name, 1),)))
            outcomes.append(name)
        except CommitConflict:
            outcomes.append("conflict")

    threads = [threading.Thread(target=write, args=(f"t{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if outcome != "conflict"]
    assert len(outcomes) == 6
    assert SqlStateStore(engine).load().tenants == (Tenant(winner, 1),)


def test_the_audit_log_is_newest_first_filtered_and_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "ACTIVITY_ROWS_MAX", 10)
    monkeypatch.setattr(state, "TRIM_EVERY_ROWS", 5)
    store = SqlStateStore(engine)
    for i in range(30):
        store.record([Activity(i, "core", "wake", f"acme/{i % 2}", f"rule n={i}")])
    assert [a.at_ms for a in store.activity(3)] == [29, 28, 27]
    assert [a.at_ms for a in store.activity(2, subject="acme/0")] == [28, 26]
    assert len(store.activity(1_000)) <= 10 + 5
    store.record([])
    assert store.activity(1)[0].reason == "rule n=29"


def test_a_database_that_is_away_is_a_store_fault(tmp_path: Path) -> None:
    store = SqlStateStore(database.open_database(f"sqlite:///{tmp_path}/empty.sqlite"))
    for use in (store.load, lambda: store.commit(0, Change()), lambda: store.activity(1)):
        with pytest.raises(StoreFault):
            use()


@pytest.mark.parametrize("url", ["nonsense", "mysql://h/d", "sqlite://", "sqlite:///:memory:"])
def test_urls_we_cannot_serve_are_refused(url: str) -> None:
    with pytest.raises(StoreFault):
        database.open_database(url)


def test_migrating_twice_is_harmless_and_a_newer_schema_is_refused(engine: Engine) -> None:
    database.migrate(engine)
    with database.write(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreFault, match="newer version"):
        database.migrate(engine)


def test_migrations_make_exactly_what_the_schema_declares(engine: Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    ours = {schema.state_version.name, schema.tenants.name, schema.api_keys.name, schema.deployments.name, "activity"}

    def include(_thing: object, name: str | None, kind: str, _reflected: bool, _other: object) -> bool:
        return kind != "table" or name in ours

    with database.read(engine) as connection:
        context = MigrationContext.configure(connection, opts={"include_object": include, "compare_type": True})
        difference = compare_metadata(context, schema.metadata)
    assert difference == []
