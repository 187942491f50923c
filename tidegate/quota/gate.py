"""May this request be asked now? Rates, concurrency and budgets of its key, its tenant and its endpoint. Pure, O(1).

Everything is checked before anything is taken, so that a refused request costs nobody anything. What is taken is an
upper bound: for money, the most the request can cost. `settle` gives back what was not used, once, at its end.

Several gateways share a limit: of rates and concurrency each has its part (rounded down, at least one), of a budget
what it was leased. So their sum never exceeds the limit, or the number of gateways where that is more.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tidegate.domain.contract import Contract
from tidegate.domain.endpoint import Mode
from tidegate.domain.errors import LimitHit, Refusal
from tidegate.domain.limits import Lease, Limits, Scope, Window
from tidegate.quota.buckets import Bucket
from tidegate.quota.prepaid import rules
from tidegate.quota.purse import Allowance, Purse

CHARS_PER_TOKEN = 4  # for a rate, which is settled; never for money
CHAINS_MAX = 100_000  # combinations of key and endpoint that are remembered
BUSY_MS = 1_000  # when to come back where only an end of another request helps

Rule = tuple[Scope, str]


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request may come to. `output_tokens` is None where the client left it open (then only its end tells);
    `tokens_max` is the most it can use, prompt and answer.
    """

    body_bytes: int
    output_tokens: int | None
    cost_nano_usd: int
    tokens_max: int = 0


class Meter:
    """The state of one rule in this gateway; `contract` where that is whose tokens it counts."""

    __slots__ = ("contract", "limits", "purses", "requests", "running", "running_max", "tokens")

    def __init__(self, limits: Limits) -> None:
        self.contract: Contract | None = None
        self.limits = limits
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.running = 0
        self.running_max: int | None = None
        self.purses: dict[tuple[Window, int], Purse] = {}

    def set(self, limits: Limits, gateways: int, now_ms: int) -> None:
        """Takes over new limits; what was used stays used."""
        self.limits = limits
        self.requests = _resized(self.requests, _part(limits.requests_per_minute, gateways), now_ms)
        self.tokens = _resized(self.tokens, _part(limits.tokens_per_minute, gateways), now_ms)
        self.running_max = _part(limits.concurrency, gateways)
        before, self.purses = self.purses, {}
        for budget in limits.budgets:
            known = (budget.window, budget.since_ms)
            purse = self.purses[known] = before.get(known) or Purse(limits.scope, limits.subject, budget)
            purse.budget = budget

    @property
    def name(self) -> str:
        return f"{self.limits.scope.value} {self.limits.subject}"


@dataclass(slots=True)
class Hold:
    """What an admitted request has taken. `headers` say what is left to whoever asked."""

    meters: Sequence[Meter]
    tokens: int
    cost_nano_usd: int
    allowances: list[Allowance]
    headers: list[tuple[bytes, bytes]]
    prepaid: Allowance | None = None
    prepaid_tokens: int = 0

    @property
    def money(self) -> bool:
        """Whether what it really costs must be known at its end."""
        return bool(self.allowances) or self.prepaid is not None


class Gate:
    """`active` is False while nobody has limits: then nothing here need be asked."""

    def __init__(self) -> None:
        self.active = False
        self.gateways = 1
        self._meters: dict[Rule, Meter] = {}
        self._contracts: Sequence[Contract] = ()
        self._chains: dict[tuple[str, str, str], Sequence[Meter]] = {}

    def set(self, limits: Iterable[Limits], gateways: int, now_ms: int, contracts: Sequence[Contract] = ()) -> None:
        """Replaces all rules; `gateways` share them. Rules that stay keep what was used. `contracts` are those that
        refuse what they do not cover, in the order in which they pay.
        """
        before, self._meters = self._meters, {}
        for wanted in (*limits, *rules(contracts)):
            rule = (wanted.scope, wanted.subject)
            meter = self._meters[rule] = before.get(rule) or Meter(wanted)
            meter.set(wanted, gateways, now_ms)
        for contract in contracts:
            self._meters[Scope.CONTRACT, contract.id].contract = contract
        self._contracts = contracts
        self.gateways = gateways
        self.active = bool(self._meters)
        self._chains.clear()

    def chain(self, key: str, tenant: str, endpoint: str, model: str = "", mode: str = "") -> Sequence[Meter]:
        """The rules a request is subject to, usually none. `model` and `mode` are the endpoint's."""
        found = self._chains.get((key, endpoint, mode))
        if found is None:
            by_token = self._contracts if mode != Mode.DEDICATED else ()
            paying = [c.id for c in by_token if c.tenant == tenant and c.takes(model, mode)]
            mine = [(Scope.KEY, key), (Scope.TENANT, tenant), (Scope.ENDPOINT, endpoint)]
            mine += [(Scope.CONTRACT, contract) for contract in paying]
            found = [self._meters[rule] for rule in mine if rule in self._meters]
            if len(self._chains) >= CHAINS_MAX:
                self._chains.clear()
            self._chains[key, endpoint, mode] = found
        return found

    def admit(self, meters: Sequence[Meter], demand: Demand, now_ms: int, *, rates: bool = True) -> Hold:
        """Takes what the request may need. Refusal rate_limit_exceeded, insufficient_quota or budget_unavailable.

        Without `rates` only budgets are asked.
        """
        tokens = -(-demand.body_bytes // CHARS_PER_TOKEN) + (demand.output_tokens or 0)
        rated = meters if rates else ()
        for meter in rated:
            _check_rates(meter, tokens, now_ms)
        budgets = [purse for meter in meters if meter.contract is None for purse in meter.purses.values()]
        allowances = [purse.check(demand.cost_nano_usd, now_ms) for purse in budgets]
        prepaid = _prepaid(meters, demand.tokens_max, now_ms)
        for meter in rated:
            meter.running += 1
            if meter.requests is not None:
                meter.requests.take(1)
            if meter.tokens is not None:
                meter.tokens.take(tokens)
        for allowance in allowances:
            allowance.used += demand.cost_nano_usd
        if prepaid is not None:
            prepaid.used += demand.tokens_max
        headers = _headers(rated, now_ms)
        return Hold(rated, tokens, demand.cost_nano_usd, allowances, headers, prepaid, demand.tokens_max)

    def settle(self, hold: Hold, tokens: int, cost_nano_usd: int, now_ms: int, prepaid_tokens: int = 0) -> None:
        """The request has ended, with these tokens and this price; `prepaid_tokens` of them are paid with a contract.
        To be told once.
        """
        for meter in hold.meters:
            meter.running -= 1
            if meter.tokens is not None:
                meter.tokens.left(now_ms)
                meter.tokens.take(tokens - hold.tokens)
        for allowance in hold.allowances:
            allowance.used += cost_nano_usd - hold.cost_nano_usd
        if hold.prepaid is not None:
            hold.prepaid.used += prepaid_tokens - hold.prepaid_tokens

    def leased(self, leases: Iterable[Lease], until_ms: int) -> None:
        """Control's word on what this gateway may spend, good until `until_ms`."""
        for meter in self._meters.values():
            for purse in meter.purses.values():
                purse.until_ms = until_ms
        for lease in leases:
            scope, subject, window, since_ms, _ = lease.of
            rule = self._meters.get((scope, subject))
            if rule is not None and (window, since_ms) in rule.purses:
                rule.purses[window, since_ms].leased(lease)

    def leases(self) -> tuple[Lease, ...]:
        """What it holds and has used, for control."""
        purses = [purse for meter in self._meters.values() for purse in meter.purses.values()]
        return tuple(lease for purse in purses for lease in purse.leases())


def _prepaid(meters: Sequence[Meter], tokens: int, now_ms: int) -> Allowance | None:
    """The first contract in force with room for all of it; None where none is in force. Refusal insufficient_quota."""
    refusal: Refusal | None = None
    for meter in meters:
        contract = meter.contract
        if contract is not None and contract.starts_ms <= now_ms < contract.expires_ms:
            try:
                return next(iter(meter.purses.values())).check(tokens, now_ms)
            except Refusal as refused:
                refusal = refused
    if refusal is not None:
        raise refusal
    return None


def _part(limit: int | None, gateways: int) -> int | None:
    return None if limit is None else max(1, limit // gateways)


def _resized(bucket: Bucket | None, full: int | None, now_ms: int) -> Bucket | None:
    if full is None:
        return None
    if bucket is None:
        return Bucket(full, now_ms)
    bucket.left(now_ms)
    bucket.resize(full)
    return bucket


def _check_rates(meter: Meter, tokens: int, now_ms: int) -> None:
    if meter.running_max is not None and meter.running >= meter.running_max:
        hit = LimitHit("concurrency", meter.running, meter.running_max)
        text = f"{meter.name}: {hit.current} requests run at once, which is the limit"
        raise Refusal("rate_limit_exceeded", text, retry_after_ms=BUSY_MS, limit=hit, headers=_shown(meter, now_ms))
    bucket = meter.requests
    if bucket is not None and (left := bucket.left(now_ms)) < 1:
        hit = LimitHit("rpm", bucket.full - left, bucket.full)
        text = f"{meter.name}: {bucket.full} requests a minute is the limit"
        headers = _shown(meter, now_ms)
        raise Refusal("rate_limit_exceeded", text, retry_after_ms=bucket.wait_ms(1), limit=hit, headers=headers)
    bucket = meter.tokens
    if bucket is None:
        return
    left = bucket.left(now_ms)
    if tokens <= left:
        return
    headers = _shown(meter, now_ms)
    if tokens > bucket.full:
        hit = LimitHit("tpm", tokens, bucket.full)
        text = f"{meter.name}: this request may need {tokens} tokens, more than the limit of {bucket.full} a minute"
        raise Refusal("rate_limit_exceeded", text, param="max_tokens", limit=hit, headers=headers | _NO_RETRY)
    hit = LimitHit("tpm", bucket.full - left, bucket.full)
    text = f"{meter.name}: {bucket.full} tokens a minute is the limit, and this request may need {tokens}"
    raise Refusal("rate_limit_exceeded", text, retry_after_ms=bucket.wait_ms(tokens), limit=hit, headers=headers)


_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's SDKs obey it


def _shown(meter: Meter, now_ms: int) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in _headers([meter], now_ms)}


def _headers(meters: Sequence[Meter], now_ms: int) -> list[tuple[bytes, bytes]]:
    """OpenAI's ``x-ratelimit-*``, of whichever limit leaves least."""
    requests: Bucket | None = None
    tokens: Bucket | None = None
    fewest_requests = fewest_tokens = 0
    for meter in meters:
        bucket = meter.requests
        if bucket is not None:
            left = bucket.left(now_ms)
            if requests is None or left < fewest_requests:
                requests, fewest_requests = bucket, left
        bucket = meter.tokens
        if bucket is not None:
            left = bucket.left(now_ms)
            if tokens is None or left < fewest_tokens:
                tokens, fewest_tokens = bucket, left
    headers: list[tuple[bytes, bytes]] = []
    if requests is not None:
        headers += (
            (b"x-ratelimit-limit-requests", b"%d" % requests.full),
            (b"x-ratelimit-remaining-requests", b"%d" % max(0, fewest_requests)),
            (b"x-ratelimit-reset-requests", duration(requests.wait_ms(requests.full)).encode()),
        )
    if tokens is not None:
        headers += (
            (b"x-ratelimit-limit-tokens", b"%d" % tokens.full),
            (b"x-ratelimit-remaining-tokens", b"%d" % max(0, fewest_tokens)),
            (b"x-ratelimit-reset-tokens", duration(tokens.wait_ms(tokens.full)).encode()),
        )
    return headers


def duration(ms: int) -> str:
    """As OpenAI writes it: ``6m0s``, ``1s``, ``120ms``."""
    if ms < 1_000:
        return f"{ms}ms"
    minutes, rest = divmod(-(-ms // 1_000), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
