"""What a batch has produced: two files in the vault that grow by a line as lines end, each line there exactly once.

Lines gather while the disk is busy and are then made durable together. What a crash left is read back: a line that is
there is done, one that is not is done again.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

import msgspec

from tidegate.batch.ports import Vault, Writer
from tidegate.domain.errors import StoreFault
from tidegate.wire.batch import LineFault, LineResponse, OutputLine

GATHER_MS = 50
GATHERED_BYTES_MAX = 32 << 20

_encode = msgspec.json.Encoder().encode


class _Tokens(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Tokens | None = None


class _Body(msgspec.Struct):
    usage: _Usage | None = None


class _Seen(msgspec.Struct):
    custom_id: str
    response: LineResponse | None = None


_body = msgspec.json.Decoder(_Body).decode
_seen = msgspec.json.Decoder(_Seen).decode


class Results:
    """One writer: `run` is its task. Counts are of what is durable."""

    def __init__(self, vault: Vault, output_id: str, error_id: str) -> None:
        self.completed = self.failed = 0
        self.output_bytes = self.error_bytes = 0
        self.input_tokens = self.cached_tokens = self.output_tokens = 0
        self._vault = vault
        self._ids = (output_id, error_id)
        self._writers: tuple[Writer, Writer] | None = None
        self._gathered: list[tuple[bool, bytes]] = []
        self._gathered_bytes = 0
        self._some = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._writing = threading.Lock()  # a flush may still be writing when the platform closes the files

    def open(self, each: Callable[[str], None]) -> None:
        """Reads back what there is; `each` is told the custom_id of every line that is done. Blocking."""

        def seen(ok: bool) -> Callable[[bytes], None]:
            def one(data: bytes) -> None:
                line = _seen(data)
                each(line.custom_id)
                self._count(ok, data, line.response)

            return one

        output_id, error_id = self._ids
        self._writers = (self._vault.resume(output_id, seen(True)), self._vault.resume(error_id, seen(False)))

    def add(self, line: OutputLine, *, ok: bool) -> None:
        """It has ended, and will be made durable whatever becomes of the caller; who adds many waits for `room`."""
        data = _encode(line) + b"\n"
        self._gathered.append((ok, data))
        self._gathered_bytes += len(data)
        if self._gathered_bytes > GATHERED_BYTES_MAX:
            self._room.clear()
        self._some.set()

    async def room(self) -> None:
        """Returns once less than `GATHERED_BYTES_MAX` waits for the disk."""
        await self._room.wait()

    async def run(self) -> None:
        """Until cancelled. Raises StoreFault when the disk does not take it."""
        while True:
            await self._some.wait()
            await asyncio.sleep(GATHER_MS / 1000)
            await self.flush()

    async def flush(self) -> None:
        """What has gathered is durable once this returns."""
        gathered, self._gathered = self._gathered, []
        self._gathered_bytes = 0
        self._some.clear()
        if gathered:
            await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(self._write, gathered)))
        self._room.set()

    def _write(self, gathered: list[tuple[bool, bytes]]) -> None:
        with self._writing:
            if self._writers is not None:  # else the platform is stopping: these lines are done again
                self._append(gathered, self._writers)

    def _append(self, gathered: list[tuple[bool, bytes]], writers: tuple[Writer, Writer]) -> None:
        for ok in (True, False):
            lines = [data for is_ok, data in gathered if is_ok is ok]
            writer = writers[0 if ok else 1]
            for data in lines:
                writer.append(data)
            if lines:
                writer.sync()
            for data in lines:
                self._count(ok, data, _seen(data).response)

    def _count(self, ok: bool, data: bytes, response: LineResponse | None) -> None:
        if not ok:
            self.failed += 1
            self.error_bytes += len(data)
            return
        self.completed += 1
        self.output_bytes += len(data)
        assert response is not None, "an output line has a response"
        usage = _body(response.body).usage
        if usage is not None:
            self.input_tokens += usage.prompt_tokens
            self.output_tokens += usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.cached_tokens += usage.prompt_tokens_details.cached_tokens

    def finish(self) -> None:
        """Both files are whole; one without a line is not kept. Blocking."""
        assert self._writers is not None
        for writer, file_id, lines in zip(self._writers, self._ids, (self.completed, self.failed), strict=True):
            writer.finish()
            if not lines:
                self._vault.remove(file_id)

    def close(self) -> None:
        """Gives the files back unfinished: the platform stops, or the batch is taken up again later."""
        with self._writing, suppress(StoreFault):  # what it could not write is done again
            for writer in self._writers or ():
                writer.close()
            self._writers = None


def answered(line_id: str, custom_id: str, status: int, request_id: str, body: bytes) -> OutputLine:
    """`body` is JSON; one that is spread over lines would break a file of lines and is written anew."""
    if b"\n" in body:
        body = _encode(msgspec.json.decode(body))
    return OutputLine(line_id, custom_id, LineResponse(status, request_id, msgspec.Raw(body)), None)


def unanswered(line_id: str, custom_id: str, code: str, message: str) -> OutputLine:
    return OutputLine(line_id, custom_id, None, LineFault(code, message))
