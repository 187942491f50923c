"""`/api/v1/advice`: the advisor on the platform's own ledger. Assembled here, because neither control nor billing may
know the advisor.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tidegate.billing.http import Authorize, body_of
from tidegate.billing.periods import Period, parse_period
from tidegate.billing.service import Billing
from tidegate.domain.errors import Refusal
from tidegate.domain.ledger import Charged
from tidegate.domain.price import PriceVersion
from tidegate.domain.units import MS_PER_DAY
from tidegate.money.prices import PriceTable

ROWS_MAX = 100_000
PAGE_ROWS = 5_000
BODY_BYTES_MAX = 8 << 20
WAITING_MAX = 4
DAYS = 30
NUMBERS = ("slo_ttft_ms", "tpot_ms", "async_share")
COUNTS = ("side_by_side", "requests_per_day", "input_tokens", "output_tokens", "service_ms", "models")
SWITCHES = ("private", "promised", "models_apart")
QUERY = ("endpoint", "model", "provider", "current", "side_by_side", "period", "from", "to", *NUMBERS, *SWITCHES)
DESCRIBED = ("shape", "requests_per_day", "input_tokens", "output_tokens", "service_ms", "models", "csv", "timezone")


def advice_routes(billing: Billing, authorize: Authorize) -> list[Route]:
    api = _Api(billing, authorize)
    return [
        Route("/api/v1/advice", api.live, methods=["GET"]),
        Route("/api/v1/advice", api.described, methods=["POST"]),
    ]


class _Api:
    """One answer is worked out at a time, beside the loop; at most `WAITING_MAX` wait for their turn."""

    def __init__(self, billing: Billing, authorize: Authorize) -> None:
        self._billing = billing
        self._authorize = authorize
        self._turn = asyncio.Lock()
        self._waiting = 0

    async def live(self, request: Request) -> Response:
        """Which mode is cheapest for what the ledger has: of a period (30 days), one endpoint or all, at a target."""
        tenant = self._authorize(request, False).tenant
        for name in request.query_params:
            if name not in QUERY:
                raise _bad(name, f"is not a parameter (accepted: {', '.join(QUERY)})")
        query = dict(request.query_params)
        now_ms = self._billing.clock.now_ms()
        start = query.pop("from", None)
        if start is None and "period" not in query:
            start = str(now_ms - DAYS * MS_PER_DAY)
        period = parse_period(query.pop("period", None), start, query.pop("to", None), now_ms)
        endpoint = query.pop("endpoint", None)
        options = _options(query)
        await self._billing.drain()
        return await self._answer(lambda: self._from_ledger(tenant, period, endpoint, options, now_ms))

    async def described(self, request: Request) -> Response:
        """Advice for a described shape, or for a trace sent as CSV text in `csv`, at this platform's prices."""
        self._authorize(request, False)
        body = await body_of(request, BODY_BYTES_MAX)
        try:
            asked = msgspec.json.decode(body, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise Refusal("invalid_json", f"the body is not a JSON object: {error}") from None
        unknown = [name for name in asked if name not in (*QUERY, *DESCRIBED)]
        if unknown:
            raise _bad(unknown[0], f"is not known (accepted: {', '.join((*DESCRIBED, *QUERY))})")
        for name, value in asked.items():
            _check_kind(name, value)
        if "csv" not in asked and "shape" not in asked:
            raise _bad("shape", "say a shape (business-hours, spiky, steady, mixed) or send a trace as `csv`")
        return await self._answer(lambda: self._from_body(asked))

    async def _answer(self, work: Callable[[], dict[str, Any]]) -> Response:
        if self._waiting >= WAITING_MAX:
            raise Refusal("queue_full", f"{WAITING_MAX} questions are being answered already", retry_after_ms=10_000)
        self._waiting += 1
        try:
            async with self._turn:
                answer = await asyncio.to_thread(work)
        except ModuleNotFoundError as error:
            raise Refusal("not_ready", f"advice needs the 'advisor' extra ({error.name} is not installed)") from None
        finally:
            self._waiting -= 1
        return Response(msgspec.json.encode(answer), media_type="application/json")

    def _from_ledger(
        self, tenant: str | None, period: Period, endpoint: str | None, options: Mapping[str, Any], now_ms: int
    ) -> dict[str, Any]:
        from tidegate.advisor import live, question

        charged = self._charged(period, tenant)
        traffic = question.only(live.traffic_of(charged, min(now_ms, period.end_ms)), endpoint)
        versions = self._billing.prices.versions()
        answer = self._advise(traffic, options, versions, now_ms)
        invoices = [self._billing.statements.invoice(tenant, period, now_ms)] if tenant is not None else (
            self._billing.statements.invoices(period, now_ms)
        )  # fmt: skip
        plain = [msgspec.to_builtins(invoice) for invoice in invoices]
        answer["bill"] = live.bill(plain, charged, {version.id: version for version in versions})
        mine = [c for c in charged if endpoint in (None, c.record.endpoint, c.record.overflow_from)]
        answer["measured"] = live.measured(mine)
        return answer

    def _from_body(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        from tidegate.advisor import described, question, read

        now_ms = self._billing.clock.now_ms()
        service_ms = float(asked.get("service_ms", 0.0))
        if "csv" in asked:
            how = read.Reading(timezone=asked.get("timezone"), service_ms=service_ms or None)
            traffic = question.only(read.read_csv("csv", str(asked["csv"]), how), asked.get("endpoint"))
        else:
            if float(asked.get("requests_per_day", 0.0)) * 7 > ROWS_MAX:  # before a week of them is made
                raise _bad("requests_per_day", f"at most {ROWS_MAX // 7:,} here: run `tidegate advise --shape`")
            traffic = described.describe(
                str(asked["shape"]), float(asked.get("requests_per_day", 10_000)), int(asked.get("input_tokens", 500)),
                int(asked.get("output_tokens", 150)), service_ms=service_ms, models=int(asked.get("models", 1)),
            )  # fmt: skip
        if len(traffic) > ROWS_MAX:
            raise _bad("csv", f"{len(traffic):,} requests; at most {ROWS_MAX:,} here: run `tidegate advise --trace`")
        return self._advise(traffic, asked, self._billing.prices.versions(), now_ms)

    def _advise(self, traffic: Any, options: Mapping[str, Any], versions: Any, now_ms: int) -> dict[str, Any]:
        from tidegate.advisor import catalogue, live, question
        from tidegate.advisor.advise import advise

        today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
        price: PriceVersion | None = PriceTable(versions).in_force("default", now_ms)
        offers = live.with_own_prices(catalogue.load(), price, today)
        return advise(traffic, offers, question.build(options), today)

    def _charged(self, period: Period, tenant: str | None) -> list[Charged]:
        found: list[Charged] = []
        after = (-1, 0)
        while rows := self._billing.ledger.records(period.start_ms, period.end_ms, tenant, after, PAGE_ROWS):
            found += rows
            after = (rows[-1].record.arrived_ms, rows[-1].number)
            if len(found) > ROWS_MAX:
                more = "name a shorter period, or `tidegate usage export` and `tidegate advise --trace`"
                raise _bad("from", f"more than {ROWS_MAX:,} requests in the period: {more}")
        return found


def _options(query: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {k: v for k, v in query.items() if k in ("model", "current")}
    for name in (*NUMBERS, "side_by_side"):
        if name in query:
            try:
                found[name] = float(query[name])
            except ValueError:
                raise _bad(name, f"{query[name][:40]!r} is not a number") from None
    for name in SWITCHES:
        if name in query:
            if query[name].lower() not in ("true", "false", "1", "0"):
                raise _bad(name, f"{query[name][:40]!r} (accepted: true, false)")
            found[name] = query[name].lower() in ("true", "1")
    if "provider" in query:
        found["provider"] = [name for name in query["provider"].split(",") if name]
    return found


def _check_kind(name: str, value: Any) -> None:
    """Refuses a value of another kind than `name` has; values themselves are judged by whoever uses them."""
    if name in (*NUMBERS, *COUNTS):
        fits, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif name in SWITCHES:
        fits, kind = isinstance(value, bool), "true or false"
    elif name == "provider":
        fits, kind = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of names"
    else:
        fits, kind = isinstance(value, str), "a text"
    if not fits:
        raise _bad(name, f"{str(value)[:40]!r} is not {kind}")


def _bad(name: str, what: str) -> Refusal:
    return Refusal("invalid_request", f"`{name[:40]}`: {what}", param=name[:40])
