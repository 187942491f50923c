"""The admin application: REST under ``/api/v1``, health, metrics and the console, served on a Unix socket.

Gateways pass every path that is not ``/v1`` on to it. Every error has OpenAI's shape.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from tidegate.control import console, http, openapi, views
from tidegate.control.limits import LIMIT_OPERATIONS
from tidegate.control.meters import fleet_metrics
from tidegate.control.operations import OPERATIONS, Call, Operation, check_endpoint, check_query
from tidegate.control.promises import endpoint_metrics
from tidegate.control.service import Control
from tidegate.domain.errors import Refusal
from tidegate.domain.ports import Activity
from tidegate.wire import admin, openai

QUIET_MS_MAX = 15_000  # a comment line at least this often, so that proxies keep a quiet event stream open

Handler = Callable[[Request], Awaitable[Response]]


def build_app(
    control: Control, extra_routes: Sequence[Route] = (), registries: Sequence[CollectorRegistry] = ()
) -> Starlette:
    """`extra_routes` are other services' (usage, prices, invoices), guarded by the same `control.authorize`;
    `registries` hold their metrics, shown at ``/metrics`` with ours.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series a counter, which nobody reads
    plain = [*_plain_routes(control, registries), *extra_routes]
    operations = (*OPERATIONS, *LIMIT_OPERATIONS)
    document = msgspec.json.encode(openapi.document(operations, plain))
    routes = [
        *(Route(o.path, _served(control, o), methods=[o.method]) for o in operations),
        *plain,
        Route("/api/openapi.json", _constant(document), methods=["GET"]),
        *console.routes(),
    ]
    middleware = [Middleware(http.RequestIds)]
    app = Starlette(routes=_merged(routes), middleware=middleware, exception_handlers=http.EXCEPTION_HANDLERS)
    app.router.redirect_slashes = False  # a path we do not have is a 404 in our shape, not a redirect without a body
    return app


def _served(control: Control, operation: Operation) -> Handler:
    async def serve(request: Request) -> Response:
        identity = control.authorize(request, operation.admin)
        check_endpoint(request.path_params)
        query = check_query(operation, request)
        body = None
        if operation.request is not None:
            body = admin.decode(await http.body_of(request), operation.request)
        call = Call(control, identity, request.path_params, query, body)
        return http.answer(await operation.handler(call), operation.status)

    return serve


def _merged(routes: Iterable[Route]) -> list[Route]:
    """One Route a path, so that a wrong method is answered 405 with every method the path has."""
    by_path: dict[str, dict[str, Handler]] = {}
    for route in routes:
        for method in (route.methods or set()) - {"HEAD"}:
            by_path.setdefault(route.path, {})[method] = route.endpoint
    return [Route(path, _dispatcher(methods), methods=list(methods)) for path, methods in by_path.items()]


def _dispatcher(methods: dict[str, Handler]) -> Handler:
    async def dispatch(request: Request) -> Response:
        return await methods["GET" if request.method == "HEAD" else request.method](request)

    return dispatch


def _constant(body: bytes) -> Handler:
    async def serve(_request: Request) -> Response:
        return Response(body, media_type="application/json")

    return serve


def _plain_routes(control: Control, registries: Sequence[CollectorRegistry]) -> list[Route]:
    async def healthz(_request: Request) -> Response:
        """The process answers."""
        return http.answer(admin.StatusView("ok"))

    async def readyz(_request: Request) -> Response:
        """Desired state is loaded and a node has joined."""
        if not control.ready:
            raise Refusal("not_ready", "no node has joined yet", retry_after_ms=1_000)
        return http.answer(admin.StatusView("ready"))

    async def metrics(_request: Request) -> Response:
        """Prometheus metrics of the control plane."""
        return Response(_metrics(control, registries), media_type=CONTENT_TYPE_LATEST)

    async def activity_stream(request: Request) -> Response:
        """Activity as it happens, as server-sent events; a tenant's key sees its own endpoints'."""
        identity = control.authorize(request, False)
        control.activity.check_room()
        return StreamingResponse(_events(control, identity), media_type=openai.SSE_CONTENT_TYPE)

    return [
        Route("/healthz", healthz, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/api/v1/activity/stream", activity_stream, methods=["GET"]),
    ]


def _metrics(control: Control, registries: Sequence[CollectorRegistry]) -> bytes:
    now_ms = control.clock.now_ms()
    scraped = CollectorRegistry()

    class Fleet:
        def collect(self) -> Iterable[Metric]:
            lent_s = control.meters.lent_seconds(now_ms)
            loop = control.loop
            view, wanted = loop.view(), control.desired.state.deployments
            yield from fleet_metrics(view, len(loop.nodes), len(loop.gateways), lent_s)
            yield from endpoint_metrics(wanted, view, control.meters, now_ms)

    scraped.register(Fleet())
    return b"".join(generate_latest(registry) for registry in (control.meters.registry, scraped, *registries))


async def _events(control: Control, identity: admin.Identity) -> AsyncIterator[bytes]:
    with control.activity.subscribed() as lines:
        yield openai.sse_comment("activity from now on")
        upcoming: asyncio.Task[Activity | None] | None = None
        try:
            while True:
                upcoming = upcoming or asyncio.create_task(_next(lines))
                done, _ = await asyncio.wait({upcoming}, timeout=QUIET_MS_MAX / 1_000)
                if not done:
                    yield openai.sse_comment("quiet")
                    continue
                line, upcoming = upcoming.result(), None
                if line is None:
                    return
                if views.may_see(identity, line):
                    yield openai.sse_event(msgspec.json.encode(views.activity_view(line)))
        finally:
            if upcoming is not None:
                upcoming.cancel()


async def _next(lines: AsyncIterator[Activity]) -> Activity | None:
    return await anext(lines, None)
