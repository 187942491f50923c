"""Usage events against a real collector on loopback that fails in every way: each arrives, in order, and none twice."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.billing.world import World
from tests.loop import on_loop
from tests.money import usage
from tidegate.billing import delivery
from tidegate.billing.delivery import Answer, Collector, Delivery, Shape, judge
from tidegate.domain.errors import StoreFault
from tidegate.domain.usage import Outcome
from tidegate.stores import dead_letters
from tidegate.stores.dead_letters import DeadLetterFiles

OK = (200, {}, b"{}")


class Server:
    """An HTTP collector: answers what `script` says next (200 when it is empty), refuses `poison` ids."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.script: deque[tuple[int, dict[str, str], bytes] | str] = deque()
        self.poison: set[str] = set()
        self.taken: list[str] = []
        self.requests = 0
        self.headers: dict[str, str] = {}

    def ids(self, body: bytes) -> list[str]:
        found = json.loads(body)
        if self.shape is Shape.LAGO:
            return [event["transaction_id"] for event in found["events"]]
        return [event["id"] for event in found]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
                self.headers = {name.lower(): value for name, value in fields.items()}
                body = await reader.readexactly(int(self.headers["content-length"]))
                self.requests += 1
                said = self.script.popleft() if self.script else OK
                if said == "hang":
                    await asyncio.sleep(60)
                if said == "cut":
                    return
                if said == "garbage":
                    writer.write(b"\x00\x01 not http\r\n\r\n")
                    return
                if said == "taken, then cut":
                    self._take(body)
                    return
                assert not isinstance(said, str)
                status, extra, answer = said
                if status == 200 and self.poison & set(self.ids(body)):
                    status, answer = 422, b'{"code":"validation_errors"}'
                if status == 200:
                    self._take(body)
                lines = [f"HTTP/1.1 {status} x", f"content-length: {len(answer)}"]
                lines += [f"{name}: {value}" for name, value in extra.items()]
                writer.write("\r\n".join([*lines, "", ""]).encode() + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client hung up
        finally:
            writer.close()

    def _take(self, body: bytes) -> None:
        """What a collector does: an id it has is dropped."""
        self.taken += [one for one in self.ids(body) if one not in self.taken]


class Rig:
    def __init__(self, world: World, server: Server, url: str, directory: Path) -> None:
        self.world, self.server = world, server
        self.collector = Collector("meter", url, server.shape, "s3cret-token")
        self.directory = directory
        self.slept: list[float] = []

    def delivery(self) -> Delivery:
        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            await asyncio.sleep(0)

        files = DeadLetterFiles(self.directory)
        return Delivery(self.collector, self.world.ledger, files, self.world.billing.metrics, sleep)

    async def until(self, done: Callable[[], bool]) -> None:
        running = asyncio.create_task(self.delivery().run())
        try:
            async with asyncio.timeout(20):
                while not done():  # noqa: ASYNC110  the collector is on a socket, it has no event to wait for
                    await asyncio.sleep(0.005)
        finally:
            running.cancel()
            await asyncio.wait({running})

    def dead(self) -> list[str]:
        path = self.directory / "meter.jsonl"
        if not path.exists():
            return []
        events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
        return [event.get("id") or event["transaction_id"] for event in events]


@asynccontextmanager
async def rig(tmp_path: Path, records: int, shape: Shape = Shape.CLOUDEVENTS) -> AsyncIterator[Rig]:
    world, collector = World(tmp_path), Server(shape)
    await world.write(
        *(usage(f"r{n:03d}") for n in range(records)), usage("refused", outcome=Outcome.REFUSED)
    )  # fmt: skip
    await world.billing.drain()
    server = await asyncio.start_server(collector.handle, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield Rig(world, collector, f"http://{host}:{port}/api/v1/events", tmp_path / "dead-letters")
    finally:
        server.close()


def _all(records: int) -> list[str]:
    return [f"r{n:03d}" for n in range(records)]


@pytest.mark.parametrize("shape", list(Shape))
@on_loop
async def test_every_event_arrives_once_in_order(tmp_path: Path, shape: Shape) -> None:
    async with rig(tmp_path, 230, shape) as it:
        await it.until(lambda: len(it.server.taken) == 230)
        assert it.server.taken == _all(230)
        assert it.server.requests == 3, "a hundred at a time"
        assert it.server.headers["authorization"] == "Bearer s3cret-token"
        expected = {Shape.LAGO: "application/json", Shape.CLOUDEVENTS: "application/cloudevents-batch+json"}
        assert it.server.headers["content-type"] == expected[shape]
        assert "s3cret" not in repr(it.collector)


@on_loop
async def test_whatever_fails_is_tried_again_until_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "ANSWER_MS_MAX", 200)
    monkeypatch.setattr(delivery, "IDLE_MS", 50)
    async with rig(tmp_path, 150) as it:
        it.server.script.extend(
            ["cut", (500, {}, b""), "garbage", (429, {"retry-after": "7"}, b""), "hang", (401, {}, b""), (404, {}, b""),
             (302, {"location": "/elsewhere"}, b""), (503, {}, b"x" * 100_000), "taken, then cut", OK, (502, {}, b"")]
        )  # fmt: skip
        await it.until(lambda: len(it.server.taken) == 150 and not it.server.script)
        assert it.server.taken == _all(150)
        assert it.dead() == []
        assert 7.0 in it.slept, "what the collector asked for"
        waits = [seconds for seconds in it.slept if seconds not in (7.0, 0.05)]
        assert waits[:4] == [0.5, 1.0, 2.0, 8.0], "growing; the fourth was the collector's own"
        retried = it.world.metric('tidegate_usage_events_total{collector="meter",outcome="retried"}')
        assert retried
        assert retried >= 1_000


@on_loop
async def test_an_event_that_is_never_taken_is_set_aside_alone(tmp_path: Path) -> None:
    async with rig(tmp_path, 60) as it:
        it.server.poison = {"r007", "r008", "r059"}
        await it.until(lambda: it.world.ledger.delivered("meter") >= 60)
        assert it.dead() == ["r007", "r008", "r059"]
        assert it.server.taken == [one for one in _all(60) if one not in it.server.poison]
        assert it.world.metric('tidegate_usage_events_total{collector="meter",outcome="dead"}') == 3


@on_loop
async def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    async with rig(tmp_path, 250) as it:
        it.server.script.extend([OK, (503, {}, b"")])
        await it.until(lambda: it.server.requests == 2)
        assert it.server.taken == _all(100)
        it.server.requests = 0
        await it.until(lambda: len(it.server.taken) == 250)
        assert it.server.requests == 2, "the first hundred is not sent again"
        assert it.server.taken == _all(250)


@on_loop
async def test_what_was_taken_but_not_acknowledged_is_sent_again_under_its_id(tmp_path: Path) -> None:
    async with rig(tmp_path, 3) as it:
        it.server.script.extend(["taken, then cut", (409, {}, b"")])
        await it.until(lambda: it.world.ledger.delivered("meter") == 3)
        assert (it.server.taken, it.server.requests) == (_all(3), 2)


@on_loop
async def test_a_full_dead_letter_file_stops_delivery_rather_than_lose_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "FILE_BYTES_MAX", 100)
    async with rig(tmp_path, 2) as it:
        it.server.poison = {"r000"}
        async with httpx.AsyncClient() as client:
            with pytest.raises(StoreFault, match="look at them first"):
                await it.delivery().turn(client)
        assert it.world.ledger.delivered("meter") == 0


@pytest.mark.parametrize(
    ("status", "body", "alone", "expected"),
    [
        (200, b"", False, Answer.TAKEN),
        (204, b"", False, Answer.TAKEN),
        (409, b"", False, Answer.TAKEN),
        (422, b'{"error_details":{"transaction_id":["value_already_exist"]}}', True, Answer.TAKEN),
        (422, b'{"error_details":{"0":{"transaction_id":["value_already_exist"]}}}', False, Answer.REFUSED),
        (400, b"", True, Answer.REFUSED),
        (413, b"", False, Answer.REFUSED),
        (401, b"", True, Answer.LATER),
        (301, b"", True, Answer.LATER),
        (500, b"", True, Answer.LATER),
    ],
)
def test_what_an_answer_means(status: int, body: bytes, alone: bool, expected: Answer) -> None:
    assert judge(status, "", body, alone=alone).answer is expected
    assert judge(429, "9" * 12, body, alone=alone).pause_ms == 0
