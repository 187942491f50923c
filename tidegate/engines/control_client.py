"""HTTP to an engine's control API on its Unix socket. Not the hot path: no tenant's request passes here."""

import asyncio
from typing import Any

import httpx

from tidegate.domain.errors import EngineFault


class ControlClient:
    """One connection to one engine, kept alive. Every call is bounded by its `ms_max`; EngineFault says what failed."""

    def __init__(self, socket: str) -> None:
        transport = httpx.AsyncHTTPTransport(uds=socket, verify=False, limits=httpx.Limits(max_connections=4))
        # The base URL's host is never resolved: everything goes to the socket.
        self._client = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None)

    async def get(self, path: str, *, ms_max: int) -> dict[str, Any]:
        return await self._call("GET", path, ms_max)

    async def post(self, path: str, *, ms_max: int) -> dict[str, Any]:
        return await self._call("POST", path, ms_max)

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, method: str, path: str, ms_max: int) -> dict[str, Any]:
        what = path.rpartition("/")[2]
        try:
            async with asyncio.timeout(ms_max / 1000):
                response = await self._client.request(method, path)
            answer = response.json()
        except TimeoutError as error:
            raise EngineFault(f"no answer to {what} within {ms_max} ms") from error
        except httpx.TransportError as error:
            raise NotListening(f"{what}: connection to the engine failed") from error
        except ValueError as error:
            raise EngineFault(f"{what}: the engine answered nonsense") from error
        if not isinstance(answer, dict):
            raise EngineFault(f"{what}: the engine answered nonsense")
        if response.status_code != 200:
            raise EngineFault(f"{what}: {_message(answer) or f'the engine answered {response.status_code}'}")
        return answer


class NotListening(EngineFault):
    """Nobody accepts on the socket: the engine is not up yet, or no longer."""


def _message(answer: dict[str, Any]) -> str:
    """The engine's own words. They are ours (no prompt text is ever part of a control answer), cut to a line."""
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else answer.get("reason")
    return str(message)[:300] if message else ""
