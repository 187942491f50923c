"""Tenants and API keys: how they come and go. Every act is in the audit log, with who did it."""

from dataclasses import replace

from tidegate.control import keys
from tidegate.control.activity import ActivityLog
from tidegate.control.desired import DesiredState
from tidegate.domain.endpoint import ApiKey, Tenant
from tidegate.domain.errors import Refusal
from tidegate.domain.limits import Scope
from tidegate.domain.ports import Change, Clock, State


class Tenancy:
    """`actor` goes to the audit log. Every method may raise StoreFault."""

    def __init__(self, desired: DesiredState, activity: ActivityLog, clock: Clock) -> None:
        self._desired = desired
        self._activity = activity
        self._clock = clock

    async def create_tenant(self, tenant: str, actor: str) -> Tenant:
        """Idempotent."""
        made = Tenant(tenant, self._clock.now_ms())
        await self._desired.change(lambda state: None if _has(state, tenant) else Change(put=(made,)))
        found = self._desired.tenant(tenant)
        assert found is not None
        if found is made:
            self._activity.note(actor, "tenant_created", tenant, "")
        return found

    async def remove_tenant(self, tenant: str, actor: str) -> None:
        """Its keys go with it. Refusal not_found, or conflict while it has endpoints."""

        def build(state: State) -> Change:
            if not _has(state, tenant):
                raise Refusal("not_found", f"there is no tenant {tenant!r}")
            owned = [d.endpoint for d in state.deployments if d.tenant == tenant]
            if owned:
                raise Refusal("conflict", f"tenant {tenant!r} still has endpoints: {', '.join(owned[:10])}")
            mine = {k.id for k in state.keys if k.tenant == tenant}
            gone = [r for r in state.limits if r.subject in ({tenant} if r.scope is Scope.TENANT else mine)]
            return Change(remove_tenants=(tenant,), remove_limits=tuple((r.scope, r.subject) for r in gone))

        await self._desired.change(build)
        self._activity.note(actor, "tenant_removed", tenant, "")

    async def create_key(
        self, tenant: str | None, actor: str, *, expires_in_s: int | None = None
    ) -> tuple[ApiKey, str]:
        """A key and its secret, which is not kept. `tenant` None: an administrator's. Refusal not_found."""
        now_ms = self._clock.now_ms()
        expires_ms = None if expires_in_s is None else now_ms + expires_in_s * 1_000
        key, secret = keys.new_key(tenant, now_ms, expires_ms=expires_ms)

        def build(state: State) -> Change:
            if tenant is not None and not _has(state, tenant):
                raise Refusal("not_found", f"there is no tenant {tenant!r}", param="tenant")
            return Change(put=(key,))

        await self._desired.change(build)
        self._activity.note(actor, "key_created", tenant or "admin", f"key={key.id}")
        return key, secret

    async def revoke_key(self, key_id: str, actor: str) -> ApiKey:
        """From now on it is refused. Idempotent. Refusal not_found, or conflict for the last administrator's."""
        now_ms = self._clock.now_ms()

        def build(state: State) -> Change | None:
            key = _key(state, key_id)
            if key.revoked_ms is not None:
                return None
            usable = [k for k in state.keys if k.tenant is None and keys.key_state(k, now_ms) == "active"]
            if usable == [key]:
                raise Refusal("conflict", "this is the last usable administrator key: create another one first")
            return Change(put=(replace(key, revoked_ms=now_ms),))

        key = _key(await self._desired.change(build), key_id)
        if key.revoked_ms == now_ms:
            self._activity.note(actor, "key_revoked", key.tenant or "admin", f"key={key_id}")
        return key


def _has(state: State, tenant: str) -> bool:
    return any(known.id == tenant for known in state.tenants)


def _key(state: State, key_id: str) -> ApiKey:
    key = next((known for known in state.keys if known.id == key_id), None)
    if key is None:
        raise Refusal("not_found", f"there is no key {key_id!r}")
    return key
