"""`/v1/files` and `/v1/batches`: OpenAI's API, as Starlette routes. Refusals and faults are raised, and answered by the
application they are mounted in. An administrator's key belongs to no tenant and has no files.
"""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tidegate.batch.service import BatchService
from tidegate.domain.errors import Refusal
from tidegate.wire.admin import Identity
from tidegate.wire.admin import decode as decode_strictly
from tidegate.wire.batch import BatchCreate, batch_view, file_view, page_view

BODY_BYTES_MAX = 64 << 10
FILES_PAGE_MAX = 10_000
BATCHES_PAGE, BATCHES_PAGE_MAX = 20, 100

Authorize = Callable[[Request, bool], Identity]
Handler = Callable[[Request, Identity, str], Awaitable[Response]]


def guard(authorize: Authorize) -> Callable[[Handler], Callable[[Request], Awaitable[Response]]]:
    """Handlers that know who asks, and for which tenant."""

    def guarded(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        @wraps(handler)  # the OpenAPI document shows the handler's name and docstring
        async def endpoint(request: Request) -> Response:
            identity = authorize(request, False)
            return await handler(request, identity, tenant_of(identity))

        return endpoint

    return guarded


def routes(service: BatchService, authorize: Authorize) -> list[Route]:
    """For `control.api` to mount beside its own."""
    api, guarded = _Api(service), guard(authorize)
    return [
        Route("/v1/files", guarded(api.list_files), methods=["GET"]),
        Route("/v1/files", guarded(api.upload_file), methods=["POST"]),
        Route("/v1/files/{file_id}", guarded(api.get_file), methods=["GET"]),
        Route("/v1/files/{file_id}", guarded(api.delete_file), methods=["DELETE"]),
        Route("/v1/files/{file_id}/content", guarded(api.file_content), methods=["GET"]),
        Route("/v1/batches", guarded(api.list_batches), methods=["GET"]),
        Route("/v1/batches", guarded(api.create_batch), methods=["POST"]),
        Route("/v1/batches/{batch_id}", guarded(api.get_batch), methods=["GET"]),
        Route("/v1/batches/{batch_id}/cancel", guarded(api.cancel_batch), methods=["POST"]),
    ]


class _Api:
    def __init__(self, service: BatchService) -> None:
        self._service = service
        self._files = service.files

    async def upload_file(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Upload a file of batch input lines (multipart/form-data)."""
        return _json(file_view(await self._files.upload(request, tenant)))

    async def list_files(self, request: Request, identity: Identity, tenant: str) -> Response:
        """This tenant's files."""
        query = _query(request, "after", "limit", "order", "purpose")
        limit = _limit(query, FILES_PAGE_MAX, FILES_PAGE_MAX)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise Refusal("invalid_request", "`order`: accepted: asc, desc", param="order")
        found = await self._files.page(tenant, query.get("after"), limit + 1, order == "desc", query.get("purpose"))
        return _json(page_view([file_view(file) for file in found[:limit]], len(found) > limit))

    async def get_file(self, request: Request, identity: Identity, tenant: str) -> Response:
        """One file's facts."""
        return _json(file_view(await self._files.get(tenant, request.path_params["file_id"])))

    async def file_content(self, request: Request, identity: Identity, tenant: str) -> Response:
        """One file's bytes."""
        content = await self._files.content(tenant, request.path_params["file_id"])
        return StreamingResponse(content, media_type="application/octet-stream")

    async def delete_file(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Delete a file for good."""
        file_id = request.path_params["file_id"]
        await self._files.delete(tenant, file_id)
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def create_batch(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Create a batch from an uploaded file."""
        wanted = decode_strictly(await read_body(request), BatchCreate)
        return _json(batch_view(await self._service.create(identity, wanted)))

    async def list_batches(self, request: Request, identity: Identity, tenant: str) -> Response:
        """This tenant's batches, newest first."""
        query = _query(request, "after", "limit")
        limit = _limit(query, BATCHES_PAGE, BATCHES_PAGE_MAX)
        found = await self._service.page(tenant, query.get("after"), limit + 1)
        return _json(page_view([batch_view(batch) for batch in found[:limit]], len(found) > limit))

    async def get_batch(self, request: Request, identity: Identity, tenant: str) -> Response:
        """One batch: its status and how far it is; `cost_nano_usd` beside what OpenAI's object has."""
        batch = await self._service.get(tenant, request.path_params["batch_id"])
        return _json(batch_view(batch) | {"cost_nano_usd": await self._service.cost_nano_usd(batch)})

    async def cancel_batch(self, request: Request, identity: Identity, tenant: str) -> Response:
        """Cancel a batch; what is finished is kept."""
        return _json(batch_view(await self._service.cancel(tenant, request.path_params["batch_id"])))


def _json(view: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(view), media_type="application/json")


def tenant_of(identity: Identity) -> str:
    """Refusal permission_denied for an administrator's key."""
    if identity.tenant is None:
        message = "an admin key belongs to no tenant and has no files or batches; use an API key"
        raise Refusal("permission_denied", message)
    return identity.tenant


async def read_body(request: Request, bytes_max: int = BODY_BYTES_MAX) -> bytes:
    """The whole body. Refusal body_too_large while it is still being read."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > bytes_max:
            raise Refusal("body_too_large", f"the body is over {bytes_max} bytes")
    return bytes(body)


def _query(request: Request, *known: str) -> dict[str, str]:
    for name in request.query_params:
        if name not in known:
            message = f"unknown parameter '{name[:80]}'; accepted: {', '.join(known)}"
            raise Refusal("invalid_request", message, param=name[:80])
    return dict(request.query_params)


def _limit(query: dict[str, str], default: int, most: int) -> int:
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= most):
        raise Refusal("invalid_request", f"`limit`: {text[:20]!r}; accepted: 1 to {most}", param="limit")
    return int(text)
