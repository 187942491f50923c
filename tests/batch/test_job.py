"""One batch against a scripted gateway: what fails, what is tried again, what a crash at any point leaves behind."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.loop import until
from tidegate.batch import job as job_module
from tidegate.batch.calls import Answered, Broken, NotNow, Outcome
from tidegate.batch.job import BROKEN_MAX, Job
from tidegate.batch.ports import BatchSettings, Model, Offer, Webhook
from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import StoreFault
from tidegate.stores.batches import SqlBatchStore
from tidegate.stores.database import migrate, open_database
from tidegate.stores.vault import Keyring, Vault
from tidegate.wire.batch import InputLine, Notice, Status, StoredBatch, StoredFile

URL = "/v1/chat/completions"
DAY_MS = 86_400_000
OK = json.dumps({"usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}})


class Clock:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def now_ms(self) -> int:
        return self.ms


class OneModel:
    """Implements `batch.ports.Fleet`: one replica of two slots."""

    def model(self, tenant: str, name: str) -> Model:
        return Model("acme/chat", ModelKind.GENERATIVE)

    def offer(self, endpoint: str) -> Offer:
        return Offer(1, 2, 1)

    def cost_nano_usd(self, batch: StoredBatch) -> int | None:
        return None

    async def work(self, wanted: Mapping[str, bool]) -> None:
        """Nobody to tell."""


Script = Callable[[int, int], Outcome]


class Asked:
    """In place of the gateway: answers as `script(number, try)` says, after a turn of the loop."""

    def __init__(self, script: Script) -> None:
        self.tries: Counter[int] = Counter()
        self.most = self.under_way = 0
        self.gate: asyncio.Event | None = None
        self._script = script

    async def ask(self, batch: StoredBatch, number: int, line: InputLine) -> Outcome:
        self.tries[number] += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(0)
            if self.gate is not None:
                await self.gate.wait()
            return self._script(number, self.tries[number])
        finally:
            self.under_way -= 1


def good(number: int, attempt: int) -> Outcome:
    return Answered(200, f"req-{number}", OK.encode())


class World:
    """A database and a vault on disk, one uploaded file, and a batch over it."""

    def __init__(self, folder: Path, lines: int) -> None:
        self.engine: Engine = open_database(f"sqlite:///{folder / 'db'}")
        migrate(self.engine)
        self.store = SqlBatchStore(self.engine)
        self.vault = Vault(folder / "vault", Keyring([b"k" * 32]))
        self.clock = Clock()
        self.webhooks: dict[str, Webhook] = {}
        writer = self.vault.create("file-in")
        for number in range(lines):
            body = {"model": "chat", "messages": []}
            line = {"custom_id": f"id-{number}", "method": "POST", "url": URL, "body": body}
            writer.append(json.dumps(line).encode() + b"\n")
        writer.finish()
        file = StoredFile(id="file-in", tenant="acme", purpose="batch", filename="x.jsonl", bytes=1, created_ms=1)
        self.store.add_file(file)
        batch = StoredBatch(
            id="batch_1",
            tenant="acme",
            key="key",
            url=URL,
            input_file_id="file-in",
            completion_window="24h",
            created_ms=self.clock.ms,
            expires_ms=self.clock.ms + DAY_MS,
        )
        self.store.add_batch(batch)

    def job(self, asked: Asked, vault: Any = None) -> Job:
        batch = self.store.batch("acme", "batch_1")
        assert batch is not None
        turns: dict[str, asyncio.Lock] = {}
        return Job(
            batch,
            store=self.store,
            vault=vault or self.vault,
            fleet=OneModel(),
            gateway=asked,  # type: ignore[arg-type]
            clock=self.clock,
            settings=BatchSettings("", "", webhooks=self.webhooks),
            turn=lambda endpoint: turns.setdefault(endpoint, asyncio.Lock()),
        )

    def found(self, what: str) -> list[dict[str, Any]]:
        batch = self.store.batch("acme", "batch_1")
        file_id = getattr(batch, f"{what}_file_id")
        if file_id is None:
            return []
        return [json.loads(line) for line in b"".join(self.vault.open(file_id).frames()).splitlines()]

    def ids(self) -> list[str]:
        """Every custom_id of either file."""
        return sorted(line["custom_id"] for what in ("output", "error") for line in self.found(what))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Lines as small as these would all lie in one frame of an upload; here each has its own, found by its number."""
    monkeypatch.setattr(job_module, "LOOK_S", 0.01)
    monkeypatch.setattr(job_module, "SAVE_S", 0.02)
    monkeypatch.setattr(job_module, "SETTLE_S_MAX", 0.1)
    monkeypatch.setattr(job_module.lines, "read", read_by_number)
    return World(tmp_path, 30)


def read_by_number(reader: Any, line: Any) -> InputLine:
    return job_module.lines._line(reader.frame(line.number - 1))


def test_answers_and_refusals_each_in_their_file(world: World) -> None:
    def script(number: int, attempt: int) -> Outcome:
        if number == 3:
            return Answered(400, "req-3", b'{\n"error": {"code": "context_length_exceeded"}\n}')
        return NotNow(0.0) if attempt == 1 and number % 5 == 0 else good(number, attempt)

    asked = Asked(script)
    job = world.job(asked)
    asyncio.run(job.run())
    batch = job.batch
    assert (batch.status, batch.total, batch.completed, batch.failed) == (Status.COMPLETED, 30, 29, 1)
    assert (batch.input_tokens, batch.cached_tokens, batch.output_tokens) == (29 * 5, 29, 29 * 2)
    assert world.ids() == sorted(f"id-{n}" for n in range(30))
    assert world.found("error")[0]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert asked.most <= 2, "never more than one replica of two slots takes"
    assert asked.tries[5] == 2


def test_a_line_on_which_engines_keep_failing_is_given_up(world: World) -> None:
    poison = Broken(Answered(502, "req", b'{"error": {"code": "engine_error"}}'))
    asked = Asked(lambda number, attempt: poison if number == 7 else good(number, attempt))
    job = world.job(asked)
    asyncio.run(job.run())
    assert (job.batch.status, job.batch.failed) == (Status.COMPLETED, 1)
    assert asked.tries[7] == BROKEN_MAX
    assert [line["custom_id"] for line in world.found("error")] == ["id-6"]


def test_what_is_not_done_when_the_window_closes_is_said_so(world: World) -> None:
    asked = Asked(lambda number, attempt: good(number, attempt) if sum(asked.tries.values()) <= 10 else NotNow(0.01))

    async def main() -> Job:
        job = world.job(asked)
        running = asyncio.create_task(job.run())
        await until(lambda: job.batch.completed >= 9)
        job._halt.set()  # what the end of the window does; 24 hours cannot be waited for
        world.clock.ms += DAY_MS
        await running
        return job

    job = asyncio.run(main())
    assert (job.batch.status, job.batch.completed + job.batch.failed) == (Status.EXPIRED, 30)
    assert 9 <= len(world.found("output")) == job.batch.completed < 30
    assert {line["error"]["code"] for line in world.found("error")} == {"batch_expired"}
    assert world.ids() == sorted(f"id-{n}" for n in range(30))


def test_killed_anywhere_every_line_is_there_once(world: World) -> None:
    """The task is cancelled after ever more lines, as a SIGKILL would; what was not synced is lost with it."""
    sent: Counter[int] = Counter()
    for lines_until_death in (1, 4, 9, 17, 1_000):
        asked = Asked(good)

        async def main(asked: Asked = asked, lines_until_death: int = lines_until_death) -> None:
            job = world.job(asked)
            running = asyncio.create_task(job.run())
            await until(lambda: running.done() or sum(asked.tries.values()) >= lines_until_death)
            if not running.done() and lines_until_death < 1_000:
                running.cancel()
            await asyncio.wait({running})

        asyncio.run(main())
        sent += asked.tries
    batch = world.store.batch("acme", "batch_1")
    assert batch is not None
    assert (batch.status, batch.completed) == (Status.COMPLETED, 30)
    assert world.ids() == sorted(f"id-{n}" for n in range(30))
    assert set(sent) == set(range(1, 31))


class DiesOnce:
    """A vault whose disk fails once, at the end of the output file."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self.left = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vault, name)

    def remove(self, name: str) -> None:
        if self.left:
            self.left -= 1
            raise StoreFault("disk full")
        self._vault.remove(name)


def test_a_disk_that_fails_while_finalizing_loses_nothing(world: World) -> None:
    async def main() -> Job:
        vault = DiesOnce(world.vault)
        with pytest.raises(StoreFault):
            await world.job(Asked(good), vault).run()
        batch = world.store.batch("acme", "batch_1")
        assert batch is not None
        assert batch.status is Status.FINALIZING
        asked = Asked(good)
        job = world.job(asked, vault)
        await job.run()
        assert not asked.tries, "nothing is asked twice"
        return job

    job = asyncio.run(main())
    assert (job.batch.status, job.batch.completed, job.batch.error_file_id) == (Status.COMPLETED, 30, None)
    assert world.ids() == sorted(f"id-{n}" for n in range(30))


def test_cancelling_lets_what_is_under_way_end(world: World) -> None:
    asked = Asked(good)

    async def main() -> Job:
        asked.gate = asyncio.Event()
        job = world.job(asked)
        running = asyncio.create_task(job.run())
        await until(lambda: bool(asked.under_way))
        under_way = asked.under_way
        assert (await job.cancel()).status is Status.CANCELLING
        assert (await job.cancel()).status is Status.CANCELLING
        asked.gate.set()
        await running
        assert job.batch.completed == under_way
        return job

    job = asyncio.run(main())
    assert job.batch.status is Status.CANCELLED
    assert world.ids() == sorted(f"id-{n}" for n in range(30))


def test_a_webhook_is_owed_where_one_is_configured(world: World) -> None:
    world.webhooks["acme"] = Webhook("http://127.0.0.1:1", "whsec_" + "A" * 24)
    job = world.job(Asked(good))
    asyncio.run(job.run())
    assert job.batch.notice is Notice.OWED
    assert [batch.id for batch in world.store.open_batches()] == ["batch_1"], "a restart delivers it"
    asyncio.run(job.noticed(Notice.DELIVERED))
    assert world.store.open_batches() == []


def test_late_is_by_its_own_pace_or_when_little_of_the_window_is_left(world: World) -> None:
    job = world.job(Asked(good))
    job._started_ms = world.clock.ms

    class Done:
        completed, failed = 10, 0

    world.clock.ms += 3_600_000
    assert not job._is_late(Done(), 100)  # type: ignore[arg-type]
    assert job._is_late(Done(), 300)  # type: ignore[arg-type]  # 30 hours at this pace
    world.clock.ms = job.batch.expires_ms - DAY_MS // 20
    assert job._is_late(Done(), 1)  # type: ignore[arg-type]
