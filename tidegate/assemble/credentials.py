"""The keys of a first start: made once, kept in the data directory (mode 0600), found again at each later start."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tidegate.config import Config
from tidegate.control.keys import digest, key_state, new_key
from tidegate.domain.endpoint import ApiKey, Tenant
from tidegate.domain.ports import Change, State, StateStore

FILE = "credentials.json"
DEMO_TENANT = "demo"
_ADMIN = ""  # the administrator's place in the file, beside tenant ids


@dataclass(frozen=True, slots=True)
class Credentials:
    """Secrets in clear, for the ready file. `api_keys` is by tenant, in the order of their declaration.

    `demo_is_new`: there is a demo tenant and no endpoint at all yet, so its endpoints are to be made.
    """

    admin_key: str
    api_keys: dict[str, str]
    demo_is_new: bool

    def __repr__(self) -> str:
        return f"Credentials(tenants={list(self.api_keys)})"


def ensure(store: StateStore, config: Config, data_dir: Path, now_ms: int) -> Credentials:
    """Makes tenants and keys that are declared (or the demo tenant's) and missing. Raises StoreFault."""
    state = store.load()
    secrets = _Secrets(state, _read(data_dir / FILE), now_ms)
    configured = {tenant.id: tenant.api_key for tenant in config.tenants}
    if _wants_demo(config, state):
        configured.setdefault(DEMO_TENANT, None)
    known = {tenant.id for tenant in state.tenants}
    put: list[Tenant | ApiKey] = [Tenant(tenant, now_ms) for tenant in configured if tenant not in known]
    admin = secrets.of(None, config.admin_key.get_secret_value() if config.admin_key else "")
    keys = {t: secrets.of(t, secret.get_secret_value() if secret else "") for t, secret in configured.items()}
    put += secrets.made
    if put:
        store.commit(state.version, Change(put=tuple(put)))
    write_private(data_dir / FILE, json.dumps({_ADMIN: admin, **keys}))
    return Credentials(admin, keys, demo_is_new=DEMO_TENANT in keys and not state.deployments)


class _Secrets:
    """Finds the secret of a key that works, or makes the key."""

    def __init__(self, state: State, saved: dict[str, str], now_ms: int) -> None:
        self._active = {(k.tenant, k.digest) for k in state.keys if key_state(k, now_ms) == "active"}
        self._saved, self._now_ms = saved, now_ms
        self.made: list[ApiKey] = []

    def of(self, tenant: str | None, configured: str) -> str:
        secret = configured or self._saved.get(tenant or _ADMIN, "")
        if secret and (tenant, digest(secret)) in self._active:
            return secret
        key, secret = new_key(tenant, self._now_ms, secret=configured)
        self.made.append(key)
        return secret


def _wants_demo(config: Config, state: State) -> bool:
    """On the first start only; later for as long as its tenant is there."""
    if not config.demo or config.endpoints or config.tenants:
        return False
    return not state.tenants or any(tenant.id == DEMO_TENANT for tenant in state.tenants)


def _read(path: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError):
        return {}  # damaged: new keys are made, the old ones stay valid for whoever knows them


def write_private(path: Path, text: str) -> None:
    """Writes `text` whole or not at all, readable by this user only. Raises OSError."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
