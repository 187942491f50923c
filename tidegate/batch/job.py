"""One batch, from validation to its files: the only writer of its state.

validating → (failed | in_progress → finalizing → completed | expired | cancelled). Whatever is killed in between, the
next start takes it up again: what is durable is kept, everything else is done again and billed once.
"""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from tidegate.batch import lines
from tidegate.batch.calls import Answered, Broken, Gateway, NotNow
from tidegate.batch.lines import Line
from tidegate.batch.ports import BatchSettings, BatchStore, Fleet, Reader, Vault
from tidegate.batch.results import Results, answered, unanswered
from tidegate.domain.errors import Refusal
from tidegate.domain.ports import Clock
from tidegate.quota import admission
from tidegate.wire.batch import LineError, Notice, Status, StoredBatch, StoredFile

CANCELLABLE = (Status.VALIDATING, Status.IN_PROGRESS)
BROKEN_MAX = 8
SETTLE_S_MAX = 10.0
SAVE_S = 1.0
LEFT_LINES = 500  # that were not done, told at a time
LOOK_S = 0.25
RUSH_SHARE = 0.1  # of the window: from then on nobody can know that what is left still fits

log = logging.getLogger(__name__)


def produced_id(batch_id: str, what: str) -> str:
    """The id of a batch's output or error file: known before there is one, so that a restart finds it."""
    return "file-" + hashlib.sha256(f"{batch_id}/{what}".encode()).hexdigest()[:24]


class Job:
    """`turn` is held while lines are sent: batches on one endpoint are done one after the other."""

    def __init__(
        self,
        batch: StoredBatch,
        *,
        store: BatchStore,
        vault: Vault,
        fleet: Fleet,
        gateway: Gateway,
        clock: Clock,
        settings: BatchSettings,
        turn: Callable[[str], asyncio.Lock],
        count: Callable[[str, str], None] = lambda endpoint, outcome: None,
    ) -> None:
        self.batch = batch
        self.sending = False
        self.rush = False
        self._store = store
        self._vault = vault
        self._fleet = fleet
        self._gateway = gateway
        self._clock = clock
        self._settings = settings
        self._turn = turn
        self._count = count
        self._saving = asyncio.Lock()
        self._halt = asyncio.Event()
        self._started_ms = 0
        self._done_before = 0
        self._in_flight = 0
        self._broken: dict[int, int] = {}

    async def cancel(self) -> StoredBatch:
        """Takes no new line from now on. Refusal conflict when the batch has ended."""
        now_ms = self._clock.now_ms()
        await self._save(only_from=CANCELLABLE, status=Status.CANCELLING, cancelling_ms=now_ms)
        if self.batch.status is not Status.CANCELLING:
            raise Refusal("conflict", f"Cannot cancel a batch with status '{self.batch.status}'.", param="id")
        self._halt.set()
        return self.batch

    async def noticed(self, notice: Notice) -> None:
        """Its webhook was delivered, or given up."""
        await self._save(notice=notice)

    async def run(self) -> None:
        """Until the batch has ended. StoreFault: run it again later, nothing durable is lost."""
        if not self.batch.status.open:
            return
        batch = self.batch
        if await asyncio.to_thread(self._store.file, batch.tenant, batch.input_file_id) is None:
            message = f"No such File object: {batch.input_file_id}"
            await self._fail([LineError(code="not_found", message=message, param="input_file_id")])
            return
        reader = await asyncio.to_thread(self._vault.open, batch.input_file_id)
        try:
            checked = await asyncio.to_thread(self._check, reader)
            if checked.errors:
                await self._fail(checked.errors)
            else:
                await self._carry_out(reader, checked)
        finally:
            reader.close()

    # --- validation -----------------------------------------------------------------------------------------------

    def _check(self, reader: Reader) -> lines.Checked:
        batch = self.batch
        if batch.status is not Status.VALIDATING and batch.model:  # passed once: an endpoint may be gone by now
            return lines.check(reader, batch.url, self._settings.line_bytes_max, lambda _: batch.model)
        api = batch.url.removeprefix("/v1/")

        def resolve(name: str) -> str:
            model = self._fleet.model(batch.tenant, name)
            admission.check_kind(api, model.kind, name)
            return model.endpoint

        return lines.check(reader, batch.url, self._settings.line_bytes_max, resolve)

    async def _fail(self, errors: list[LineError]) -> None:
        status = Status.CANCELLED if self.batch.status is Status.CANCELLING else Status.FAILED
        await self._save(status=status, errors=tuple(errors), ended_ms=self._clock.now_ms(), notice=self._notice())

    # --- work -----------------------------------------------------------------------------------------------------

    async def _carry_out(self, reader: Reader, checked: lines.Checked) -> None:
        batch, now_ms = self.batch, self._clock.now_ms()
        await self._save(only_from=(Status.VALIDATING,), status=Status.IN_PROGRESS, in_progress_ms=now_ms)
        await self._save(total=len(checked.order), model=checked.model)
        if self.batch.status is Status.CANCELLING:
            self._halt.set()
        results = Results(self._vault, produced_id(batch.id, "output"), produced_id(batch.id, "error"))
        done: set[int] = set()
        flushing: asyncio.Task[None] | None = None
        try:
            await asyncio.to_thread(results.open, lambda custom_id: done.add(checked.numbers[custom_id]))
            checked.numbers.clear()
            self._done_before = len(done)
            pending = deque(line for line in checked.order if line.number not in done)
            flushing = asyncio.create_task(results.run())
            await self._send_all(reader, results, pending, flushing)
            await self._finalize(reader, results, pending)
        finally:
            self.sending = False
            if flushing is not None:
                flushing.cancel()
                await asyncio.wait({flushing})
            await asyncio.to_thread(results.close)

    async def _send_all(
        self, reader: Reader, results: Results, pending: deque[Line], flushing: asyncio.Task[None]
    ) -> None:
        """Until every line has ended, or the batch is cancelled or its window over; then what is under way may end
        within `SETTLE_S_MAX`.
        """
        if not pending or self._halt.is_set() or self.batch.status is Status.FINALIZING:
            return
        working = asyncio.create_task(self._in_turn(reader, results, pending))
        halting = asyncio.create_task(self._halt.wait())
        watching = asyncio.create_task(self._watch(results, pending))
        tasks = {working, halting, watching, flushing}
        try:
            left_s = max(0.0, (self.batch.expires_ms - self._clock.now_ms()) / 1000)
            done, _ = await asyncio.wait(tasks, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {working, halting}:
                task.result()  # it never ends by itself but by what went wrong
            self._halt.set()
            if not working.done() and self._in_flight:
                await asyncio.wait({working}, timeout=SETTLE_S_MAX)
        finally:
            for task in (working, halting, watching):
                task.cancel()
            await asyncio.wait({working, halting, watching})
        if not working.cancelled():
            working.result()

    async def _in_turn(self, reader: Reader, results: Results, pending: deque[Line]) -> None:
        async with self._turn(self.batch.model):
            self._started_ms = self._clock.now_ms()
            self.sending = True
            workers: set[asyncio.Task[None]] = set()
            try:
                while (pending or self._in_flight) and not (self._halt.is_set() and not self._in_flight):
                    while pending and not self._halt.is_set() and len(workers) < self._window():
                        worker = asyncio.create_task(self._worker(reader, results, pending, workers))
                        workers.add(worker)
                    ended, workers_left = await asyncio.wait(
                        workers, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED
                    )
                    workers &= workers_left
                    for worker in ended:
                        worker.result()
            finally:
                self.sending = False
                for worker in workers:
                    worker.cancel()
                if workers:
                    await asyncio.wait(workers)

    def _window(self) -> int:
        """Requests in the gateway at once: what the replicas there are take, and enough to ask for one more."""
        offer = self._fleet.offer(self.batch.model)
        wanted = offer.slots * min(offer.ready + 1, max(offer.replicas_max, 1))
        return max(1, min(wanted, self._settings.in_flight_max))

    async def _worker(
        self, reader: Reader, results: Results, pending: deque[Line], workers: "set[asyncio.Task[None]]"
    ) -> None:
        """Line after line; ends when there are more workers than the window has room for."""
        while pending and not self._halt.is_set() and len(workers) <= self._window():
            line = pending.popleft()
            self._in_flight += 1
            try:
                pause_s = await self._one(reader, results, line)
            except BaseException:
                pending.appendleft(line)
                raise
            finally:
                self._in_flight -= 1
            await results.room()
            if pause_s is not None:
                pending.append(line)  # behind all others: what one line cannot have now, another may
                await asyncio.sleep(pause_s)

    async def _one(self, reader: Reader, results: Results, line: Line) -> float | None:
        """Sends one line. None when it has ended, else the pause before the next try."""
        batch = self.batch
        asked = lines.read(reader, line)
        outcome = await self._gateway.ask(batch, line.number, asked)
        match outcome:
            case NotNow(pause_s):
                self._count(batch.model, "not_now")
                return pause_s
            case Broken(answer):
                self._count(batch.model, "broken")
                self._broken[line.number] = self._broken.get(line.number, 0) + 1
                if self._broken[line.number] < BROKEN_MAX:
                    return LOOK_S * self._broken[line.number]
                outcome = answer
        assert isinstance(outcome, Answered)
        if outcome.status == 404 and self._is_there():
            return LOOK_S  # its lane for batch lines went away and comes back
        line_id = _line_id(batch.id, line.number)
        one = answered(line_id, asked.custom_id, outcome.status, outcome.request_id, outcome.body)
        results.add(one, ok=outcome.ok)
        self._count(batch.model, "answered" if outcome.ok else "refused")
        return None

    def _is_there(self) -> bool:
        try:
            self._fleet.model(self.batch.tenant, self.batch.model)
        except Refusal:
            return False
        return True

    async def _watch(self, results: Results, pending: deque[Line]) -> None:
        """Writes the counts down now and then, and sees whether the window is closing."""
        while True:
            await asyncio.sleep(SAVE_S)
            self.rush = self._settings.may_rush and self._is_late(results, len(pending))
            if (results.completed, results.failed) != (self.batch.completed, self.batch.failed):
                await self._save(**_counts(results))

    def _is_late(self, results: Results, lines_left: int) -> bool:
        now_ms, batch = self._clock.now_ms(), self.batch
        left_ms = batch.expires_ms - now_ms
        if left_ms < RUSH_SHARE * (batch.expires_ms - batch.created_ms):
            return True
        done = results.completed + results.failed - self._done_before
        return done > 0 and lines_left * (now_ms - self._started_ms) / done > left_ms

    # --- the end --------------------------------------------------------------------------------------------------

    async def _finalize(self, reader: Reader, results: Results, pending: deque[Line]) -> None:
        await results.flush()
        cancelled = self.batch.status is Status.CANCELLING
        if pending:
            code, message = (
                ("batch_cancelled", "This request was not executed: the batch was cancelled.")
                if cancelled
                else ("batch_expired", "This request could not be executed before the completion window expired.")
            )
            left = list(pending)
            for first in range(0, len(left), LEFT_LINES):
                some = left[first : first + LEFT_LINES]
                names = await asyncio.to_thread(_names, reader, some)
                for line, custom_id in zip(some, names, strict=True):
                    results.add(unanswered(_line_id(self.batch.id, line.number), custom_id, code, message), ok=False)
                await results.room()
            await results.flush()
        verdict = Status.CANCELLED if cancelled else Status.EXPIRED if pending else Status.COMPLETED
        if self.batch.status is Status.FINALIZING and self.batch.verdict is not None:
            verdict = self.batch.verdict  # killed in here: the lines it never did have their error by now
        elif not cancelled:
            now_ms = self._clock.now_ms()
            await self._save(status=Status.FINALIZING, finalizing_ms=now_ms, verdict=verdict, **_counts(results))
        await asyncio.to_thread(results.finish)
        files = self._files(results)
        await self._save(
            *files,
            status=verdict,
            ended_ms=self._clock.now_ms(),
            output_file_id=next((file.id for file in files if file.id == produced_id(self.batch.id, "output")), None),
            error_file_id=next((file.id for file in files if file.id == produced_id(self.batch.id, "error")), None),
            notice=self._notice(),
            **_counts(results),
        )

    def _files(self, results: Results) -> list[StoredFile]:
        now_ms, batch = self._clock.now_ms(), self.batch
        expires_ms = now_ms + (batch.output_expires_s or self._settings.retention_s) * 1_000
        return [
            StoredFile(
                id=produced_id(batch.id, what),
                tenant=batch.tenant,
                purpose="batch_output",
                filename=f"{batch.id}_{what}.jsonl",
                bytes=nbytes,
                created_ms=now_ms,
                expires_ms=expires_ms,
            )
            for what, nbytes in (("output", results.output_bytes), ("error", results.error_bytes))
            if nbytes
        ]

    def _notice(self) -> Notice:
        return Notice.OWED if self.batch.tenant in (self._settings.webhooks or {}) else Notice.NONE

    async def _save(self, *produced: StoredFile, only_from: tuple[Status, ...] | None = None, **changes: Any) -> None:
        """On disk first: what the API tells of a batch, it finds. With `only_from`, nothing unless it is in one of
        these states.
        """
        async with self._saving:
            before = self.batch
            if only_from is not None and before.status not in only_from:
                return
            after = msgspec.structs.replace(before, **changes)
            await asyncio.to_thread(self._store.save_batch, after, produced)
            self.batch = after
        if after.status is not before.status:
            log.info("batch %s: %s → %s", after.id, before.status, after.status)


def _counts(results: Results) -> dict[str, Any]:
    return {
        "completed": results.completed,
        "failed": results.failed,
        "input_tokens": results.input_tokens,
        "cached_tokens": results.cached_tokens,
        "output_tokens": results.output_tokens,
    }


def _line_id(batch_id: str, number: int) -> str:
    return "batch_req_" + hashlib.sha256(f"{batch_id}-{number}".encode()).hexdigest()[:24]


def _names(reader: Reader, some: list[Line]) -> list[str]:
    return [lines.read(reader, line).custom_id for line in some]
