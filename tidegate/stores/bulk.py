"""Many rows in one statement, straight to the driver: the ledger's hot path, where building a statement's parameters by
name costs more than the insert itself. Rows are tuples in the order of the table's columns.
"""

from collections.abc import Callable, Sequence

from sqlalchemy import Connection, Dialect, Table

Row = tuple[object, ...]


def insert_rows(connection: Connection, table: Table, rows: list[Row]) -> None:
    if rows:
        connection.exec_driver_sql(insert_sql(table, connection.dialect), rows)


def add_rows(connection: Connection, table: Table, rows: list[Row]) -> None:
    """Adds to rows found by their primary key, making those that are missing."""
    _merge(connection, table, rows, lambda name: f"{name} = {table.name}.{name} + excluded.{name}")


def put_rows(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Replaces rows found by their primary key, making those that are missing."""
    _merge(connection, table, list(rows), lambda name: f"{name} = excluded.{name}")


def _merge(connection: Connection, table: Table, rows: list[Row], change: Callable[[str], str]) -> None:
    if not rows:
        return
    quote = connection.dialect.identifier_preparer.quote
    keys = ", ".join(quote(column.name) for column in table.primary_key)
    changes = ", ".join(change(quote(column.name)) for column in table.columns if not column.primary_key)
    merge = f"{insert_sql(table, connection.dialect)} ON CONFLICT ({keys}) DO UPDATE SET {changes}"
    connection.exec_driver_sql(merge, rows)


def insert_sql(table: Table, dialect: Dialect) -> str:
    """The driver's statement that takes rows in the order of the table's columns."""
    quote = dialect.identifier_preparer.quote
    names = ", ".join(quote(column.name) for column in table.columns)
    return f"INSERT INTO {table.name} ({names}) VALUES ({marks(dialect, len(table.columns))})"


def marks(dialect: Dialect, count: int) -> str:
    """Parameter marks in the driver's own style."""
    return ", ".join(["?" if dialect.paramstyle == "qmark" else "%s"] * count)
