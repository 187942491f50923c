"""HTTP to an engine's control API where it listens. Not the hot path: no tenant's request passes here."""

import asyncio
import json
from typing import Any

import httpx

from tidegate.domain.errors import EngineFault


class ControlClient:
    """Few connections to one engine, kept alive. Every call is bounded by its `ms_max`; EngineFault says what failed.

    `address` is ``unix:PATH`` or ``tcp:HOST:PORT``.
    """

    def __init__(self, address: str) -> None:
        kind, _, place = address.partition(":")
        uds = place if kind == "unix" else None
        # Behind a Unix socket the base URL's host is never resolved.
        base = "http://engine" if uds else f"http://{place}"
        transport = httpx.AsyncHTTPTransport(uds=uds, verify=False, limits=httpx.Limits(max_connections=4))
        self._client = httpx.AsyncClient(transport=transport, base_url=base, timeout=None)

    async def get(self, path: str, *, ms_max: int) -> dict[str, Any]:
        return await self._call("GET", path, ms_max)

    async def post(self, path: str, *, ms_max: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await self._call("POST", path, ms_max, body)

    async def fetch(
        self, method: str, path: str, *, ms_max: int, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Status and body as they are. EngineFault when none comes in time, NotListening when nobody accepts."""
        what = _what(path)
        try:
            async with asyncio.timeout(ms_max / 1000):
                response = await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise EngineFault(f"no answer to {what} within {ms_max} ms") from error
        except httpx.TransportError as error:
            raise NotListening(f"{what}: connection to the engine failed") from error
        return response.status_code, response.content

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, method: str, path: str, ms_max: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
        what = _what(path)
        status, content = await self.fetch(method, path, ms_max=ms_max, body=body)
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise EngineFault(f"{what}: the engine answered nonsense") from error
        if not isinstance(answer, dict):
            raise EngineFault(f"{what}: the engine answered nonsense")
        if status != 200:
            raise EngineFault(f"{what}: {_message(answer) or f'the engine answered {status}'}")
        return answer


class NotListening(EngineFault):
    """Nobody accepts on the socket: the engine is not up yet, or no longer."""


def _what(path: str) -> str:
    return path.partition("?")[0].rpartition("/")[2]


def _message(answer: dict[str, Any]) -> str:
    """The engine's own words. They are ours (no prompt text is ever part of a control answer), cut to a line."""
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else answer.get("reason")
    return str(message)[:300] if message else ""
