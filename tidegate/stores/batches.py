"""Files and batches in SQL. Synchronous: the batch service calls it through ``asyncio.to_thread``."""

from collections.abc import Sequence
from typing import Any

import msgspec
from sqlalchemy import Engine, Select, Table, delete, insert, or_, select, update

from tidegate.stores.batch_tables import batches, files
from tidegate.stores.database import read, write
from tidegate.stores.faults import sql_faults
from tidegate.wire.batch import Notice, StoredBatch, StoredFile

_decode = msgspec.json.Decoder(StoredBatch).decode
_encode = msgspec.json.Encoder().encode


class SqlBatchStore:
    """Implements `batch.ports.BatchStore`. Every method is one transaction and raises StoreFault when it fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # --- files ----------------------------------------------------------------------------------------------------

    def add_file(self, file: StoredFile) -> None:
        """Idempotent: a file of the same id is left as it is."""
        with sql_faults("the file cannot be recorded"), write(self._engine) as connection:
            known = connection.execute(select(files.c.id).where(files.c.id == file.id)).first()
            if known is None:
                connection.execute(insert(files), msgspec.structs.asdict(file))

    def file(self, tenant: str, file_id: str) -> StoredFile | None:
        query = select(files).where(files.c.id == file_id, files.c.tenant == tenant)
        with sql_faults("files cannot be read"), read(self._engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else StoredFile(**row)

    def list_files(
        self, tenant: str, *, after: str | None, limit: int, newest_first: bool = True, purpose: str | None = None
    ) -> Sequence[StoredFile]:
        """At most `limit`, after the file `after` in the same order."""
        query = select(files).where(files.c.tenant == tenant)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with sql_faults("files cannot be read"), read(self._engine) as connection:
            rows = connection.execute(_page(query, files, after, limit, newest_first)).mappings()
            return [StoredFile(**row) for row in rows]

    def remove_file(self, file_id: str) -> None:
        with sql_faults("the file cannot be removed"), write(self._engine) as connection:
            connection.execute(delete(files).where(files.c.id == file_id))

    def expired_files(self, now_ms: int, limit: int) -> Sequence[StoredFile]:
        query = select(files).where(files.c.expires_ms <= now_ms).order_by(files.c.expires_ms).limit(limit)
        with sql_faults("files cannot be read"), read(self._engine) as connection:
            return [StoredFile(**row) for row in connection.execute(query).mappings()]

    def file_ids(self) -> frozenset[str]:
        """Every file there is: whatever else the vault holds belongs to an open batch or to nobody."""
        with sql_faults("files cannot be read"), read(self._engine) as connection:
            return frozenset(connection.execute(select(files.c.id)).scalars())

    # --- batches --------------------------------------------------------------------------------------------------

    def add_batch(self, batch: StoredBatch) -> None:
        with sql_faults("the batch cannot be recorded"), write(self._engine) as connection:
            connection.execute(insert(batches), _row(batch))

    def save_batch(self, batch: StoredBatch, produced: Sequence[StoredFile] = ()) -> None:
        """The batch as it is now, and the files it has produced, all or nothing."""
        with sql_faults("the batch cannot be written"), write(self._engine) as connection:
            connection.execute(update(batches).where(batches.c.id == batch.id).values(_row(batch)))
            for file in produced:
                connection.execute(insert(files), msgspec.structs.asdict(file))

    def batch(self, tenant: str, batch_id: str) -> StoredBatch | None:
        query = select(batches.c.document).where(batches.c.id == batch_id, batches.c.tenant == tenant)
        with sql_faults("batches cannot be read"), read(self._engine) as connection:
            document = connection.execute(query).scalar()
        return None if document is None else _decode(document)

    def list_batches(self, tenant: str, *, after: str | None, limit: int) -> Sequence[StoredBatch]:
        """Newest first."""
        query = _page(select(batches.c.document).where(batches.c.tenant == tenant), batches, after, limit, True)
        with sql_faults("batches cannot be read"), read(self._engine) as connection:
            return [_decode(document) for document in connection.execute(query).scalars()]

    def open_batches(self) -> Sequence[StoredBatch]:
        """Those with something left to do (also: a webhook to send), oldest first."""
        query = select(batches.c.document).where(batches.c.open).order_by(batches.c.created_ms, batches.c.id)
        with sql_faults("batches cannot be read"), read(self._engine) as connection:
            return [_decode(document) for document in connection.execute(query).scalars()]


def _row(batch: StoredBatch) -> dict[str, object]:
    return {
        "id": batch.id,
        "tenant": batch.tenant,
        "open": batch.status.open or batch.notice is Notice.OWED,
        "created_ms": batch.created_ms,
        "document": _encode(batch).decode(),
    }


def _page(query: Select[Any], table: Table, after: str | None, limit: int, newest_first: bool) -> Select[Any]:
    """Keyset pagination on (created_ms, id): what is added meanwhile moves nothing."""
    at, name = table.c.created_ms, table.c.id
    if after is not None:
        start = select(at).where(name == after).scalar_subquery()
        beyond = or_(at < start, (at == start) & (name < after))
        query = query.where(beyond if newest_first else or_(at > start, (at == start) & (name > after)))
    order = (at.desc(), name.desc()) if newest_first else (at, name)
    return query.order_by(*order).limit(limit)
