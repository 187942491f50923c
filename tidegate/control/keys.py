"""API keys: made here, shown once, kept as a digest."""

import hashlib
import secrets

from tidegate.domain.endpoint import ApiKey

SECRET_PREFIX = "tg-"
SECRET_BYTES = 32
HINT_CHARS = 4


def digest(secret: str) -> str:
    """Hex SHA-256. A secret has 256 random bits: a slow password hash would add nothing but time to each request."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(tenant: str | None, now_ms: int, *, expires_ms: int | None = None, secret: str = "") -> tuple[ApiKey, str]:
    """A key of `tenant` (None: an administrator's) and its secret, which is `secret` where an operator chose one."""
    secret = secret or SECRET_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    key = ApiKey(
        id="key-" + secrets.token_hex(6),
        tenant=tenant,
        digest=digest(secret),
        hint=secret[-HINT_CHARS:],
        created_ms=now_ms,
        expires_ms=expires_ms,
    )
    return key, secret


def key_state(key: ApiKey, now_ms: int) -> str:
    """active | expired | revoked."""
    if key.revoked_ms is not None:
        return "revoked"
    return "expired" if key.expires_ms is not None and key.expires_ms <= now_ms else "active"
