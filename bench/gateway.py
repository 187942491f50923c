"""What the gateway costs: CPU and added latency, against calling the engine directly in the same run.

The engine is a stand-in that answers at once in the built-in engine's dialect and burns little CPU itself, in a process
of its own; so is the gateway, with its real journal (every record synced to disk). The client is raw asyncio in this
process. Direct and through-the-gateway rounds alternate, so that both see the same machine; figures are medians of
rounds. Run: ``python -m bench.gateway`` (about two minutes), or ``tidegate bench gateway``.
"""

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import psutil
import uvloop

KEY = "tg-bench"
CHUNKS = 64
GAP_MS = 10  # one chunk of every running stream each GAP_MS
RATE = 100
IN_FLIGHT = 32
STREAMS = 100


# --- the stand-in engine ----------------------------------------------------------------------------------------------

_UNARY = json.dumps(
    {
        "id": "c", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    }
).encode()  # fmt: skip
_UNARY_REPLY = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_UNARY) + _UNARY
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-tidegate-prompt-tokens: 9\r\n"
    b"x-tidegate-cached-tokens: 0\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _event(number: int) -> bytes:
    data = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
            "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]}  # fmt: skip
    event = b"id: %d\ndata: %b\n\n" % (number, json.dumps(data, separators=(",", ":")).encode())
    return b"%x\r\n%b\r\n" % (len(event), event)


_EVENTS = [_event(number) for number in range(1, CHUNKS + 1)]
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class StandIn(asyncio.Protocol):
    """Answers at once, or streams `CHUNKS` events, one each tick."""

    running: ClassVar["set[StandIn]"] = set()

    def __init__(self) -> None:
        self._received = b""
        self._next = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or len(body) < int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
            return
        self._received = b""
        if b'"stream":true' not in body:
            self._transport.write(_UNARY_REPLY)
        else:
            self._transport.write(_STREAM_HEAD + _EVENTS[0])
            self._next = 1
            self.running.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.running.discard(self)

    def tick(self) -> None:
        if self._next < CHUNKS:
            self._transport.write(_EVENTS[self._next])
            self._next += 1
        else:
            self._transport.write(_DONE)
            self.running.discard(self)


async def _serve_stand_in(directory: Path) -> None:
    loop = asyncio.get_running_loop()
    private = await loop.create_unix_server(StandIn, str(directory / "engine.sock"))
    server = await loop.create_server(StandIn, "127.0.0.1", 0)
    (directory / "engine.port").write_text(str(server.sockets[0].getsockname()[1]))
    while private.is_serving():
        await asyncio.sleep(GAP_MS / 1000)
        for stream in list(StandIn.running):
            stream.tick()


# --- the gateway ------------------------------------------------------------------------------------------------------


async def _serve_gateway(directory: Path) -> None:
    from tidegate.assemble.sockets import listen_tcp
    from tidegate.domain.endpoint import EndpointState, Mode, ModelKind
    from tidegate.domain.plan import Route, Target
    from tidegate.gateway.app import Gateway
    from tidegate.gateway.server import Server
    from tidegate.stores.journal import SegmentJournal
    from tidegate.transports.local import LocalListener
    from tidegate.wire.internal import Catalog, EndpointEntry, KeyEntry

    class Clock:
        def now_ms(self) -> int:
            return time.time_ns() // 1_000_000

    listener = LocalListener()
    journal = SegmentJournal(directory / "journal", f"g{os.getpid()}")
    gateway = Gateway(gateway="g1", region="local", connect=listener.connect, journal=journal, clock=Clock(),
                      admin_address=f"unix:{directory}/admin.sock")  # fmt: skip
    port = listen_tcp("127.0.0.1", 0)
    serving = asyncio.create_task(Server(gateway).serve(port))
    link = await listener.accept()
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    entry = EndpointEntry("acme/chat", "acme", "m", ModelKind.GENERATIVE, Mode.DEDICATED_SERVERLESS, 1, 4096, 1)
    await link.send(Catalog(1, (KeyEntry(digest, "k", "acme"),), (entry,)))
    target = Target("r0", f"unix:{directory}/engine.sock", 1_000)
    await link.send(Route("acme/chat", 1, EndpointState.READY, (target,)))
    (directory / "gateway.port").write_text(str(port.getsockname()[1]))
    try:
        while True:
            await link.receive()
    finally:
        serving.cancel()


# --- the client -------------------------------------------------------------------------------------------------------


def _request(stream: bool) -> bytes:
    body = {"model": "acme/chat", "messages": [{"role": "user", "content": "What is the tide?"}], "max_tokens": CHUNKS}
    data = json.dumps({**body, "stream": True} if stream else body, separators=(",", ":")).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
    return f"{head}content-length: {len(data)}\r\n\r\n".encode() + data


class Asker(asyncio.Protocol):
    """One connection, one request at a time; knows when the first event and the end came, and nothing else."""

    def __init__(self) -> None:
        self._done: asyncio.Future[None] | None = None
        self._head_left = b""
        self._left = -1
        self.first_s = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def ask(self, request: bytes) -> tuple[float, float]:
        """(seconds to the first byte of the body, seconds to the end)."""
        self._done = asyncio.get_running_loop().create_future()
        self._left, self.first_s, self._head_left = -1, 0.0, b""
        began = time.perf_counter()
        self._transport.write(request)
        await self._done
        return self.first_s - began, time.perf_counter() - began

    def data_received(self, data: bytes) -> None:
        if self._left == -1:
            head, separator, data = (self._head_left + data).partition(b"\r\n\r\n")
            if not separator:
                self._head_left = head
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = head.lower().partition(b"content-length: ")[2]
            self._left = int(length.split(b"\r\n")[0]) if length else -2
        if data and not self.first_s:
            self.first_s = time.perf_counter()
        if self._left >= 0:
            self._left -= len(data)
        if (self._left == 0 or (self._left == -2 and data.endswith(b"0\r\n\r\n"))) and self._done is not None:
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the connection was closed"))


@dataclass
class Askers:
    port: int
    idle: list[Asker] = field(default_factory=list)

    async def ask(self, request: bytes) -> tuple[float, float]:
        if self.idle:
            asker = self.idle.pop()
        else:
            _, asker = await asyncio.get_running_loop().create_connection(Asker, "127.0.0.1", self.port)
        times = await asker.ask(request)
        self.idle.append(asker)
        return times


async def _closed_loop(askers: Askers, request: bytes, in_flight: int, count: int) -> list[tuple[float, float]]:
    left = iter(range(count))

    async def worker() -> list[tuple[float, float]]:
        return [await askers.ask(request) for _ in left]

    return [times for part in await asyncio.gather(*(worker() for _ in range(in_flight))) for times in part]


async def _open_loop(askers: Askers, request: bytes, seconds: float) -> list[tuple[float, float]]:
    began, tasks = time.perf_counter(), []
    for number in range(int(RATE * seconds)):
        await asyncio.sleep(max(0.0, began + number / RATE - time.perf_counter()))
        tasks.append(asyncio.create_task(askers.ask(request)))
    return list(await asyncio.gather(*tasks))


def _sync_ms(directory: Path) -> float:
    """Median of writing one record's worth to this disk durably: what no gateway with durable records can go below."""
    times = []
    with (directory / "sync").open("wb", buffering=0) as file:
        for _ in range(100):
            began = time.perf_counter()
            file.write(b"x" * 512)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


# --- the run ----------------------------------------------------------------------------------------------------------


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _cpu_of(process: psutil.Process, work: Callable[[], Awaitable[list[Any]]]) -> float:
    """CPU milliseconds of `process` for each item of `work`."""
    before = _cpu_s(process)
    done = await work()
    return (_cpu_s(process) - before) * 1000 / len(done)


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


async def _measure(
    engine: psutil.Process, gateway: psutil.Process, direct: Askers, through: Askers, rounds: int
) -> dict[str, Any]:
    unary, stream = _request(False), _request(True)
    cells: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        cells.setdefault(name, []).append(value)

    for askers in (direct, through):  # warm: connections, code paths, journal segment
        await _closed_loop(askers, unary, IN_FLIGHT, 1_000)
        await _closed_loop(askers, stream, STREAMS, STREAMS)
    for _ in range(rounds):
        note("engine_unary_cpu_ms", await _cpu_of(engine, lambda: _closed_loop(direct, unary, IN_FLIGHT, 6_000)))
        note("gateway_unary_cpu_ms", await _cpu_of(gateway, lambda: _closed_loop(through, unary, IN_FLIGHT, 6_000)))
        note("engine_stream_cpu_ms", await _cpu_of(engine, lambda: _closed_loop(direct, stream, STREAMS, 500)))
        note("gateway_stream_cpu_ms", await _cpu_of(gateway, lambda: _closed_loop(through, stream, STREAMS, 500)))
        for name, request in (("unary", unary), ("stream", stream)):
            for side, askers in (("direct", direct), ("gateway", through)):
                before = _cpu_s(gateway)
                times = await _open_loop(askers, request, 3)
                values = [first if name == "stream" else total for first, total in times]
                note(f"{side}_{name}_p50_ms", _percentile(values, 50) * 1000)
                note(f"{side}_{name}_p99_ms", _percentile(values, 99) * 1000)
                if side == "gateway":
                    note(f"gateway_{name}_cpu_ms_at_{RATE}_per_s", (_cpu_s(gateway) - before) * 1000 / len(times))
    figures = {name: round(statistics.median(values), 4) for name, values in cells.items()}
    figures["gateway_rss_mib"] = round(gateway.memory_info().rss / (1 << 20), 1)
    return figures


def _derived(figures: dict[str, Any]) -> dict[str, Any]:
    added = {
        f"added_{name}_{p}_ms": round(figures[f"gateway_{name}_{p}_ms"] - figures[f"direct_{name}_{p}_ms"], 3)
        for name in ("unary", "stream")
        for p in ("p50", "p99")
    }
    return {
        **figures,
        **added,
        "unary_cpu_ratio_to_engine": round(figures["gateway_unary_cpu_ms"] / figures["engine_unary_cpu_ms"], 2),
        "stream_cpu_ratio_to_engine": round(figures["gateway_stream_cpu_ms"] / figures["engine_stream_cpu_ms"], 2),
        "cpu_s_per_1000_requests": figures["gateway_unary_cpu_ms"],
        "cpu_s_per_1000_streams": figures["gateway_stream_cpu_ms"],
        "baseline": "the stand-in engine called directly, alternating with the gateway in the same run",
    }


def _start(role: str, directory: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "bench.gateway", role, str(directory)], cwd=Path(__file__).parent.parent
    )


async def _port(directory: Path, name: str, process: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + 30
    while not (file := directory / f"{name}.port").exists() or not file.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the {name} did not start")
        await asyncio.sleep(0.02)
    return int(file.read_text())


async def _run(rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        processes = [_start("stand-in", directory), _start("serve", directory)]
        try:
            direct = Askers(await _port(directory, "engine", processes[0]))
            through = Askers(await _port(directory, "gateway", processes[1]))
            engine, gateway = (psutil.Process(process.pid) for process in processes)
            figures = await _measure(engine, gateway, direct, through, rounds)
            return _derived({**figures, "disk_sync_p50_ms": round(_sync_ms(directory), 3)})
        finally:
            for process in processes:
                process.kill()
                process.wait()


def run(rounds: int = 3) -> dict[str, Any]:
    """Milliseconds unless a name says otherwise. `*_stream_p*` is time to the first byte, `*_unary_p*` to the last."""
    load = round(os.getloadavg()[0], 1)
    return {"cpus": os.cpu_count(), "load_average_at_start": load, "rounds": rounds, **uvloop.run(_run(rounds))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", nargs="?", choices=["stand-in", "serve"])
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.role:
        uvloop.run({"stand-in": _serve_stand_in, "serve": _serve_gateway}[arguments.role](arguments.directory))
    else:
        print(json.dumps(run(arguments.rounds), indent=2))


if __name__ == "__main__":
    main()
