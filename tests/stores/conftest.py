"""Databases to run the same tests on: SQLite always, PostgreSQL on a server of our own where it is installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests import postgres
from tidegate.stores import batch_tables, contract_tables  # noqa: F401  # declared with all, whichever test looks at them
from tidegate.stores.database import migrate, open_database


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    """A PostgreSQL server started for this run."""
    pg_ctl = postgres.find_pg_ctl()
    if pg_ctl is None:
        pytest.skip("PostgreSQL is not installed: the same tests run on SQLite only")
    with postgres.server(pg_ctl) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def sql_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty, migrated database of each kind."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'tidegate.db'}"
    else:
        url = postgres.new_database(request.getfixturevalue("postgres_server"))
    engine = open_database(url)
    migrate(engine)
    yield engine
    engine.dispose()
