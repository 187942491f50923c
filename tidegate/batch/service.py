"""The batch service as one object: batches are created, asked for and cancelled here; `run` carries them out."""

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from tidegate.batch import notices
from tidegate.batch.calls import Gateway
from tidegate.batch.files import Files
from tidegate.batch.job import Job, produced_id
from tidegate.batch.metrics import BatchMetrics
from tidegate.batch.ports import BatchSettings, BatchStore, Fleet, Offer, Vault
from tidegate.domain.errors import Fault, Refusal
from tidegate.domain.ports import Clock
from tidegate.quota import admission
from tidegate.wire import openai
from tidegate.wire.admin import Identity
from tidegate.wire.batch import URLS, WINDOWS_MS, BatchCreate, InputLine, Notice, StoredBatch, check_metadata

OPEN_BATCHES_MAX = 100  # of one tenant
TELL_S = 0.2
LINGER_S = 60.0
SWEEP_S = 60.0
FAULT_PAUSE_S = 5.0

log = logging.getLogger(__name__)


class BatchService:
    def __init__(self, *, store: BatchStore, vault: Vault, fleet: Fleet, clock: Clock, settings: BatchSettings) -> None:
        self._store = store
        self._vault = vault
        self._fleet = fleet
        self._clock = clock
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._gateway = Gateway(settings)
        self._group: asyncio.TaskGroup | None = None
        self.metrics = BatchMetrics(self._open_batches, self._lines_left)
        self.files = Files(store, vault, clock, settings.retention_s, self._in_use)

    # --- what the API asks ----------------------------------------------------------------------------------------

    async def create(self, identity: Identity, wanted: BatchCreate) -> StoredBatch:
        """A batch in `validating`. Refusal for what is wrong with the request itself, not with the file's lines."""
        assert identity.tenant is not None
        group = self._group
        if group is None:
            raise Refusal("not_ready", "batches are not taken yet", retry_after_ms=1_000)
        if wanted.endpoint not in URLS:
            message = f"`endpoint`: {wanted.endpoint[:80]!r} is not supported; accepted: {', '.join(URLS)}"
            raise Refusal("invalid_request", message, param="endpoint")
        if wanted.completion_window not in WINDOWS_MS:
            message = f"`completion_window`: accepted: {', '.join(WINDOWS_MS)}"
            raise Refusal("invalid_request", message, param="completion_window")
        check_metadata(wanted.metadata)
        file = await self.files.get(identity.tenant, wanted.input_file_id)
        if file.purpose != "batch":
            message = f"`input_file_id`: {file.id} has purpose {file.purpose!r}; accepted: a file of purpose 'batch'"
            raise Refusal("invalid_request", message, param="input_file_id")
        mine = sum(job.batch.tenant == identity.tenant for job in self._jobs.values())
        if mine >= OPEN_BATCHES_MAX:
            message = f"{mine} batches are not finished, which is the most of one tenant"
            raise Refusal("queue_full", message, retry_after_ms=60_000)
        now_ms = self._clock.now_ms()
        batch = StoredBatch(
            id=f"batch_{secrets.token_hex(12)}",
            tenant=identity.tenant,
            key=identity.key,
            url=wanted.endpoint,
            input_file_id=file.id,
            completion_window=wanted.completion_window,
            created_ms=now_ms,
            expires_ms=now_ms + WINDOWS_MS[wanted.completion_window],
            metadata=wanted.metadata,
            output_expires_s=wanted.output_expires_after.seconds if wanted.output_expires_after else None,
        )
        job = self._job(batch)  # in use from now on: the file cannot go between here and the commit
        try:
            await asyncio.to_thread(self._store.add_batch, batch)
        except Fault:
            del self._jobs[batch.id]
            raise
        group.create_task(self._carry_out(job))
        return batch

    async def create_one(self, identity: Identity, url: str, body: bytes) -> StoredBatch:
        """A batch of one line, made here. Refusal model_not_found at once: nobody would look into its errors."""
        assert identity.tenant is not None
        model = self._fleet.model(identity.tenant, openai.parse_head(body).model)
        admission.check_kind(url.removeprefix("/v1/"), model.kind, model.endpoint)
        line = InputLine("job", "POST", url, msgspec.Raw(body))
        file = await self.files.add(identity.tenant, msgspec.json.encode(line) + b"\n", "job.jsonl")
        return await self.create(identity, BatchCreate(input_file_id=file.id, endpoint=url, completion_window="24h"))

    def offer(self, tenant: str, name: str) -> tuple[Offer, str]:
        """What an endpoint's batch work is offered now, and the endpoint's whole name. Refusal model_not_found."""
        endpoint = self._fleet.model(tenant, name).endpoint
        return self._fleet.offer(endpoint), endpoint

    async def get(self, tenant: str, batch_id: str) -> StoredBatch:
        job = self._jobs.get(batch_id)
        if job is not None and job.batch.tenant == tenant:
            return job.batch
        batch = await asyncio.to_thread(self._store.batch, tenant, batch_id)
        if batch is None:
            raise Refusal("not_found", f"No batch found with id '{batch_id[:64]}'.", param="id")
        return batch

    async def cost_nano_usd(self, batch: StoredBatch) -> int | None:
        """What its tokens so far cost, as far as the price in force now says; an invoice has the last word."""
        return await asyncio.to_thread(self._fleet.cost_nano_usd, batch)

    async def page(self, tenant: str, after: str | None, limit: int) -> Sequence[StoredBatch]:
        found = await asyncio.to_thread(self._store.list_batches, tenant, after=after, limit=limit)
        return [self._jobs[batch.id].batch if batch.id in self._jobs else batch for batch in found]

    async def cancel(self, tenant: str, batch_id: str) -> StoredBatch:
        batch = await self.get(tenant, batch_id)
        job = self._jobs.get(batch_id)
        if job is None or not batch.status.open:
            raise Refusal("conflict", f"Cannot cancel a batch with status '{batch.status}'.", param="id")
        return await job.cancel()

    # --- carrying out ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: takes up what an earlier life left open, then whatever is created."""
        try:
            async with asyncio.TaskGroup() as group:
                for job in await self._resume():
                    group.create_task(self._carry_out(job))
                group.create_task(self._tell())
                group.create_task(self._sweep())
                self._group = group
        finally:
            self._group = None
            self._gateway.close()

    async def _resume(self) -> list[Job]:
        batches = await asyncio.to_thread(self._store.open_batches)
        kept = {produced_id(batch.id, what) for batch in batches for what in ("output", "error")}
        await self.files.remove_strays(frozenset(kept))
        return [self._job(batch) for batch in batches]

    async def _carry_out(self, job: Job) -> None:
        """To its end, over whatever the disk and the database do meanwhile."""
        while True:
            try:
                await job.run()
                await self._announce(job)
                break
            except Fault as fault:
                log.warning("batch %s waits %.0f s: %s", job.batch.id, FAULT_PAUSE_S, fault.reason)
                await asyncio.sleep(FAULT_PAUSE_S)
        del self._jobs[job.batch.id]

    async def _announce(self, job: Job) -> None:
        webhook = (self._settings.webhooks or {}).get(job.batch.tenant)
        if job.batch.notice is not Notice.OWED:
            return
        taken = webhook is not None and await notices.deliver(job.batch, webhook, self._clock)
        await job.noticed(Notice.DELIVERED if taken else Notice.GIVEN_UP)

    async def _tell(self) -> None:
        """Which endpoints have lines to do: the core gives them what nobody else wants. One that has just had some
        counts for a while longer, so that the next batch, or the next job, finds a replica that is still loaded.
        """
        told: dict[str, bool] = {}
        last_s: dict[str, float] = {}
        while True:
            now_s, rush = asyncio.get_running_loop().time(), set[str]()
            for job in self._jobs.values():
                if job.sending:
                    last_s[job.batch.model] = now_s
                    rush |= {job.batch.model} if job.rush else set()
            last_s = {model: at_s for model, at_s in last_s.items() if now_s - at_s < LINGER_S}
            wanted = {model: model in rush for model in last_s}
            if wanted != told:
                await self._fleet.work(wanted)
                told = wanted
            await asyncio.sleep(TELL_S)

    async def _sweep(self) -> None:
        while True:
            try:
                await self.files.sweep()
            except Fault as fault:
                log.warning("expired files stay for now: %s", fault.reason)
            await asyncio.sleep(SWEEP_S)

    def _job(self, batch: StoredBatch) -> Job:
        job = Job(
            batch,
            store=self._store,
            vault=self._vault,
            fleet=self._fleet,
            gateway=self._gateway,
            clock=self._clock,
            settings=self._settings,
            turn=lambda endpoint: self._turns.setdefault(endpoint, asyncio.Lock()),
            count=lambda endpoint, outcome: self.metrics.lines.labels(endpoint, outcome).inc(),
        )
        self._jobs[batch.id] = job
        return job

    def _open_batches(self) -> Mapping[str, int]:
        return Counter(job.batch.status.value for job in self._jobs.values())

    def _lines_left(self) -> Mapping[str, int]:
        left: Counter[str] = Counter()
        for job in self._jobs.values():
            if job.batch.model:
                left[job.batch.model] += job.batch.total - job.batch.completed - job.batch.failed
        return left

    def _in_use(self, file_id: str) -> bool:
        return any(job.batch.input_file_id == file_id and job.batch.status.open for job in self._jobs.values())
