"""Many rows in one statement, straight to the driver: the ledger's hot path, where building a statement's parameters by
name costs more than the insert itself. Rows are tuples in the order of the table's columns.

SQLite is fastest with the driver's `executemany`. PostgreSQL is several times faster with COPY, which is a statement
like any other: what it refuses, a known id for one, fails the transaction.
"""

from typing import Any, cast

from sqlalchemy import Connection, Dialect, Table
from sqlalchemy.exc import DBAPIError

Row = tuple[object, ...]


def insert_rows(connection: Connection, table: Table, rows: list[Row]) -> None:
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        _copy(connection, table, rows)
    else:
        connection.exec_driver_sql(insert_sql(table, connection.dialect), rows)


def add_rows(connection: Connection, table: Table, rows: list[Row]) -> None:
    """Adds to rows found by their primary key, making those that are missing. No two `rows` have the same key."""
    if not rows:
        return
    quote = connection.dialect.identifier_preparer.quote
    keys = ", ".join(quote(column.name) for column in table.primary_key)
    names = [quote(column.name) for column in table.columns if not column.primary_key]
    sums = ", ".join(f"{name} = {table.name}.{name} + excluded.{name}" for name in names)
    merge = f" ON CONFLICT ({keys}) DO UPDATE SET {sums}"
    if connection.dialect.name == "postgresql":  # one statement for all: each of its own costs more than all it adds
        arrays = ", ".join(f"%s::{column.type.compile(connection.dialect)}[]" for column in table.columns)
        select = f"INSERT INTO {table.name} ({_names(table, connection.dialect)}) SELECT * FROM unnest({arrays})"
        connection.exec_driver_sql(select + merge, tuple(list(column) for column in zip(*rows, strict=True)))
    else:
        connection.exec_driver_sql(insert_sql(table, connection.dialect) + merge, rows)


def insert_sql(table: Table, dialect: Dialect) -> str:
    """The driver's statement that takes rows in the order of the table's columns."""
    return f"INSERT INTO {table.name} ({_names(table, dialect)}) VALUES ({marks(dialect, len(table.columns))})"


def marks(dialect: Dialect, count: int) -> str:
    """Parameter marks in the driver's own style."""
    return ", ".join(["?" if dialect.paramstyle == "qmark" else "%s"] * count)


def _names(table: Table, dialect: Dialect) -> str:
    return ", ".join(dialect.identifier_preparer.quote(column.name) for column in table.columns)


def _copy(connection: Connection, table: Table, rows: list[Row]) -> None:
    statement = f"COPY {table.name} ({_names(table, connection.dialect)}) FROM STDIN"
    driver, cursor = connection.dialect.loaded_dbapi, cast(Any, connection.connection.cursor())
    try:
        with cursor, cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)
    except driver.Error as error:  # as the driver's errors are everywhere else
        raise DBAPIError.instance(statement, None, error, driver.Error, dialect=connection.dialect) from error
