"""Opening the SQL database and bringing its schema up to date: SQLite (WAL) on one machine, PostgreSQL for more.

Everything in `stores` is synchronous; services call it through ``asyncio.to_thread``. An Engine may be used from any
thread.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tidegate.domain.errors import StoreFault

BUSY_MS_MAX = 5_000
POOL_CONNECTIONS_MAX = 8
MIGRATE_LOCK_ID = 0x71DE6A7E  # any constant of ours: two control planes that start at once migrate one after the other


def open_database(url: str) -> Engine:
    """An engine for ``sqlite:///FILE`` or ``postgresql+psycopg://…``. Connects to nothing yet.

    Raises StoreFault when the URL is malformed or of another kind.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise StoreFault("the database URL is malformed") from error
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, pool_pre_ping=True, pool_size=POOL_CONNECTIONS_MAX)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise StoreFault("the database URL must be sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME")
    Path(parsed.database or "").resolve().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, pool_size=POOL_CONNECTIONS_MAX)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def migrate(engine: Engine) -> None:
    """Runs, in one transaction, every migration that has not run yet. StoreFault when the database cannot be used."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    try:
        with write(engine) as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": MIGRATE_LOCK_ID})
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except SQLAlchemyError as error:
        raise StoreFault("the database cannot be opened or migrated") from error
    except CommandError as error:
        raise StoreFault("the database was written by a newer version of tidegate") from error


@contextmanager
def write(engine: Engine) -> Iterator[Connection]:
    """One transaction that will write: commits at the end, rolls back on an exception.

    On SQLite it takes the write lock at once: a transaction that reads first and asks for the lock later would be
    refused with "database is locked" whenever somebody else wrote in between, however long it is willing to wait.
    """
    with engine.connect().execution_options(sqlite_begin="IMMEDIATE") as connection, connection.begin():
        yield connection


@contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """One transaction that only reads: a consistent snapshot that never waits for a writer."""
    with engine.connect() as connection, connection.begin():
        yield connection


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, not the driver's guess of when one is needed
    cursor = connection.cursor()
    # synchronous=FULL: journal segments are deleted once the ledger has them, so a commit must survive a power cut.
    for pragma in (f"busy_timeout={BUSY_MS_MAX}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN " + connection.get_execution_options().get("sqlite_begin", "DEFERRED"))
