"""Counts of service levels in SQL: of an endpoint and a window one row a place of its ring, so the table is bounded."""

from collections.abc import Collection, Sequence

from sqlalchemy import Engine, and_, bindparam, delete, insert, select
from sqlalchemy.exc import SQLAlchemyError

from tidegate.domain.errors import StoreFault
from tidegate.stores import database
from tidegate.stores.schema import service_counts

Row = tuple[str, str, int, int, int, int, int]
"""(endpoint, window, place, number of the bucket, served, attained, failed)"""

_NAMES = [column.name for column in service_counts.columns]
# Delete and insert rather than an upsert, whose syntax differs between databases.
_PLACE = delete(service_counts).where(
    and_(*(column == bindparam(f"at_{column.name}") for column in service_counts.primary_key))
)


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
                if rows:
                    named = [dict(zip(_NAMES, row, strict=True)) for row in rows]
                    connection.execute(_PLACE, [{f"at_{name}": row[name] for name in _NAMES[:3]} for row in named])
                    connection.execute(insert(service_counts), named)
        except SQLAlchemyError as error:
            raise StoreFault("service levels cannot be written") from error
