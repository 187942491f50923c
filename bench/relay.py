"""What the way through another machine's relay costs: the same exchanges over a Unix socket, and over TLS and a relay.

Run: ``python -m bench.relay [--requests N] [--streams N]``; kept figures: bench/results/regions.md. Everything is in
one process on uvloop: the gateway's connection pool, the relay behind its door with mutual TLS, and a stand-in for an
engine that answers at once (it computes nothing). CPU is the whole process's, so the difference of the two ways is what
TLS at both ends, the parsing of requests and one more hop cost. Latency is of one request at a time.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from tests.transports.machines import ControlMachine
from tidegate.gateway.upstream import Pool
from tidegate.transports.door import Service
from tidegate.transports.identity import GATEWAY
from tidegate.transports.relay import Relay
from tidegate.transports.tls import RELAY, Dialer

PATH = b"/v1/chat/completions"
BODY = b'{"model":"acme/a","messages":[{"role":"user","content":"%b"}]}' % (b"x" * 600)
ASK = b"POST %b HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
ANSWER = b'{"choices":[{"message":{"content":"%b"}}]}' % (b"y" * 800)
EVENT = b"id: 1\ndata: " + b"z" * 150 + b"\n\n"
EVENTS, AT_ONCE = 100, 16
OPEN: set[asyncio.StreamWriter] = set()


async def stand_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each request with a whole answer, or with a stream if its body begins with ``s``."""
    OPEN.add(writer)
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(size)
            if body[:1] != b"s":
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(ANSWER), ANSWER))
                continue
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(EVENTS):
                writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                await asyncio.sleep(0)
            writer.write(b"0\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
    finally:
        OPEN.discard(writer)


async def exchange(pool: Pool, address: str, body: bytes) -> None:
    connection = pool.take(address) or await pool.connect(address)
    connection.start(ASK % (PATH, len(body)) + body)
    assert await connection.head() == 200
    while await connection.read():
        pass
    connection.release()


async def cpu_ms(count: int, one: Callable[[], Awaitable[None]]) -> float:
    """CPU milliseconds of this process an exchange, `AT_ONCE` at a time."""

    async def some() -> None:
        for _ in range(count // AT_ONCE):
            await one()

    began = time.process_time()
    await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    return (time.process_time() - began) * 1_000 / (count // AT_ONCE * AT_ONCE)


async def latency_ms(count: int, one: Callable[[], Awaitable[None]]) -> float:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await one()
        took.append((time.perf_counter() - began) * 1_000)
    return statistics.median(took)


async def measure(requests: int, streams: int, directory: Path) -> dict[str, Any]:
    path = directory / "engine.sock"
    server = await asyncio.start_unix_server(stand_in, path)
    machine = ControlMachine(directory)
    relay = Relay({"r1": f"unix:{path}"}.get, frozenset([PATH]))
    await machine.open({RELAY: Service(frozenset([GATEWAY]), relay.serve)})
    _, credentials = await machine.joined(GATEWAY, "bench")
    pool = Pool(64, 5_000, Dialer(credentials).relay)
    ways = {"unix": f"unix:{path}", "relay": f"{machine.control}/replica:r1"}
    result: dict[str, Any] = {}
    for way in ("unix", "relay"):
        address = ways[way]
        await cpu_ms(AT_ONCE * 8, lambda address=address: exchange(pool, address, BODY))  # connections are made
        result[way] = {
            "request_cpu_ms": await cpu_ms(requests, lambda address=address: exchange(pool, address, BODY)),
            "stream_cpu_ms": await cpu_ms(streams, lambda address=address: exchange(pool, address, b"s")),
            "request_p50_ms": await latency_ms(300, lambda address=address: exchange(pool, address, BODY)),
        }
    began = time.perf_counter()
    for _ in range(50):
        (await pool.connect(ways["relay"])).abort("measured")
    result["new_connection_ms"] = (time.perf_counter() - began) * 1_000 / 50
    result["ratio"] = {key: result["relay"][key] / result["unix"][key] for key in result["unix"]}
    pool.close()
    while OPEN:  # noqa: ASYNC110 - a moment, at the end
        await asyncio.sleep(0.01)
    await machine.close()
    server.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4_000)
    parser.add_argument("--streams", type=int, default=400)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relay-") as directory:
        result = uvloop.run(measure(given.requests, given.streams, Path(directory)))
    rounded = {
        k: {n: round(x, 4) for n, x in v.items()} if isinstance(v, dict) else round(v, 3) for k, v in result.items()
    }
    print(json.dumps({**rounded, "load_average": round(os.getloadavg()[0], 1)}, indent=2))


if __name__ == "__main__":
    main()
