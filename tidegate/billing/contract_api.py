"""Contracts and credits in `/api/v1`."""

import asyncio
import base64
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tidegate.billing.http import Guarded, answer, body_as, known
from tidegate.billing.periods import iso, parse_instant
from tidegate.billing.service import Billing
from tidegate.domain.contract import Alert, Contract, Drawn
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import CREDITS, Adjustment, Entry, tenant_account
from tidegate.domain.money_ports import Contracts
from tidegate.domain.units import MS_PER_DAY, nano_usd, usd
from tidegate.money.drawdown import purchase, spendable, worth
from tidegate.wire import webhooks
from tidegate.wire.admin import Identity, Listing
from tidegate.wire.contracts import (
    AdjustmentView,
    AlertView,
    ContractCreate,
    ContractCreated,
    ContractView,
    CreditCreate,
    OnExhausted,
)


def contract_routes(billing: Billing, contracts: Contracts, guarded: Guarded) -> list[Route]:
    api = _Api(billing, contracts)
    return [
        Route("/api/v1/contracts", guarded(api.contracts), methods=["GET"]),
        Route("/api/v1/contracts", guarded(api.create, admin=True), methods=["POST"]),
        Route("/api/v1/contracts/{contract}", guarded(api.contract), methods=["GET"]),
        Route("/api/v1/credits", guarded(api.credit, admin=True), methods=["POST"]),
    ]


class _Api:
    def __init__(self, billing: Billing, contracts: Contracts) -> None:
        self._billing = billing
        self._contracts = contracts

    async def contracts(self, request: Request, identity: Identity) -> Response:
        """Prepaid commitments and what is left of them; a tenant's key sees its own."""
        known(request, "tenant")
        await self._billing.drain()
        tenant = identity.tenant or request.query_params.get("tenant")
        if tenant is not None:
            await self._billing.check_tenant(tenant)
        found = await asyncio.to_thread(self._contracts.all)
        shown = [(c, drawn) for c, drawn in found if tenant in (None, c.tenant)]
        return answer(Listing([await self._view(contract, drawn) for contract, drawn in shown]))

    async def contract(self, request: Request, identity: Identity) -> Response:
        """One commitment: what is left of it, when it ends, who was alerted."""
        wanted = request.path_params["contract"]
        await self._billing.drain()
        for contract, drawn in await asyncio.to_thread(self._contracts.all):
            if contract.id == wanted and identity.may_read(contract.tenant):
                return answer(await self._view(contract, drawn))
        raise Refusal("not_found", f"there is no contract {wanted[:64]!r}")

    async def create(self, request: Request, identity: Identity) -> Response:
        """Sell a tenant tokens in advance; its price is on the invoice of the period it is made in."""
        body = await body_as(request, ContractCreate)
        self._check_tenant(body.tenant)
        if body.overage_plan is not None:
            plans = {version.plan for version in await asyncio.to_thread(self._billing.prices.versions)} - {""}
            if body.overage_plan not in plans:
                message = f"`overage_plan`: {body.overage_plan!r}; accepted: {', '.join(sorted(plans))}"
                raise Refusal("invalid_request", message, param="overage_plan")
        contract, made_secret = contract_of(body, self._billing.clock.now_ms())
        others = {c.id: c for c, _ in await asyncio.to_thread(self._contracts.all)}
        before = others.pop(contract.id, None)
        if before is not None:
            contract = _same_again(contract, before, made_secret is not None)
        _check_agrees(contract, others.values())
        await asyncio.to_thread(self._contracts.add, contract, purchase(contract))
        view = await self._view(contract, Drawn())
        return answer(ContractCreated(contract=view, alert_secret=made_secret if before is None else None), status=201)

    async def credit(self, request: Request, identity: Identity) -> Response:
        """Give a tenant credit: so much less to pay, on the invoice of the present period."""
        body = await body_as(request, CreditCreate)
        self._check_tenant(body.tenant)
        amount = _usd("usd", body.usd)
        entries = (Entry(tenant_account(body.tenant), 0, -amount), Entry(CREDITS, 0, amount))
        name = f"credit/{body.id or secrets.token_hex(6)}"
        now_ms = self._billing.clock.now_ms()
        adjustment = Adjustment(name, "credit", "", body.tenant, now_ms, entries, note=body.note)
        if not await asyncio.to_thread(self._contracts.adjust, [adjustment]):
            raise Refusal("conflict", f"there is a credit {body.id!r} already", param="id")
        return answer(adjustment_view(adjustment), status=201)

    def _check_tenant(self, tenant: str) -> None:
        if tenant not in self._billing.tenants():
            raise Refusal("not_found", f"`tenant`: there is no tenant {tenant!r}", param="tenant")

    async def _view(self, contract: Contract, drawn: Drawn) -> ContractView:
        alerts = await asyncio.to_thread(self._contracts.alerts, contract.id)
        return contract_view(contract, drawn, alerts, self._billing.clock.now_ms())


def contract_of(body: ContractCreate, now_ms: int) -> tuple[Contract, str | None]:
    """The contract a body asks for, and the secret that was made for it. Raises Refusal naming the field."""
    starts_ms = now_ms if body.starts is None else parse_instant("starts", body.starts)
    expires_ms = parse_instant("expires", body.expires)
    if starts_ms < now_ms:
        message = f"`starts`: {body.starts!r} is in the past; accepted: {iso(now_ms)} or later"
        raise Refusal("invalid_request", message, param="starts")
    if expires_ms <= starts_ms:
        message = f"`expires`: {body.expires!r} is not after it starts ({iso(starts_ms)})"
        raise Refusal("invalid_request", message, param="expires")
    if bool(body.rollover_percent) is not bool(body.rollover_days):
        message = "`rollover_percent` and `rollover_days` go together: how much stays spendable, and for how long"
        raise Refusal("invalid_request", message, param="rollover_days")
    refuses = body.on_exhausted is OnExhausted.REFUSE
    if refuses and (body.rollover_percent or body.overage_plan is not None):
        field = "overage_plan" if body.overage_plan is not None else "rollover_percent"
        message = f"`{field}` does not go with `on_exhausted` refuse: what it does not cover is not served"
        raise Refusal("invalid_request", message, param=field)
    secret, made = _secret(body)
    contract = Contract(
        id=body.id or "ctr-" + secrets.token_hex(6),
        tenant=body.tenant,
        tokens=body.tokens,
        price_nano_usd=_usd("price_usd", body.price_usd),
        starts_ms=starts_ms,
        expires_ms=expires_ms,
        created_ms=now_ms,
        priority=body.priority,
        models=tuple(body.models),
        modes=tuple(mode.value for mode in body.modes),
        rollover_percent=body.rollover_percent,
        rollover_ms=body.rollover_days * MS_PER_DAY,
        overage_plan=body.overage_plan or "",
        minimum_month_nano_usd=_usd("minimum_month_usd", body.minimum_month_usd),
        alert_url=body.alert_url or "",
        alert_secret=secret,
        refuses=refuses,
    )
    return contract, secret if made else None


def contract_view(contract: Contract, drawn: Drawn, alerts: Sequence[Alert], now_ms: int) -> ContractView:
    until_ms = contract.expires_ms + contract.rollover_ms
    late = now_ms >= contract.expires_ms
    left = spendable(contract, drawn, late=late) if now_ms < until_ms else 0
    if left <= 0:
        state = "expired" if late else "exhausted"
    else:
        state = "coming" if now_ms < contract.starts_ms else "rollover" if late else "active"
    used = drawn.used + drawn.rolled
    return ContractView(
        id=contract.id,
        tenant=contract.tenant,
        state=state,
        tokens=contract.tokens,
        used_tokens=used,
        lapsed_tokens=drawn.lapsed,
        left_tokens=max(0, left),
        percent_used=used * 100 // contract.tokens,
        price_usd=usd(contract.price_nano_usd),
        worth_left_usd=usd(contract.price_nano_usd - worth(contract, drawn.total)),
        starts=iso(contract.starts_ms),
        expires=iso(contract.expires_ms),
        rollover_until=iso(until_ms) if contract.rollover_percent else None,
        rollover_percent=contract.rollover_percent,
        priority=contract.priority,
        models=list(contract.models),
        modes=list(contract.modes),
        overage_plan=contract.overage_plan,
        on_exhausted=OnExhausted.REFUSE if contract.refuses else OnExhausted.OVERAGE,
        minimum_month_usd=usd(contract.minimum_month_nano_usd),
        alerts_to=contract.alert_url,
        alerts=[
            AlertView(percent=a.percent, at_ms=a.at_ms, attempts=a.attempts, ended_ms=a.ended_ms, outcome=a.outcome)
            for a in alerts
        ],
    )


def adjustment_view(adjustment: Adjustment) -> AdjustmentView:
    return AdjustmentView(
        id=adjustment.id,
        kind=adjustment.kind,
        reference=adjustment.reference,
        tenant=adjustment.tenant,
        endpoint=adjustment.endpoint,
        mode=adjustment.mode,
        at_ms=adjustment.at_ms,
        quantity=adjustment.quantity,
        nano_usd=adjustment.nano_usd,
        usd=usd(adjustment.nano_usd),
        note=adjustment.note,
    )


def _check_agrees(contract: Contract, others: Iterable[Contract]) -> None:
    """One request cannot be refused by one contract and let through by another."""
    for other in others:
        meet = contract.starts_ms < other.expires_ms + other.rollover_ms and other.starts_ms < contract.expires_ms
        terms = ((contract.models, other.models), (contract.modes, other.modes))
        shared = all(not mine or not theirs or set(mine) & set(theirs) for mine, theirs in terms)
        if meet and shared and contract.tenant == other.tenant and contract.refuses is not other.refuses:
            message = f"contract {other.id!r} may pay for the same requests and has the other `on_exhausted`"
            raise Refusal("conflict", message, param="on_exhausted")


def _same_again(contract: Contract, before: Contract, made: bool) -> Contract:
    """The same call again is the same contract, although the clock has moved on and another secret was made."""
    starts_ms = before.starts_ms if contract.starts_ms == contract.created_ms else contract.starts_ms
    secret = before.alert_secret if made else contract.alert_secret
    return replace(contract, created_ms=before.created_ms, starts_ms=starts_ms, alert_secret=secret)


def _secret(body: ContractCreate) -> tuple[str, bool]:
    """The secret alerts are signed with, and whether it was made here."""
    if body.alert_url is None:
        if body.alert_secret is not None:
            raise Refusal("invalid_request", "`alert_secret` needs `alert_url`", param="alert_url")
        return "", False
    if urlsplit(body.alert_url).scheme not in ("http", "https") or not urlsplit(body.alert_url).hostname:
        raise Refusal("invalid_request", "`alert_url`: accepted: an http or https URL", param="alert_url")
    if body.alert_secret is None:
        return webhooks.SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode(), True
    try:
        webhooks.secret_bytes(body.alert_secret)
    except ValueError as error:
        raise Refusal("invalid_request", f"`alert_secret`: {error}", param="alert_secret") from None
    return body.alert_secret, False


def _usd(field: str, text: str) -> int:
    try:
        return nano_usd(text)
    except ValueError as error:
        raise Refusal("invalid_request", f"`{field}`: {error}", param=field) from None
