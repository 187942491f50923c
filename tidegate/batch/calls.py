"""One line, one request to the gateway: what came of it, and whether it is worth another try.

A client of its own on the parser the gateway uses, because a batch is up to 50,000 requests made on the control plane's
event loop: a general client costs it several times as much for each.
"""

import asyncio
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from tidegate.batch.ports import BatchSettings
from tidegate.wire.batch import InputLine, StoredBatch

CONNECT_S_MAX = 5.0
ANSWER_S_MAX = 3_900.0  # beyond the gateway's own bounds on a hold and on an engine that stands still
ANSWER_BYTES_MAX = 64 << 20
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 10.0


@dataclass(frozen=True, slots=True)
class Answered:
    """The model answered, or refused for good: `body` is what it said. `ok` is status 200."""

    status: int
    request_id: str
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == 200


@dataclass(frozen=True, slots=True)
class NotNow:
    """No capacity, a limit, or nobody there: nothing is wrong with the line. Not before `pause_s`."""

    pause_s: float


@dataclass(frozen=True, slots=True)
class Broken:
    """An engine failed with it. Once is bad luck (or preemption seen too late); always is the line's own doing."""

    answer: Answered


Outcome = Answered | NotNow | Broken


class Gateway:
    """The gateway as a client of it sees it, over connections that are kept. Used by one event loop."""

    def __init__(self, settings: BatchSettings) -> None:
        address = urlsplit(settings.gateway_url)
        self._host, self._port = address.hostname or "", address.port or 80
        self._idle_max = settings.in_flight_max
        self._idle: list[_Connection] = []
        self._head = (
            f"HTTP/1.1\r\nhost: {address.netloc}\r\nauthorization: Bearer {settings.runner_secret}\r\n"
            "content-type: application/json\r\n"
        )

    async def ask(self, batch: StoredBatch, number: int, line: InputLine) -> Outcome:
        """Never raises for what the network or the gateway did."""
        # The last part names the usage record: the line is billed once, however often it has to be sent.
        acting = f"{batch.tenant} {batch.key} {batch.id}-{number}"
        body = bytes(line.body)
        head = f"POST {batch.url} {self._head}x-tidegate-batch: {acting}\r\ncontent-length: {len(body)}\r\n\r\n"
        try:
            connection = await self._connect()
            async with asyncio.timeout(ANSWER_S_MAX):
                answer = await connection.ask(head.encode() + body)
        except (OSError, TimeoutError):
            return NotNow(PAUSE_S_MIN)
        if connection.reusable and len(self._idle) < self._idle_max:
            self._idle.append(connection)
        else:
            connection.close()
        if answer.status in (402, 408, 409, 429, 503):
            return NotNow(_pause_s(connection.headers.get(b"retry-after", b"")))
        if answer.status >= 500:
            return Broken(answer)
        return answer

    async def _connect(self) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_S_MAX):
            _, made = await loop.create_connection(_Connection, self._host, self._port)
        return made

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class _Connection(asyncio.Protocol):
    """One exchange at a time. `headers` are of the last answer, in lower case."""

    def __init__(self) -> None:
        self.headers: dict[bytes, bytes] = {}
        self.reusable = True
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._answered: asyncio.Future[Answered] | None = None

    async def ask(self, request: bytes) -> Answered:
        """The whole answer. OSError when the connection ends before it does. Cancelled: the gateway is told at once."""
        assert self._transport is not None
        self.headers, self._body = {}, bytearray()
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answered
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio.Protocol ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the gateway's answer is not HTTP ({type(error).__name__})"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionError("the gateway closed the connection"))

    # --- httptools ----------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body += body
        if len(self._body) > ANSWER_BYTES_MAX:
            self._fail(ConnectionError(f"the answer is over {ANSWER_BYTES_MAX} bytes"))

    def on_message_complete(self) -> None:
        self.reusable = self.reusable and self._parser.should_keep_alive()
        if self._answered is not None and not self._answered.done():
            request_id = self.headers.get(b"x-request-id", b"").decode("ascii", "replace")
            self._answered.set_result(Answered(self._parser.get_status_code(), request_id, bytes(self._body)))

    def _fail(self, error: ConnectionError) -> None:
        self.reusable = False
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(error)


def _pause_s(retry_after: bytes) -> float:
    return min(max(float(retry_after) if retry_after.isdigit() else 0.0, PAUSE_S_MIN), PAUSE_S_MAX)
