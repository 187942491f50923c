"""The seam between a line's record and its answer: whatever dies there, the line is billed once.

A real gateway, the runner's own client, a real journal and a real ledger; only the engine and control are stand-ins.
"""

import asyncio
from pathlib import Path

import msgspec

from tests.billing.world import World
from tests.gateway.engine import Exchange, answer
from tests.gateway.rig import Rig, rig, run
from tests.gateway.test_batch_lane import RUNNER, lane, publish
from tests.loop import until
from tests.money import HOUR_MS, NOVEMBER_MS
from tests.stores.test_ledger import EVER
from tidegate.batch.calls import Answered, Gateway
from tidegate.batch.ports import BatchSettings
from tidegate.domain.usage import Outcome, UsageRecord
from tidegate.wire.batch import InputLine, StoredBatch

URL = "/v1/chat/completions"
BATCH = StoredBatch(
    id="batch_1", tenant="acme", key="key-1", url=URL, input_file_id="file-1", completion_window="24h",
    created_ms=NOVEMBER_MS, expires_ms=NOVEMBER_MS + HOUR_MS,
)  # fmt: skip
LINE = InputLine("a", "POST", URL, msgspec.Raw(b'{"model":"chat","messages":[]}'))


def runner(r: Rig) -> Gateway:
    return Gateway(BatchSettings(f"http://127.0.0.1:{r.port}", RUNNER))


async def longer(exchange: Exchange) -> None:
    body = answer(9)
    await exchange.head(kind="application/json", length=len(body))
    await exchange.write(body)


async def billed(directory: Path, records: list[UsageRecord], *, restarted: bool) -> tuple[int, int]:
    """(requests, output tokens) in the ledger; `restarted`: the second record is of the gateway's next life."""
    world = World(directory)
    journal = world.gateway("boot-1")
    for number, record in enumerate(records):
        if number and restarted:
            journal.close()
            journal = world.gateway("boot-2")
        await journal.append(record)
        await world.billing.drain()
    journal.close()
    sums = [one for _, one in world.ledger.sums(0, EVER)]
    return sum(one.requests for one in sums), sum(one.output_tokens for one in sums)


def test_a_line_recorded_but_never_answered_is_asked_again_and_billed_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await publish(r, lane())
            await r.control.route(r.target(), name="acme/chat:batch")
            dying = runner(r)
            r.journal.gate = asyncio.Event()
            asking = asyncio.create_task(dying.ask(BATCH, 7, LINE))
            await until(lambda: r.journal.final, "its record, on the way to the disk")
            asking.cancel()  # as SIGKILL of the runner does: the connection ends, the answer reaches nobody
            await asyncio.wait({asking})
            r.journal.gate.set()
            await until(lambda: r.journal.durable, "the record")
            dying.close()
            again = runner(r)
            r.engine.script.append(longer)
            outcome = await again.ask(BATCH, 7, LINE)
            assert isinstance(outcome, Answered)
            again.close()
            first, second = r.journal.durable
            assert first.id == second.id == "batch_1-7"
            assert (first.outcome, second.outcome) == (Outcome.COMPLETED,) * 2
            assert (first.output_tokens, second.output_tokens) == (3, 9), "sampled anew, it said something else"
            for name in ("same", "restarted"):
                (tmp_path / name).mkdir()
                assert await billed(tmp_path / name, [first, second], restarted=name == "restarted") == (1, 3)

    run(main())
