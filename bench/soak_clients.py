"""The clients of ``bench.soak``: tenants' programs that ask all the while, and what each of them saw."""

import asyncio
import contextlib
import json
import random
import threading
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import websockets

from bench.exactness import PROMPTS, TOKENS
from bench.soak_world import EMBED, ENDPOINTS, TENANTS, Key, World

TIMEOUT_S = 100.0
BATCH_LINES = 12
BATCH_TOKENS = 6


@dataclass(slots=True, kw_only=True)
class Seen:
    """One request as its client saw it. `outcome`: answered | aborted | failed | cut; `detail` is the error's code."""

    kind: str  # unary | stream | embedding | session
    endpoint: str
    key: Key
    gateway: str
    from_s: float
    to_s: float = float("inf")
    prompt: str = ""
    count: int = 0  # tokens asked for; of a session, responses
    request_id: str = ""
    text: str = ""
    tokens: int = 0
    outcome: str = "cut"
    detail: str = ""

    @property
    def tenant(self) -> str:
        return self.endpoint.partition("/")[0]


class Clients:
    """`count` clients that ask one request after the other until they are told that it is over."""

    def __init__(self, world: World, count: int) -> None:
        self._world, self._count = world, count
        self.seen: list[Seen] = []
        self.over = threading.Event()
        self._vectors: dict[str, list[float]] = {}

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=self._count + 8)
        async with httpx.AsyncClient(limits=limits, timeout=TIMEOUT_S) as http:
            await asyncio.gather(
                *(self._client(n, http) for n in range(self._count)), self._sessions(), self._batches()
            )

    async def ask_once(self, endpoint: str) -> Seen:
        """One plain question, at the end."""
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            seen = self._seen(random.Random(0), endpoint, self._world.urls[0])
            await self._ask(http, seen, None)
            return seen

    async def _client(self, number: int, http: httpx.AsyncClient) -> None:
        dice = random.Random(f"{self._world.seed}/client/{number}")
        while not self.over.is_set():
            endpoint = EMBED if dice.random() < 0.1 else dice.choice(list(ENDPOINTS))
            url, hangs_up = self._world.urls[dice.random() < 0.25], dice.random()
            if endpoint.partition("/")[0] not in self._world.keys:  # its tenant is away
                await asyncio.sleep(0.1)
                continue
            seen = self._seen(dice, endpoint, url)
            await self._ask(http, seen, 1 + int(hangs_up * 10) if hangs_up < 0.3 else None)
            if seen.outcome in ("cut", "failed"):
                await asyncio.sleep(0.3)

    def _seen(self, dice: random.Random, endpoint: str, url: str) -> Seen:
        kind = "embedding" if endpoint == EMBED else dice.choice(("unary", "stream", "stream"))
        key = self._world.keys[endpoint.partition("/")[0]]
        seen = Seen(kind=kind, endpoint=endpoint, key=key, gateway=url, from_s=self._world.now_s())
        seen.prompt, seen.count = dice.choice(PROMPTS), dice.choice(TOKENS)
        self.seen.append(seen)
        return seen

    async def _ask(self, http: httpx.AsyncClient, seen: Seen, events_max: int | None) -> None:
        body: dict[str, Any] = {"model": seen.endpoint, "prompt": seen.prompt, "max_tokens": seen.count}
        body |= {"temperature": 0, "ignore_eos": True, "stream": seen.kind == "stream"}
        path = "completions"
        if seen.kind == "embedding":
            path, body = "embeddings", {"model": seen.endpoint, "input": seen.prompt}
        headers = {"authorization": f"Bearer {seen.key.secret}"}
        try:
            async with http.stream("POST", f"{seen.gateway}/v1/{path}", json=body, headers=headers) as reply:
                seen.request_id = reply.headers.get("x-request-id", "")
                if reply.status_code != 200:
                    seen.outcome, seen.detail = "failed", json.loads(await reply.aread())["error"]["code"]
                elif seen.kind == "stream":
                    await _read_events(reply, seen, events_max)
                else:
                    self._read_whole(json.loads(await reply.aread()), seen)
        except httpx.TransportError as error:
            seen.detail = type(error).__name__
        seen.to_s = self._world.now_s()

    def _read_whole(self, document: dict[str, Any], seen: Seen) -> None:
        seen.outcome = "answered"
        if seen.kind == "embedding":
            vector = document["data"][0]["embedding"]
            first = self._vectors.setdefault(seen.prompt, vector)
            if max(abs(a - b) for a, b in zip(first, vector, strict=True)) > 1e-3:
                seen.text = "another vector"
            return
        seen.text = document["choices"][0]["text"]
        seen.tokens = document["usage"]["completion_tokens"]

    # --- sessions and batches ---------------------------------------------------------------------------------------

    async def _sessions(self) -> None:
        """WebSocket sessions of a few responses, one after the other."""
        dice = random.Random(f"{self._world.seed}/sessions")
        while not self.over.is_set():
            await asyncio.sleep(0.5)
            endpoint = dice.choice(list(ENDPOINTS))
            if endpoint.partition("/")[0] in self._world.keys:
                seen = self._seen(dice, endpoint, self._world.urls[0])
                seen.kind, seen.prompt, seen.count = "session", "", dice.randint(1, 3)
                await _session(seen)
                seen.to_s = self._world.now_s()

    async def _batches(self) -> None:
        """A batch now and then, a third of them cancelled soon."""
        dice = random.Random(f"{self._world.seed}/batches")
        async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
            while not self.over.is_set():
                tenant, cancels, pause_s = dice.choice(TENANTS), dice.random() < 0.3, dice.uniform(3, 9)
                endpoint = dice.choice([name for name in ENDPOINTS if name.startswith(tenant)])
                if key := self._world.keys.get(tenant):
                    http.headers["authorization"] = f"Bearer {key.secret}"
                    with contextlib.suppress(httpx.HTTPError):  # refused or cut off: then it is no batch
                        batch = await _submit(http, self._world.urls[0], endpoint)
                        self._world.batches[batch] = (tenant, cancels)
                        await asyncio.sleep(pause_s / 4)
                        if cancels:
                            await http.post(f"{self._world.urls[0]}/v1/batches/{batch}/cancel")
                await asyncio.sleep(pause_s)


async def _read_events(reply: httpx.Response, seen: Seen, events_max: int | None) -> None:
    events = 0
    async for line in reply.aiter_lines():
        if line.startswith("id:"):
            seen.tokens = int(line[3:])
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            seen.outcome = "answered"
            return
        event = json.loads(data)
        if "error" in event:
            seen.outcome, seen.detail = "failed", event["error"]["code"]
            return
        seen.text += "".join(choice["text"] for choice in event["choices"])
        events += 1
        if events_max is not None and events >= events_max:
            seen.outcome = "aborted"
            return
    seen.detail = "ended without [DONE]"


async def _session(seen: Seen) -> None:
    """`count` responses in one session. Its tokens are what was told to have been used; errors inside end it."""
    client = openai.AsyncOpenAI(base_url=f"{seen.gateway}/v1", api_key=seen.key.secret, max_retries=0)
    item: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": PROMPTS[0]}]}
    try:
        async with asyncio.timeout(TIMEOUT_S), client.realtime.connect(model=seen.endpoint) as session:
            for _ in range(seen.count):
                await session.conversation.item.create(item=item)
                await session.response.create(response={"max_output_tokens": TOKENS[0]})
                while (event := await session.recv()).type not in ("response.done", "error"):
                    continue
                if event.type == "error":
                    seen.outcome, seen.detail = "failed", str(event.error.code)
                    return
                if event.response.status == "failed":
                    details = event.response.status_details
                    seen.outcome, seen.detail = "failed", str(details and details.error and details.error.code)
                    return
                seen.tokens += event.response.usage.output_tokens
        seen.outcome = "answered"
    except websockets.InvalidStatus as refused:
        seen.outcome, seen.detail = "failed", json.loads(refused.response.body)["error"]["code"]
    except websockets.ConnectionClosed as closed:  # with a reason, or its gateway is gone
        if closed.rcvd is not None and closed.rcvd.reason:
            seen.outcome, seen.detail = "failed", closed.rcvd.reason
    except (websockets.WebSocketException, OSError) as error:  # its gateway is gone: the outcome stays "cut"
        seen.detail = type(error).__name__


async def _submit(http: httpx.AsyncClient, url: str, endpoint: str) -> str:
    body = {"model": endpoint, "max_tokens": BATCH_TOKENS, "temperature": 0, "ignore_eos": True}
    lines = (
        {"custom_id": f"line-{n}", "method": "POST", "url": "/v1/completions",
         "body": {**body, "prompt": PROMPTS[n % len(PROMPTS)]}}
        for n in range(1, BATCH_LINES + 1)  # as the runner counts them
    )  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    form = {"purpose": (None, "batch"), "file": ("lines.jsonl", text)}
    uploaded = (await http.post(f"{url}/v1/files", files=form)).raise_for_status().json()
    order = {"input_file_id": uploaded["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    return str((await http.post(f"{url}/v1/batches", json=order)).raise_for_status().json()["id"])
