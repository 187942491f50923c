"""Everything that is not the data plane: passed through to the admin socket, streaming both ways."""

import asyncio
from collections.abc import Iterable

from tidegate.domain.errors import EngineFault, Refusal
from tidegate.gateway.cycle import Cycle
from tidegate.gateway.front import PEER, Peer
from tidegate.gateway.intake import ClientGone
from tidegate.gateway.replies import Header, Receive, Scope, Send, reply_refusal
from tidegate.gateway.upstream import Connection, Pool

# RFC 9110 7.6.1: these belong to one connection. The front answers `expect`, and says `date` itself.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection "
    b"te trailer transfer-encoding upgrade expect date server".split()
)
_CHUNKED = b"transfer-encoding: chunked\r\n"


async def pass_through(pool: Pool, address: str, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
    """Relays one request. 503 not_ready when the admin socket does not answer and nothing was sent yet."""
    connection: Connection | None = None
    peer: Peer | Cycle | None = scope.pop(PEER, None)
    started = False
    try:
        connection = await pool.connect(address)
        if peer is not None:
            peer.on_lost = lambda: connection.abort("the client is gone")
        await _send_request(connection, scope, receive, request_id)
        status = await connection.head()
        started = True
        headers = _end_to_end(connection.headers.items())
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": True})  # the first event may be far away
        while piece := await connection.read():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    except EngineFault:
        if not started and not (peer is not None and peer.lost):
            refusal = Refusal("not_ready", "the control plane does not answer", retry_after_ms=1_000)
            await reply_refusal(send, refusal, [(b"x-request-id", request_id.encode())])
        elif peer is not None:
            # Half an answer: only a broken connection tells the client that the rest is missing.
            peer.close()
    except ClientGone:
        return
    except asyncio.CancelledError:
        # Only the server cancels, when it stops; a live event stream would otherwise never end.
        if peer is None:
            raise
        peer.close()
    finally:
        if peer is not None:
            peer.on_lost = None
        if connection is not None:
            connection.release()


async def _send_request(connection: Connection, scope: Scope, receive: Receive, request_id: str) -> None:
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = _end_to_end(scope["headers"])
    names = {name for name, _ in headers}
    message = await receive()
    if message["type"] != "http.request":
        raise ClientGone
    chunked = bool(message.get("more_body")) and b"content-length" not in names
    # A HEAD is asked as GET: the front drops the body, and the parser of the answer need not know the method.
    method = b"GET" if scope["method"] == "HEAD" else scope["method"].encode()
    lines = [method + b" " + target + b" HTTP/1.1\r\n", b"x-request-id: " + request_id.encode() + b"\r\n"]
    lines += [name + b": " + value + b"\r\n" for name, value in headers if name != b"x-request-id"]
    if chunked:
        lines.append(_CHUNKED)
    connection.start(b"".join([*lines, b"\r\n"]))
    while True:
        _write(connection, message.get("body", b""), chunked)
        if not message.get("more_body"):
            break
        await connection.drain()  # an upload is as fast as its disk, and never waits in this process's memory
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
    if chunked:
        connection.write(b"0\r\n\r\n")


def _write(connection: Connection, body: bytes, chunked: bool) -> None:
    if body:
        connection.write(b"%x\r\n%b\r\n" % (len(body), body) if chunked else body)


def _end_to_end(headers: Iterable[Header]) -> list[Header]:
    return [(name, value) for name, value in headers if name not in _HOP_BY_HOP]
