"""The price book in SQL (the `PriceBook` port): versions are added, never changed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError

from tidegate.domain.errors import Refusal
from tidegate.domain.price import PriceVersion
from tidegate.stores.database import read, write
from tidegate.stores.faults import sql_faults
from tidegate.stores.ledger_tables import price_versions

_FIELDS = [column.name for column in price_versions.columns if column.name != "id"]


class SqlPriceBook:
    """Implements `ports.PriceBook`. Synchronous: services call it through ``asyncio.to_thread``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, price: PriceVersion) -> PriceVersion:
        """Stores a version; its `id` is assigned. Refusal("conflict") when one with its terms begins at the same
        instant.
        """
        row = {name: getattr(price, name) for name in _FIELDS}
        row["accelerator_kinds"] = msgspec.json.encode(price.accelerator_kinds).decode()
        row["ends"] = int(price.ends)
        with sql_faults("the price book cannot be written"):
            try:
                with write(self._engine) as connection:
                    made = connection.execute(insert(price_versions).returning(price_versions.c.id), row).scalar_one()
            except IntegrityError as error:
                message = f"these terms already have a price effective at {price.effective_ms}: choose another instant"
                raise Refusal("conflict", message, param="effective") from error
        return replace(price, id=made)

    def versions(self, plan: str | None = None) -> Sequence[PriceVersion]:
        """By plan, then by the instant they take effect. Raises StoreFault."""
        query = select(price_versions).order_by(price_versions.c.plan, price_versions.c.effective_ms)
        if plan is not None:
            query = query.where(price_versions.c.plan == plan)
        with sql_faults("the price book cannot be read"), read(self._engine) as connection:
            return [_version(dict(row)) for row in connection.execute(query).mappings()]


def _version(row: dict[str, Any]) -> PriceVersion:
    row["accelerator_kinds"] = msgspec.json.decode(row["accelerator_kinds"], type=tuple[tuple[str, int], ...])
    row["ends"] = bool(row["ends"])
    return PriceVersion(**row)
