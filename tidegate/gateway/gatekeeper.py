"""What is decided about a request before anything is held for it: whose key, which endpoint, whether it may ask now."""

from tidegate.domain.errors import Refusal
from tidegate.domain.ports import Journal
from tidegate.gateway.intake import Call, Head, acting_for, check_size, hold_ms
from tidegate.gateway.limits import GatewayLimits
from tidegate.gateway.loop import GatewayLoop
from tidegate.quota import admission, routing
from tidegate.wire import openai
from tidegate.wire.internal import EndpointEntry, KeyEntry

_STREAMING = frozenset({"chat/completions", "completions"})


class Gatekeeper:
    """Every method returns at once, and raises the Refusal of what may not come in."""

    def __init__(self, loop: GatewayLoop, journal: Journal, limits: GatewayLimits) -> None:
        self._loop = loop
        self._journal = journal
        self._limits = limits

    def check_informed(self) -> None:
        if not self._loop.informed:
            raise Refusal("not_ready", "the gateway has not heard from the control plane yet", retry_after_ms=1_000)

    def check_journal(self) -> None:
        """Before a record could be lost: what cannot be recorded is not served."""
        if not self._journal.healthy:
            raise Refusal("journal_unavailable", "the usage journal cannot be written", retry_after_ms=1_000)

    def authenticate(self, head: Head, now_ms: int) -> KeyEntry:
        self.check_informed()
        return admission.check_key(self._loop.key(head.digest), now_ms)

    def endpoint(self, api: str, tenant: str, model: str, request_id: str) -> EndpointEntry:
        """What `tenant` calls `model`, or its canary where `request_id` is of the share that one gets."""
        entry = self._resolve(api, tenant, model)
        if entry.canary and routing.to_canary(entry.canary_permille, request_id):
            return self._loop.endpoints.get(entry.canary, entry)
        return entry

    def admit(
        self,
        api: str,
        head: Head,
        key: KeyEntry,
        body: bytes,
        request_id: str,
        arrived_ms: int,
        session: EndpointEntry | None = None,
    ) -> Call:
        """`session` is the endpoint of a session's response, which was chosen when the session began."""
        line = ""
        if key.runner:
            tenant, key_id, line = acting_for(head)
        else:
            tenant, key_id = admission.tenant_of(key), key.id
        self.check_journal()
        check_size(body, self._limits.body_bytes_max)
        request = openai.parse_head(body)
        if session is not None:
            entry = session
            admission.check_kind(api, entry.kind, request.model)
        elif line:
            entry = self._loop.batch_lane(self._resolve(api, tenant, request.model))
        else:
            entry = self.endpoint(api, tenant, request.model, request_id)
        options = request.stream_options
        call = Call(
            id=request_id,
            api=api,
            key=key_id,
            tenant=tenant,
            entry=entry,
            body=body,
            stream=bool(request.stream) and api in _STREAMING,
            wants_usage=options is not None and options.get("include_usage") is True,
            arrived_ms=arrived_ms,
            wait_ms=hold_ms(head, entry, self._limits),
            wants_each_usage=options is not None and options.get("continuous_usage_stats") is True,
            line=line,
        )
        limiter = self._loop.limiter
        if limiter.gate.active:
            call.hold = limiter.admit(call, request)  # last: whatever it takes, the relay gives back
        return call

    def _resolve(self, api: str, tenant: str, model: str) -> EndpointEntry:
        entry = routing.resolve(self._loop.endpoints, tenant, model)
        admission.check_kind(api, entry.kind, model)
        return entry
