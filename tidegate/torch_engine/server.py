"""The engine's HTTP face on its Unix socket: `/v1` for the gateway, `/control` for the node's supervisor.

Both live on one socket of mode 0600. Tenants cannot reach `/control`: the gateway sends fixed `/v1` paths only.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tidegate.domain.errors import Refusal
from tidegate.torch_engine import encode_api, generate_api
from tidegate.torch_engine.adapter import Adapter
from tidegate.torch_engine.answers import Answer
from tidegate.torch_engine.encode_loop import EncodeJob
from tidegate.torch_engine.faults import EXIT_OK, EXIT_SOCKET, ModelFault
from tidegate.torch_engine.http1 import Connection, Exchange
from tidegate.torch_engine.life import Life, NotServing
from tidegate.torch_engine.model import Loaded
from tidegate.torch_engine.options import Options
from tidegate.torch_engine.sequence import GenerationJob
from tidegate.wire import openai

INLINE_BODY_BYTES_MAX = 32 << 10  # a longer body is parsed and tokenised off the loop, so that streams go on
GRACE_MS = 200
log = logging.getLogger("tidegate.engine")

Prepared = tuple[GenerationJob | EncodeJob, Callable[[Exchange], Any]]

_KINDS = {
    "/v1/chat/completions": ("generative",),
    "/v1/completions": ("generative",),
    "/v1/embeddings": ("embedding",),
    "/v1/classify": ("classification",),
    "/v1/rerank": ("classification", "embedding"),
}
_ENCODE = {
    "/v1/embeddings": encode_api.embedding_job,
    "/v1/classify": encode_api.classify_job,
    "/v1/rerank": encode_api.rerank_job,
}


class Server:
    """Routes exchanges. Lives on the event loop's thread."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def handle(self, exchange: Exchange) -> None:
        path, method = exchange.path, exchange.method
        if path in _KINDS or path in self._posts:
            wanted = "POST"
        elif path == "/v1/models" or path in self._gets:
            wanted = "GET"
        else:
            _refuse(exchange, Refusal("not_found", f"no such path: {path[:80]}"))
            return
        if method != wanted:
            _refuse(exchange, Refusal("method_not_allowed", f"{path} takes {wanted}"))
        elif path in _KINDS:
            self._serve(exchange)
        elif path == "/v1/models":
            exchange.respond(200, self._models())
        else:
            self._spawn(self._answer_control(exchange, (self._gets | self._posts)[path]))

    # ---- control ----------------------------------------------------------------------------------------------------

    @property
    def _gets(self) -> dict[str, Callable[[], Awaitable[dict[str, Any]]]]:
        return {"/control/ready": self.life.settled, "/control/state": self.life.describe}

    @property
    def _posts(self) -> dict[str, Callable[[], Awaitable[dict[str, Any]]]]:
        async def resume() -> dict[str, Any]:
            return self.life.resume()

        life = self.life
        return {
            "/control/sleep": life.sleep,
            "/control/wake": life.wake,
            "/control/canary": life.canary,
            "/control/drain": life.drain,
            "/control/resume": resume,
        }

    async def _answer_control(self, exchange: Exchange, act: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        try:
            exchange.respond(200, openai.encode(await act()))
        except Refusal as refusal:
            _refuse(exchange, refusal)

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _serve(self, exchange: Exchange) -> None:
        try:
            model = self.life.check_serving()
            if model.kind not in _KINDS[exchange.path]:
                raise Refusal("wrong_endpoint_kind", f"this model is for {model.kind} requests, not {exchange.path}")
            if len(exchange.body) > INLINE_BODY_BYTES_MAX or exchange.adapter:
                self._spawn(self._serve_long(exchange, model))
                return
            self._submit(exchange, _prepare(exchange, model))
        except Refusal as refusal:
            _refuse(exchange, refusal)
        except NotServing as reason:
            _not_serving(exchange, reason)

    async def _serve_long(self, exchange: Exchange, model: Loaded) -> None:
        try:
            prepared = await self.life.loop.run_in_executor(None, _prepare, exchange, model)
            try:
                self.life.check_serving()  # it may have gone to sleep meanwhile
            except (Refusal, NotServing):
                self.life.give_back(prepared[0])
                raise
            self._submit(exchange, prepared)
        except Refusal as refusal:
            _refuse(exchange, refusal)
        except NotServing as reason:
            _not_serving(exchange, reason)

    def _submit(self, exchange: Exchange, prepared: Prepared) -> None:
        job, answer = prepared
        exchange.body = b""
        if exchange.gone:
            self.life.give_back(job)
            return
        exchange.on_gone = lambda: self.life.abort(job)
        self.life.submit(job, answer(exchange))

    def _models(self) -> bytes:
        options = self.life.options
        name = options.name or options.model.name
        entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tidegate"}
        return openai.encode({"object": "list", "data": [entry]})

    def _spawn(self, work: Any) -> None:
        task = self.life.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.life._on_death(error)


def _prepare(exchange: Exchange, model: Loaded) -> Prepared:
    """Raises Refusal. Runs on the loop or, for a long body or an adapter, beside it: only reads its arguments."""
    path, body = exchange.path, exchange.body
    if path in _ENCODE:
        encode_job, finish = _ENCODE[path](body, model)

        def answer_encoded(exchange: Exchange) -> Callable[[EncodeJob], None]:
            tokens = str(sum(map(len, encode_job.texts)))
            headers = {"x-tidegate-prompt-tokens": tokens, "x-tidegate-cached-tokens": "0"}
            return lambda done: exchange.respond(200, finish(done), headers)

        return encode_job, answer_encoded
    make = generate_api.chat_job if path == "/v1/chat/completions" else generate_api.completion_job
    request, job = make(body, model)
    job.adapter = _adapter(exchange.adapter, model)
    return job, lambda exchange: Answer(exchange, job, model.codec, request)


def _adapter(header: bytes, model: Loaded) -> Adapter | None:
    """``DIGEST FOLDER`` (the folder percent-encoded) of the gateway's header: the adapter, read if it is not here."""
    if not header:
        return None
    if model.lora is None:
        raise Refusal("endpoint_failed", "this base was not started to take adapters (adapter_bytes_max)")
    digest, _, folder = header.decode("ascii", "replace").partition(" ")
    try:
        return model.lora.take(digest, Path(unquote(folder)))
    except ModelFault as fault:
        raise Refusal("endpoint_failed", fault.reason) from fault


def _refuse(exchange: Exchange, refusal: Refusal) -> None:
    exchange.respond(refusal.status, openai.refusal_body(refusal), openai.refusal_headers(refusal))


def _not_serving(exchange: Exchange, reason: NotServing) -> None:
    body = openai.encode(openai.error_object(reason.message, "server_error", reason.code))
    exchange.respond(503, body, {"retry-after": str(max(1, reason.retry_after_ms // 1000))})


# ---- the process ----------------------------------------------------------------------------------------------------


def run(options: Options) -> int:
    """Serves until the lifeline closes, a signal comes or the model fails. Returns the exit code."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_serve_process(options))
    if code != EXIT_SOCKET:  # then it is somebody else's
        Path(options.socket).unlink(missing_ok=True)
    return code


async def _serve_process(options: Options) -> int:
    loop = asyncio.get_running_loop()
    life = Life(options, loop)
    server = Server(life)
    listener = await _listen(options.socket, server, loop)
    if listener is None:
        return EXIT_SOCKET
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, life.ended.set)
    if options.lifeline is not None:
        _watch_lifeline(options.lifeline, life, loop)
    life.begin()
    try:
        await life.ended.wait()
    finally:
        listener.close()
        for connection in list(server.connections):
            connection.close()
    return life.exit_code


async def _listen(path: str, server: Server, loop: asyncio.AbstractEventLoop) -> asyncio.AbstractServer | None:
    """Bound before the model loads, so that `/control/state` answers from the first moment. Mode 0600 from birth."""
    mask = os.umask(0o177)
    try:
        return await loop.create_unix_server(lambda: Connection(server.handle, server.connections), path, backlog=256)
    except OSError as error:
        log.error("the socket could not be bound: %s", error.strerror)
        return None
    finally:
        os.umask(mask)


def _watch_lifeline(fd: int, life: Life, loop: asyncio.AbstractEventLoop) -> None:
    os.set_blocking(fd, False)

    def look() -> None:
        if not os.read(fd, 64):
            loop.remove_reader(fd)
            life.exit_code = EXIT_OK
            life.ended.set()

    loop.add_reader(fd, look)
