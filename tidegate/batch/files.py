"""Files: uploaded, listed, read, deleted, and gone when their time is over."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from starlette.concurrency import iterate_in_threadpool
from starlette.requests import ClientDisconnect, Request

from tidegate.batch.ports import BatchStore, Vault
from tidegate.batch.upload import FRAME_BYTES, Upload, receive
from tidegate.domain.errors import Refusal, StoreFault
from tidegate.domain.ports import Clock
from tidegate.wire.batch import EXPIRES_S_MAX, EXPIRES_S_MIN, StoredFile

UPLOADS_MAX = 8
PURPOSES = ("batch",)
SWEEP_FILES_MAX = 200
REFUSED_BYTES_MAX = 64 << 20

log = logging.getLogger(__name__)


class Files:
    """`in_use` says whether an open batch still reads a file: it is then neither deleted nor let expire."""

    def __init__(
        self, store: BatchStore, vault: Vault, clock: Clock, retention_s: int, in_use: Callable[[str], bool]
    ) -> None:
        self._store = store
        self._vault = vault
        self._clock = clock
        self._retention_s = retention_s
        self._in_use = in_use
        self._uploads = 0

    async def upload(self, request: Request, tenant: str) -> StoredFile:
        """Takes a multipart upload into the vault. Nothing is left of one that is refused or cut short."""
        if self._uploads >= UPLOADS_MAX:
            raise Refusal("not_ready", f"{UPLOADS_MAX} uploads are under way; try again soon", retry_after_ms=2_000)
        self._uploads += 1
        file_id = f"file-{secrets.token_hex(12)}"
        try:
            writer = await asyncio.to_thread(self._vault.create, file_id)
            try:
                received = await receive(request, writer)
                file = self._accepted(file_id, tenant, received)
                await asyncio.to_thread(writer.finish)
                await asyncio.to_thread(self._store.add_file, file)
            except (Refusal, StoreFault, ClientDisconnect) as why:
                if isinstance(why, Refusal):
                    await _swallow(request)
                with suppress(StoreFault):  # what made it fail is told; the sweep of the next start removes the rest
                    writer.close()
                    await asyncio.to_thread(self._vault.remove, file_id)
                raise
        finally:
            self._uploads -= 1
        return file

    async def add(self, tenant: str, content: bytes, filename: str) -> StoredFile:
        """A small input file that is made here."""
        now_ms, file_id = self._clock.now_ms(), f"file-{secrets.token_hex(12)}"
        file = StoredFile(
            id=file_id,
            tenant=tenant,
            purpose="batch",
            filename=filename,
            bytes=len(content),
            created_ms=now_ms,
            expires_ms=self.expires_ms(now_ms, None),
        )
        await asyncio.to_thread(self._write, file, content)
        return file

    def _write(self, file: StoredFile, content: bytes) -> None:
        writer = self._vault.create(file.id)
        for start in range(0, len(content), FRAME_BYTES):
            writer.append(content[start : start + FRAME_BYTES])
        writer.finish()
        self._store.add_file(file)

    async def get(self, tenant: str, file_id: str) -> StoredFile:
        """Refusal not_found for another tenant's in the words for one that does not exist."""
        file = await asyncio.to_thread(self._store.file, tenant, file_id)
        if file is None or (file.expires_ms is not None and file.expires_ms <= self._clock.now_ms()):
            raise Refusal("not_found", f"No such File object: {file_id[:64]}", param="id")
        return file

    async def page(
        self, tenant: str, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> Sequence[StoredFile]:
        """At most `limit`, after the file `after`."""
        return await asyncio.to_thread(
            self._store.list_files, tenant, after=after, limit=limit, newest_first=newest_first, purpose=purpose
        )

    async def content(self, tenant: str, file_id: str) -> AsyncIterator[bytes]:
        """Its bytes, a frame at a time."""
        await self.get(tenant, file_id)
        reader = await asyncio.to_thread(self._vault.open, file_id)

        async def frames() -> AsyncIterator[bytes]:
            try:
                async for frame in iterate_in_threadpool(reader.frames()):
                    yield frame
            finally:
                reader.close()

        return frames()

    async def delete(self, tenant: str, file_id: str) -> None:
        file = await self.get(tenant, file_id)
        if self._in_use(file.id):
            raise Refusal("conflict", "a batch that is not finished reads this file: cancel it first", param="id")
        await self._remove(file)

    async def sweep(self) -> None:
        """Removes what has expired: first its content, so that nothing is left that nobody lists."""
        for file in await asyncio.to_thread(self._store.expired_files, self._clock.now_ms(), SWEEP_FILES_MAX):
            if not self._in_use(file.id):
                await self._remove(file)
                log.info("file %s has expired and is gone", file.id)

    async def remove_strays(self, kept: frozenset[str]) -> None:
        """At a start: what an upload or a batch that never came to its end has left. `kept` belongs to open batches."""
        known = kept | await asyncio.to_thread(self._store.file_ids)
        for name in await asyncio.to_thread(self._vault.names):
            if name not in known:
                await asyncio.to_thread(self._vault.remove, name)

    def expires_ms(self, now_ms: int, seconds: int | None) -> int:
        return now_ms + (seconds or self._retention_s) * 1_000

    async def _remove(self, file: StoredFile) -> None:
        await asyncio.to_thread(self._vault.remove, file.id)
        await asyncio.to_thread(self._store.remove_file, file.id)

    def _accepted(self, file_id: str, tenant: str, received: Upload) -> StoredFile:
        purpose = received.fields.pop("purpose", None)
        if purpose is None:
            raise Refusal("invalid_request", "missing required parameter: 'purpose'", param="purpose")
        if purpose not in PURPOSES:
            message = f"`purpose`: {purpose[:40]!r} is not supported; accepted: {', '.join(PURPOSES)}"
            raise Refusal("invalid_request", message, param="purpose")
        seconds = _expires_after(received.fields)
        if received.fields:
            name = next(iter(received.fields))[:80]
            raise Refusal("unsupported_parameter", f"parameter '{name}' is not supported", param=name)
        filename = received.filename or ""
        if not filename.endswith(".jsonl"):
            raise Refusal("invalid_request", "Invalid file format for Batch API. Must be .jsonl", param="file")
        now_ms = self._clock.now_ms()
        return StoredFile(
            id=file_id,
            tenant=tenant,
            purpose=purpose,
            filename=filename,
            bytes=received.size,
            created_ms=now_ms,
            expires_ms=self.expires_ms(now_ms, seconds),
        )


async def _swallow(request: Request) -> None:
    """Lets a refused upload come to its end: closing on a sender that still writes would lose it the answer."""
    left = REFUSED_BYTES_MAX
    with suppress(ClientDisconnect, RuntimeError):  # gone meanwhile, or read to the end already
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return


def _expires_after(fields: dict[str, str]) -> int | None:
    """`expires_after[anchor]` and `expires_after[seconds]`, as SDKs write the object in a form."""
    anchor, seconds = fields.pop("expires_after[anchor]", None), fields.pop("expires_after[seconds]", None)
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        message = "`expires_after[anchor]`: accepted: created_at"
        raise Refusal("invalid_request", message, param="expires_after[anchor]")
    number = int(seconds) if seconds is not None and seconds.isascii() and seconds.isdecimal() else 0
    if not EXPIRES_S_MIN <= number <= EXPIRES_S_MAX:
        message = f"`expires_after[seconds]`: accepted: {EXPIRES_S_MIN} to {EXPIRES_S_MAX}"
        raise Refusal("invalid_request", message, param="expires_after[seconds]")
    return number
