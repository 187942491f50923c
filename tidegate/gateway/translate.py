"""Other dialects on the same relay: a request becomes one we have, its answer comes back in the dialect's words.

Auth, admission, hold, meter and usage record are those of `/v1/chat/completions`, or of `/v1/rerank` for scores; only
what the client writes and reads differs. Nothing of it is on the path of a request that needs no translation.
"""

from collections.abc import Callable
from typing import Protocol

from tidegate.gateway.cycle import Cycle
from tidegate.gateway.front import Peer
from tidegate.gateway.replies import Header, Message, Send
from tidegate.wire.messages import Messages
from tidegate.wire.openai import SSE_DATA, SSE_END
from tidegate.wire.responses import Responses
from tidegate.wire.score import Score


class Dialect(Protocol):
    """One request and its answer, in the words of another API. `wire` has the implementations."""

    def request(self, body: bytes) -> bytes:
        """The chat request. Refusal for what there is none for."""
        ...

    def answer(self, body: bytes) -> bytes: ...

    def error(self, status: int, body: bytes) -> bytes: ...

    def event(self, data: bytes) -> bytes:
        """What one event of the chat stream is; its data is JSON."""
        ...

    def done(self) -> bytes:
        """What ends the stream."""
        ...

    def ping(self) -> bytes:
        """What a comment is."""
        ...


# path -> what it is here, and what translates one request
DIALECTS: dict[str, tuple[str, Callable[[str, int], Dialect]]] = {
    "/v1/messages": ("chat/completions", Messages),
    "/v1/responses": ("chat/completions", Responses),
    "/v1/score": ("rerank", Score),
}


class Behind(Peer):
    """The client as a relay sees it that must write through `Translated`, never to the connection itself."""

    def __init__(self, peer: Peer | Cycle) -> None:
        super().__init__()
        self.lost = peer.lost
        peer.on_lost = self.lose


class Translated:
    """An ASGI `send` that takes a chat answer and passes on the dialect's."""

    def __init__(self, dialect: Dialect, send: Send) -> None:
        self._dialect = dialect
        self._send = send
        self._head: Message = {}
        self._body = bytearray()
        self._streams = False
        self._failed = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._head = message
            self._streams = any(
                n == b"content-type" and v.startswith(b"text/event-stream") for n, v in message["headers"]
            )
            if self._streams:
                await self._send(message)
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._streams:
            await self._send({"type": "http.response.body", "body": self._events(body), "more_body": more})
            return
        self._body += body
        if not more:
            await self._reply()

    async def _reply(self) -> None:
        status, body = self._head["status"], bytes(self._body)
        said = self._dialect.answer(body) if status == 200 else self._dialect.error(status, body)
        headers: list[Header] = [(n, v) for n, v in self._head["headers"] if n != b"content-length"]
        headers.append((b"content-length", b"%d" % len(said)))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": said})

    def _events(self, events: bytes) -> bytes:
        """The relay passes whole events on, one or several at a time."""
        out = []
        for block in events.split(b"\n\n"):
            for line in block.split(b"\n"):
                if line.startswith(SSE_END):
                    out.append(b"" if self._failed else self._dialect.done())
                elif line.startswith(SSE_DATA):
                    data = line[len(SSE_DATA) :]
                    self._failed = self._failed or data.startswith(b'{"error"')
                    out.append(self._dialect.event(data))
                elif line.startswith(b":"):
                    out.append(self._dialect.ping())
        return b"".join(out)


def bearer(headers: list[Header]) -> list[Header]:
    """`x-api-key`, as Anthropic's SDK sends it, as the Authorization it stands for."""
    if any(name == b"authorization" for name, _ in headers):
        return headers
    return [*headers, *((b"authorization", b"Bearer " + value) for name, value in headers if name == b"x-api-key")]
