"""One line, one request to the gateway: what came of it, and whether it is worth another try."""

from dataclasses import dataclass

import httpx

from tidegate.batch.ports import BatchSettings
from tidegate.wire.batch import InputLine, StoredBatch

CONNECT_S_MAX = 5.0
READ_S_MAX = 900.0  # beyond the gateway's own bounds on a hold and on a silent engine
PAUSE_S_MIN, PAUSE_S_MAX = 0.1, 10.0


@dataclass(frozen=True, slots=True)
class Answered:
    """The model answered, or refused for good: `body` is what it said. `ok` is status 200."""

    status: int
    request_id: str
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == 200


@dataclass(frozen=True, slots=True)
class NotNow:
    """No capacity, a limit, or nobody there: nothing is wrong with the line. Not before `pause_s`."""

    pause_s: float


@dataclass(frozen=True, slots=True)
class Broken:
    """An engine failed with it. Once is bad luck (or preemption seen too late); always is the line's own doing."""

    answer: Answered


Outcome = Answered | NotNow | Broken


class Gateway:
    """The gateway as a client of it sees it. Used by one event loop."""

    def __init__(self, settings: BatchSettings) -> None:
        self._client = httpx.AsyncClient(
            base_url=settings.gateway_url,
            headers={"authorization": f"Bearer {settings.runner_secret}", "content-type": "application/json"},
            timeout=httpx.Timeout(READ_S_MAX, connect=CONNECT_S_MAX),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=settings.in_flight_max),
            trust_env=False,  # it is on this machine: no proxy in between
        )

    async def ask(self, batch: StoredBatch, number: int, line: InputLine) -> Outcome:
        """Never raises for what the network or the gateway did."""
        # The last part names the usage record: the line is billed once, however often it has to be sent.
        acting = f"{batch.tenant} {batch.key} {batch.id}-{number}"
        try:
            response = await self._client.post(
                batch.url, content=bytes(line.body), headers={"x-tidegate-batch": acting}
            )
        except httpx.HTTPError:
            return NotNow(PAUSE_S_MIN)
        answer = Answered(response.status_code, response.headers.get("x-request-id", ""), response.content)
        if response.status_code in (402, 408, 409, 429, 503):
            return NotNow(_pause_s(response.headers.get("retry-after", "")))
        if response.status_code >= 500:
            return Broken(answer)
        return answer

    async def close(self) -> None:
        await self._client.aclose()


def _pause_s(retry_after: str) -> float:
    return min(max(float(retry_after) if retry_after.isdecimal() else 0.0, PAUSE_S_MIN), PAUSE_S_MAX)
