"""Signed webhooks: the headers of one delivery (www.standardwebhooks.com, which OpenAI's SDK verifies). Pure."""

import base64
import binascii
import hashlib
import hmac

SECRET_PREFIX = "whsec_"


def secret_bytes(secret: str) -> bytes:
    """The key in ``whsec_BASE64``. ValueError when it is not one of 16 bytes or more."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) < 16:
        raise ValueError(f"a webhook secret is {SECRET_PREFIX} and the base64 of 16 bytes or more")
    return key


def headers(secret: str, event_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """HMAC-SHA256 over id, timestamp and body: a delivery can be neither altered nor replayed much later."""
    signed = f"{event_id}.{timestamp_s}.".encode() + body
    digest = hmac.new(secret_bytes(secret), signed, hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }
