"""Every operation of the admin API: one table, from which both the routes and the OpenAPI document are made."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import msgspec
from starlette.requests import Request

from tidegate.control import promises, views
from tidegate.control.deployments import split_name
from tidegate.control.service import Control, no_endpoint
from tidegate.domain.endpoint import Deployment
from tidegate.domain.errors import Refusal
from tidegate.wire import admin
from tidegate.wire.admin import Identity, Listing
from tidegate.wire.promises import SizeBounds

ACTIVITY_LINES_MAX = 1_000
ACTIVITY_LINES = 100


@dataclass(frozen=True, slots=True)
class Call:
    """One call, its caller known and its body decoded (an instance of the operation's `request`)."""

    control: Control
    identity: Identity
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: msgspec.Struct | None

    @property
    def actor(self) -> str:
        return f"key:{self.identity.key}"

    @property
    def endpoint(self) -> str:
        return f"{self.path['tenant']}/{self.path['name']}"


@dataclass(frozen=True, slots=True)
class Query:
    """A query parameter; `kind` is integer or string."""

    name: str
    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class Operation:
    """`admin` False: a tenant's key may call it too and sees its own."""

    method: str
    path: str
    handler: Callable[[Call], Awaitable[object]]
    answer: type
    request: type[admin.Request] | None = None
    query: tuple[Query, ...] = ()
    admin: bool = True
    status: int = 200

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().splitlines()[0].rstrip(".")


# --- tenants ------------------------------------------------------------------------------------------------------


async def list_tenants(call: Call) -> object:
    """All tenants."""
    return Listing([views.tenant_view(tenant) for tenant in call.control.desired.state.tenants])


async def create_tenant(call: Call) -> object:
    """Create a tenant; one that exists is left as it is."""
    assert isinstance(call.body, admin.TenantCreate)
    return views.tenant_view(await call.control.tenancy.create_tenant(call.body.id, call.actor))


async def delete_tenant(call: Call) -> object:
    """Remove a tenant without endpoints, and its keys."""
    await call.control.tenancy.remove_tenant(call.path["tenant"], call.actor)
    return admin.StatusView("removed")


# --- keys ---------------------------------------------------------------------------------------------------------


async def list_keys(call: Call) -> object:
    """API keys without their secrets."""
    wanted, now_ms = call.query.get("tenant"), call.control.clock.now_ms()
    found = [key for key in call.control.desired.state.keys if wanted is None or key.tenant == wanted]
    return Listing([views.key_view(key, now_ms) for key in found])


async def create_key(call: Call) -> object:
    """Create an API key; the only time its secret is shown."""
    body, control = call.body, call.control
    assert isinstance(body, admin.KeyCreate)
    if (body.tenant is None) is not body.admin:
        raise Refusal("invalid_request", "`tenant`: name a tenant, or set `admin` to true, not both", param="tenant")
    key, secret = await control.tenancy.create_key(body.tenant, call.actor, expires_in_s=body.expires_in_s)
    return views.key_created(key, secret, control.clock.now_ms())


async def revoke_key(call: Call) -> object:
    """Revoke an API key; it is refused from now on."""
    key = await call.control.tenancy.revoke_key(call.path["key"], call.actor)
    return views.key_view(key, call.control.clock.now_ms())


# --- endpoints ----------------------------------------------------------------------------------------------------


def _readable(call: Call) -> Deployment:
    wanted = call.control.desired.deployment(call.endpoint)
    if wanted is None or not call.identity.may_read(wanted.tenant):
        raise no_endpoint(call.endpoint)
    return wanted


def _shown(call: Call, wanted: list[Deployment]) -> list[admin.EndpointView]:
    seen = {endpoint.endpoint: endpoint for endpoint in call.control.loop.view().endpoints}
    meters, settings, now_ms = call.control.meters, call.control.settings, call.control.clock.now_ms()
    return [views.endpoint_view(d, seen, meters, settings, now_ms) for d in wanted]


async def list_endpoints(call: Call) -> object:
    """Endpoints as desired and as they are."""
    tenant = call.query.get("tenant")
    every = call.control.desired.state.deployments
    mine = [d for d in every if call.identity.may_read(d.tenant) and tenant in (None, d.tenant)]
    return Listing(_shown(call, mine))


async def get_endpoint(call: Call) -> object:
    """One endpoint: state, reason, replicas, tier, limits."""
    return _shown(call, [_readable(call)])[0]


async def apply_endpoint(call: Call) -> object:
    """Make an endpoint be as the body says; the same again changes nothing."""
    assert isinstance(call.body, admin.EndpointApply)
    return _shown(call, [await call.control.apply(call.endpoint, call.body, call.actor)])[0]


async def delete_endpoint(call: Call) -> object:
    """Drain an endpoint and remove it; its usage and bills stay."""
    await call.control.remove(call.endpoint, call.actor)
    return admin.StatusView("removed")


async def wake_endpoint(call: Call) -> object:
    """Bring an endpoint to ready without waiting for a request."""
    await call.control.manual(call.endpoint, "wake", call.actor)
    return _shown(call, [_readable(call)])[0]


async def sleep_endpoint(call: Call) -> object:
    """Give an endpoint's accelerator memory back; its next request wakes it."""
    await call.control.manual(call.endpoint, "sleep", call.actor)
    return _shown(call, [_readable(call)])[0]


async def rollback_endpoint(call: Call) -> object:
    """Drop the canary, or go back to what the endpoint was before its last change."""
    return _shown(call, [await call.control.rollback(call.endpoint, call.actor)])[0]


async def endpoint_logs(call: Call) -> object:
    """Lifecycle lines of an endpoint, newest first; never text of requests."""
    lines = await call.control.activity.newest(_limit(call), _readable(call).endpoint)
    return Listing([views.activity_view(line) for line in lines if views.may_see(call.identity, line)])


# --- fleet --------------------------------------------------------------------------------------------------------


async def activation_bounds(call: Call) -> object:
    """What activations took on this fleet, by model size and by the tier they came from: p50, p95, p99, measured."""
    control = call.control
    return Listing(promises.bounds_by_size(control.desired.state.deployments, control.meters))


async def list_nodes(call: Call) -> object:
    """Nodes, their accelerators, and what is resident on them."""
    fleet = call.control.loop.view()
    return Listing([views.node_view(session.node, session.joined_ms, fleet) for session in call.control.loop.nodes])


async def list_activity(call: Call) -> object:
    """Every capacity decision and operator's act with its reason, newest first."""
    subject = call.query.get("subject")
    if not call.identity.admin:
        if subject is None:
            raise Refusal("invalid_request", "`subject`: name one of your endpoints", param="subject")
        wanted = call.control.desired.deployment(subject)
        if wanted is None or not call.identity.may_read(wanted.tenant):
            raise no_endpoint(subject)
    lines = await call.control.activity.newest(_limit(call), subject)
    return Listing([views.activity_view(line) for line in lines if views.may_see(call.identity, line)])


def _limit(call: Call) -> int:
    text = call.query.get("limit", str(ACTIVITY_LINES))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= ACTIVITY_LINES_MAX and len(text) <= 9):
        raise Refusal("invalid_request", f"`limit`: accepted: 1 to {ACTIVITY_LINES_MAX}", param="limit")
    return int(text)


LIMIT = Query("limit", "integer", f"How many lines, at most {ACTIVITY_LINES_MAX}.")
ENDPOINT = "/api/v1/endpoints/{tenant}/{name}"

OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/api/v1/tenants", list_tenants, Listing[admin.TenantView]),
    Operation("POST", "/api/v1/tenants", create_tenant, admin.TenantView, admin.TenantCreate),
    Operation("DELETE", "/api/v1/tenants/{tenant}", delete_tenant, admin.StatusView),
    Operation("GET", "/api/v1/keys", list_keys, Listing[admin.KeyView],
              query=(Query("tenant", "string", "Only keys of this tenant."),)),
    Operation("POST", "/api/v1/keys", create_key, admin.KeyCreated, admin.KeyCreate, status=201),
    Operation("DELETE", "/api/v1/keys/{key}", revoke_key, admin.KeyView),
    Operation("GET", "/api/v1/endpoints", list_endpoints, Listing[admin.EndpointView],
              query=(Query("tenant", "string", "Only endpoints of this tenant."),), admin=False),
    Operation("GET", ENDPOINT, get_endpoint, admin.EndpointView, admin=False),
    Operation("PUT", ENDPOINT, apply_endpoint, admin.EndpointView, admin.EndpointApply),
    Operation("DELETE", ENDPOINT, delete_endpoint, admin.StatusView),
    Operation("POST", ENDPOINT + "/wake", wake_endpoint, admin.EndpointView, status=202),
    Operation("POST", ENDPOINT + "/sleep", sleep_endpoint, admin.EndpointView, status=202),
    Operation("POST", ENDPOINT + "/rollback", rollback_endpoint, admin.EndpointView),
    Operation("GET", ENDPOINT + "/logs", endpoint_logs, Listing[admin.ActivityView], query=(LIMIT,), admin=False),
    Operation("GET", "/api/v1/activation-bounds", activation_bounds, Listing[SizeBounds], admin=False),
    Operation("GET", "/api/v1/nodes", list_nodes, Listing[admin.NodeView]),
    Operation("GET", "/api/v1/activity", list_activity, Listing[admin.ActivityView],
              query=(LIMIT, Query("subject", "string", "Only about this endpoint, node or tenant.")), admin=False),
)  # fmt: skip


def check_query(operation: Operation, request: Request) -> Mapping[str, str]:
    """The query parameters. Raises Refusal naming one this operation does not have, or one given twice."""
    known = [query.name for query in operation.query]
    for name in request.query_params:
        if name not in known:
            name, accepted = name[:64], ", ".join(known) or "none"
            raise Refusal("invalid_request", f"`{name}`: unknown query parameter; accepted: {accepted}", param=name)
        if len(request.query_params.getlist(name)) > 1:
            raise Refusal("invalid_request", f"`{name}`: given more than once", param=name)
    return dict(request.query_params)


def check_endpoint(path: Mapping[str, str]) -> None:
    if "name" in path:
        split_name(f"{path['tenant']}/{path['name']}")
