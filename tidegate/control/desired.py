"""The one writer of desired state. What gates a change is read inside the commit that makes it, never before."""

import asyncio
from collections.abc import Awaitable, Callable

from tidegate.domain.endpoint import ApiKey, Deployment, Tenant
from tidegate.domain.errors import CommitConflict, Refusal
from tidegate.domain.ports import Change, State, StateStore

COMMIT_TRIES_MAX = 8

Build = Callable[[State], Change | None]
"""What to change given the present state, None for nothing. Raises Refusal. Run again when a commit conflicts."""

Changed = Callable[[State, State], Awaitable[None]]
"""Told (before, after) of each commit, in order."""


class DesiredState:
    """Tenants, keys and deployments as last committed. Readers use the properties; writers go through `change`."""

    def __init__(self, store: StateStore, changed: Changed) -> None:
        self._store = store
        self._changed = changed
        self._writing = asyncio.Lock()
        self._keys: dict[str, ApiKey] = {}
        self._deployments: dict[str, Deployment] = {}
        self._tenants: dict[str, Tenant] = {}
        self.state = State(0)

    async def load(self) -> State:
        """Reads everything. Raises StoreFault."""
        async with self._writing:
            self._keep(await asyncio.to_thread(self._store.load))
        return self.state

    async def change(self, build: Build) -> State:
        """Commits what `build` says. Raises its Refusal, StoreFault, or Refusal conflict when others keep winning."""
        async with self._writing:
            for _ in range(COMMIT_TRIES_MAX):
                before = self.state
                change = build(before)
                if change is None:
                    return before
                try:
                    after = await asyncio.to_thread(self._store.commit, before.version, change)
                except CommitConflict:
                    self._keep(await asyncio.to_thread(self._store.load))
                    await self._changed(before, self.state)
                    continue
                self._keep(after)
                await self._changed(before, after)
                return after
        raise Refusal("conflict", "somebody else keeps changing this; read it again and retry")

    def key(self, digest: str) -> ApiKey | None:
        return self._keys.get(digest)

    def tenant(self, tenant: str) -> Tenant | None:
        return self._tenants.get(tenant)

    def deployment(self, endpoint: str) -> Deployment | None:
        return self._deployments.get(endpoint)

    def _keep(self, state: State) -> None:
        self.state = state
        self._keys = {key.digest: key for key in state.keys}
        self._deployments = {deployment.endpoint: deployment for deployment in state.deployments}
        self._tenants = {tenant.id: tenant for tenant in state.tenants}
