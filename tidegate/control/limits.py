"""Limits of keys, tenants and endpoints: desired state, and how it is changed and shown through the admin API."""

from tidegate.control.operations import Call, Operation, Query
from tidegate.domain.endpoint import ApiKey
from tidegate.domain.errors import Refusal
from tidegate.domain.limits import Budget, Limits, Scope, Spending, Window
from tidegate.domain.ports import Change, State
from tidegate.domain.units import nano_usd, usd
from tidegate.quota.windows import bounds
from tidegate.wire.admin import Identity, Listing, StatusView
from tidegate.wire.limits import BudgetView, LimitsPut, LimitsView


async def list_limits(call: Call) -> object:
    """Limits, and what is left of budgets."""
    state = call.control.desired.state
    mine = [rule for rule in state.limits if _owner(state, rule.scope, rule.subject) in _readable(call.identity, state)]
    return Listing([_view(call, rule) for rule in mine])


async def put_limits(call: Call) -> object:
    """Set all limits of a key, tenant or endpoint; what is left out is no limit."""
    body = call.body
    assert isinstance(body, LimitsPut)
    now_ms = call.control.clock.now_ms()

    def build(state: State) -> Change | None:
        if _owner(state, body.scope, body.subject) is None:
            raise _unknown(body.scope, body.subject)
        before = next((r for r in state.limits if (r.scope, r.subject) == (body.scope, body.subject)), None)
        wanted = _limits(body, before, now_ms)
        return None if wanted == before else Change(put=(wanted,))

    state = await call.control.desired.change(build)
    call.control.activity.note(call.actor, "limits_set", body.subject, f"scope={body.scope.value}")
    call.control.budgets.wake()
    return _view(call, next(r for r in state.limits if (r.scope, r.subject) == (body.scope, body.subject)))


async def delete_limits(call: Call) -> object:
    """Remove every limit of a key, tenant or endpoint."""
    subject = call.query.get("subject", "")
    try:
        scope = Scope(call.query.get("scope", ""))
    except ValueError:
        message = f"`scope`: accepted: {', '.join(scope for scope in Scope if scope is not Scope.CONTRACT)}"
        raise Refusal("invalid_request", message, param="scope") from None

    def build(state: State) -> Change:
        if not any((r.scope, r.subject) == (scope, subject) for r in state.limits):
            raise Refusal("not_found", f"{scope.value} {subject[:160]!r} has no limits", param="subject")
        return Change(remove_limits=((scope, subject),))

    await call.control.desired.change(build)
    call.control.activity.note(call.actor, "limits_removed", subject, f"scope={scope.value}")
    return StatusView("removed")


def _limits(body: LimitsPut, before: Limits | None, now_ms: int) -> Limits:
    since = {budget.window: budget.since_ms for budget in before.budgets} if before else {}
    budgets = tuple(
        Budget(window, _amount(f"budget_{window.value}_usd", text), since.get(window, now_ms))
        for window in Window
        if (text := getattr(body, f"budget_{window.value}_usd")) is not None
    )
    rates = (body.requests_per_minute, body.tokens_per_minute, body.concurrency)
    if not budgets and rates == (None, None, None):
        message = "no limit is named; to remove them all, DELETE (`tidegate limits remove`)"
        raise Refusal("invalid_request", message, param="requests_per_minute")
    return Limits(body.scope, body.subject, *rates, budgets)


def _amount(field: str, text: str) -> int:
    try:
        return nano_usd(text)
    except ValueError as error:
        raise Refusal("invalid_request", f"`{field}`: {error}", param=field) from None


def _unknown(scope: Scope, subject: str) -> Refusal:
    accepted = {Scope.KEY: "the id of a tenant's key", Scope.TENANT: "a tenant", Scope.ENDPOINT: "tenant/name"}.get(
        scope, f"none with scope {scope.value!r}: a contract says itself what comes when it is used up"
    )
    return Refusal("not_found", f"`subject`: {subject!r} is unknown; accepted: {accepted}", param="subject")


def _owner(state: State, scope: Scope, subject: str) -> str | None:
    """The tenant it belongs to; None where there is no such thing, or it is an administrator's key."""
    match scope:
        case Scope.KEY:
            found: ApiKey | None = next((key for key in state.keys if key.id == subject), None)
            return found.tenant if found else None
        case Scope.TENANT:
            return next((tenant.id for tenant in state.tenants if tenant.id == subject), None)
        case Scope.ENDPOINT:
            return next((d.tenant for d in state.deployments if d.endpoint == subject), None)
        case Scope.CONTRACT:  # its limit comes from the contract, which is billing's
            return None


def _readable(identity: Identity, state: State) -> set[str | None]:
    """Owners whose limits may be seen; an administrator sees those of what is gone, too."""
    return {identity.tenant} if identity.tenant else {None, *(tenant.id for tenant in state.tenants)}


def _view(call: Call, rule: Limits) -> LimitsView:
    now_ms = call.control.clock.now_ms()
    spent = call.control.budgets.spent()
    budgets = []
    for window, full, since_ms in rule.budgets:
        start_ms, end_ms = bounds(window, now_ms)
        known = spent.by_gateway.get(Spending(rule.scope, rule.subject, window, since_ms, start_ms)) if spent else None
        used = None if known is None else sum(known.values())
        budgets.append(
            BudgetView(
                window=window,
                usd=usd(full),
                spent_usd=None if used is None else usd(used),
                left_usd=None if used is None else usd(full - used),
                start_ms=start_ms,
                end_ms=end_ms,
            )
        )
    return LimitsView(
        scope=rule.scope,
        subject=rule.subject,
        requests_per_minute=rule.requests_per_minute,
        tokens_per_minute=rule.tokens_per_minute,
        concurrency=rule.concurrency,
        budgets=budgets,
    )


SUBJECT = (
    Query("scope", "string", "key, tenant or endpoint."),
    Query("subject", "string", "A key's id, a tenant's or an endpoint's name."),
)
LIMIT_OPERATIONS = (
    Operation("GET", "/api/v1/limits", list_limits, Listing[LimitsView], admin=False),
    Operation("PUT", "/api/v1/limits", put_limits, LimitsView, LimitsPut),
    Operation("DELETE", "/api/v1/limits", delete_limits, StatusView, query=SUBJECT),
)
