"""`/v2/{endpoint}/run…` (RunPod) and `/v1/predictions` (Replicate). A job is a batch of one line: durable, encrypted,
billed once, done on idle capacity at the batch price.
"""

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tidegate.batch.api import Authorize, guard, read_body
from tidegate.batch.service import BatchService
from tidegate.domain.errors import Refusal
from tidegate.wire import jobs
from tidegate.wire.admin import Identity, decode
from tidegate.wire.batch import Status, StoredBatch

BODY_BYTES_MAX = 8 << 20
WAIT_S, WAIT_S_MAX = 90.0, 300.0
POLL_S = 0.1
RECENT = 100

_line = msgspec.json.Decoder(jobs.Line).decode


def routes(service: BatchService, authorize: Authorize) -> list[Route]:
    """For `control.api` to mount beside its own."""
    api, guarded = _Api(service), guard(authorize)
    base = "/v2/{endpoint}"
    return [
        Route(f"{base}/run", guarded(api.run), methods=["POST"]),
        Route(f"{base}/runsync", guarded(api.run_and_wait), methods=["POST"]),
        Route(f"{base}/status/{{job_id}}", guarded(api.status), methods=["GET"]),
        Route(f"{base}/cancel/{{job_id}}", guarded(api.cancel), methods=["POST"]),
        Route(f"{base}/health", guarded(api.health), methods=["GET"]),
        Route("/v1/predictions", guarded(api.predict), methods=["POST"]),
        Route("/v1/predictions/{job_id}", guarded(api.prediction), methods=["GET"]),
        Route("/v1/predictions/{job_id}/cancel", guarded(api.cancel_prediction), methods=["POST"]),
    ]


class _Api:
    def __init__(self, service: BatchService) -> None:
        self._service = service

    # --- RunPod ---------------------------------------------------------------------------------------------------

    async def run(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Run a job (RunPod's shape)."""
        batch = await self._started(request, identity)
        return _json(jobs.run_view(batch, None))

    async def run_and_wait(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Run a job and wait for it, at most 90 s or `wait` milliseconds (RunPod's shape)."""
        wait_s = _wait_s(request.query_params.get("wait"))
        batch = await self._ended(tenant, await self._started(request, identity), wait_s)
        return _json(jobs.run_view(batch, await self._came_of(batch)))

    async def status(self, request: Request, identity: Identity, tenant: str) -> Response:
        """A job's status and output (RunPod's shape)."""
        batch = await self._service.get(tenant, request.path_params["job_id"])
        return _json(jobs.run_view(batch, await self._came_of(batch)))

    async def cancel(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Cancel a job (RunPod's shape)."""
        return _json(jobs.run_view(await self._service.cancel(tenant, request.path_params["job_id"]), None))

    async def health(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Jobs and workers of an endpoint (RunPod's shape); jobs are the tenant's latest hundred."""
        offer, model = self._service.offer(tenant, request.path_params["endpoint"])
        recent = [batch for batch in await self._service.page(tenant, None, RECENT) if batch.model == model]
        count = [jobs.RUNPOD[batch.status] for batch in recent].count
        said = {"inQueue": "IN_QUEUE", "inProgress": "IN_PROGRESS", "completed": "COMPLETED", "failed": "FAILED"}
        workers = {"running": offer.ready, "idle": 0}
        return _json({"jobs": {name: count(status) for name, status in said.items()}, "workers": workers})

    async def _started(self, request: Request, identity: Identity) -> StoredBatch:
        wanted = decode(await read_body(request, BODY_BYTES_MAX), jobs.RunRequest)
        url, body = jobs.run_call(request.path_params["endpoint"], wanted.input)
        return await self._service.create_one(identity, url, body)

    # --- Replicate ------------------------------------------------------------------------------------------------

    async def predict(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Create a prediction (Replicate's shape); `Prefer: wait` waits for it, at most 60 s."""
        wanted = decode(await read_body(request, BODY_BYTES_MAX), jobs.PredictionRequest)
        name = wanted.model or wanted.version
        if name is None:
            raise Refusal("invalid_request", "missing required parameter: 'model'", param="model")
        batch = await self._service.create_one(identity, *jobs.prediction_call(name, wanted.input))
        prefer, _, seconds = request.headers.get("prefer", "").partition("=")
        if prefer == "wait":
            wait_s = min(float(seconds) if seconds.isdecimal() else 60.0, 60.0)
            batch = await self._ended(tenant, batch, wait_s)
        return _json(jobs.prediction_view(batch, await self._came_of(batch)), 201)

    async def prediction(self, request: Request, identity: Identity, tenant: str) -> Response:
        """A prediction's status and output (Replicate's shape)."""
        batch = await self._service.get(tenant, request.path_params["job_id"])
        return _json(jobs.prediction_view(batch, await self._came_of(batch)))

    async def cancel_prediction(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Cancel a prediction (Replicate's shape)."""
        return _json(jobs.prediction_view(await self._service.cancel(tenant, request.path_params["job_id"]), None))

    # --- both -----------------------------------------------------------------------------------------------------

    async def _ended(self, tenant: str, batch: StoredBatch, wait_s: float) -> StoredBatch:
        """As it is when it has ended, or after `wait_s`."""
        until = asyncio.get_running_loop().time() + wait_s
        while batch.status.open and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(POLL_S)
            batch = await self._service.get(tenant, batch.id)
        return batch

    async def _came_of(self, batch: StoredBatch) -> jobs.Line | None:
        """Its one line, once it has ended. A batch of several lines is no job: its files have them."""
        file_id = batch.output_file_id or batch.error_file_id
        if batch.status.open or batch.total != 1 or file_id is None or batch.status is Status.CANCELLED:
            return None
        content = await self._service.files.content(batch.tenant, file_id)
        return _line(b"".join([piece async for piece in content]))


def _wait_s(milliseconds: str | None) -> float:
    if milliseconds is None:
        return WAIT_S
    if not (milliseconds.isascii() and milliseconds.isdecimal() and int(milliseconds[:9]) <= WAIT_S_MAX * 1000):
        raise Refusal("invalid_request", f"`wait`: accepted: milliseconds up to {WAIT_S_MAX * 1000:.0f}", param="wait")
    return int(milliseconds) / 1000


def _json(view: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(view), status, media_type="application/json")
