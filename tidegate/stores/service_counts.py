"""Counts of service levels in SQL: of an endpoint and a window one row a place of its ring, so the table is bounded."""

from collections.abc import Collection, Sequence

from sqlalchemy import Engine, delete, select
from sqlalchemy.exc import SQLAlchemyError

from tidegate.domain.errors import StoreFault
from tidegate.stores import database
from tidegate.stores.bulk import put_rows
from tidegate.stores.schema import service_counts

Row = tuple[str, str, int, int, int, int, int]
"""(endpoint, window, place, number of the bucket, served, attained, failed)"""


class SqlServiceCounts:
    """One writer: the control plane. Both methods raise StoreFault."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def load(self) -> Sequence[Row]:
        try:
            with database.read(self._engine) as connection:
                return [tuple(row) for row in connection.execute(select(service_counts))]
        except SQLAlchemyError as error:
            raise StoreFault("service levels cannot be read") from error

    def save(self, rows: Sequence[Row], gone: Collection[str]) -> None:
        """Removes all of the endpoints `gone`, then replaces what is in the places of `rows`."""
        try:
            with database.write(self._engine) as connection:
                for endpoint in gone:
                    connection.execute(delete(service_counts).where(service_counts.c.endpoint == endpoint))
                put_rows(connection, service_counts, list(rows))
        except SQLAlchemyError as error:
            raise StoreFault("service levels cannot be written") from error
