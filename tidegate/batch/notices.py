"""Telling a tenant that a batch has ended: one signed webhook, tried again with growing pauses, then given up."""

import asyncio
import hashlib
import logging

import httpx
import msgspec

from tidegate.batch.ports import Webhook
from tidegate.domain.ports import Clock
from tidegate.wire import webhooks
from tidegate.wire.batch import StoredBatch

TRIES_MAX = 8
PAUSE_S_MIN, PAUSE_S_MAX = 1.0, 300.0
ANSWER_S_MAX = 10.0

log = logging.getLogger(__name__)


async def deliver(batch: StoredBatch, webhook: Webhook, clock: Clock) -> bool:
    """True once it was taken (any 2xx). The event's id is the same at every try, so that a receiver can drop copies."""
    event_id = "evt_" + hashlib.sha256(f"{batch.id}/{batch.status}".encode()).hexdigest()[:24]
    body = msgspec.json.encode(
        {
            "id": event_id,
            "object": "event",
            "type": f"batch.{batch.status}",
            "created_at": (batch.ended_ms or 0) // 1000,
            "data": {"id": batch.id},
        }
    )
    pause_s = PAUSE_S_MIN
    async with httpx.AsyncClient(timeout=ANSWER_S_MAX, follow_redirects=False) as client:
        for attempt in range(1, TRIES_MAX + 1):
            signed = webhooks.headers(webhook.secret, event_id, clock.now_ms() // 1000, body)
            try:
                response = await client.post(webhook.url, content=body, headers=signed)
                if response.is_success:
                    return True
                what = f"status {response.status_code}"
            except httpx.HTTPError as error:
                what = type(error).__name__
            log.warning("webhook of batch %s: try %d of %d: %s", batch.id, attempt, TRIES_MAX, what)
            if attempt < TRIES_MAX:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 4, PAUSE_S_MAX)
    return False
