"""One engine behind its real socket: the server's loop on a thread of this process."""

import asyncio
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tidegate.torch_engine.life import Life
from tidegate.torch_engine.options import Options
from tidegate.torch_engine.server import Server, _listen

WAIT_S_MAX = 60.0


class Serving:
    """Start it with `with`; `http` talks to it, `life` is its inside."""

    def __init__(self, model: Path, folder: Path, **options: Any) -> None:
        self.path = str(folder / "engine.sock")
        self.options = Options(model=model, socket=self.path, threads=1, **options)
        self.http = httpx.Client(
            transport=httpx.HTTPTransport(uds=self.path), base_url="http://engine", timeout=WAIT_S_MAX
        )
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        self.life = Life(self.options, loop)
        listener = await _listen(self.path, Server(self.life), loop)
        assert listener is not None
        self.life.begin()
        self._started.set()
        await self.life.ended.wait()
        listener.close()

    def __enter__(self) -> "Serving":
        self._thread.start()
        assert self._started.wait(WAIT_S_MAX)
        self.until(lambda: self.state()["state"] != "loading")
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.life.worker is not None:
            self.life.worker.stop()
        self.life.loop.call_soon_threadsafe(self.life.ended.set)
        self._thread.join(WAIT_S_MAX)

    def until(self, true: Any) -> None:
        deadline = time.monotonic() + WAIT_S_MAX
        while not true():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.005)

    def state(self) -> dict[str, Any]:
        return self.http.get("/control/state").json()  # type: ignore[no-any-return]

    def control(self, verb: str) -> dict[str, Any]:
        answer = self.http.post(f"/control/{verb}")
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def complete(self, **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/v1/completions", json={"model": "m", "prompt": "the water", **fields})
        assert answer.status_code == 200, answer.text
        return answer.json()  # type: ignore[no-any-return]

    def stream(self, path: str, **fields: Any) -> tuple[httpx.Headers, list[tuple[int, dict[str, Any]]]]:
        """(head, [(event id, data)]); asserts the frame of each event and the `[DONE]` at the end."""
        events = []
        with self.http.stream("POST", path, json={"model": "m", "stream": True, **fields}) as answer:
            body = answer.read().decode()
            assert answer.status_code == 200, body
        *blocks, done, rest = body.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        for block in blocks:
            number, data = block.split("\n")
            assert number.startswith("id: ")
            assert data.startswith("data: ")
            events.append((int(number[4:]), json.loads(data[6:])))
        return answer.headers, events

    def refused(self, path: str, status: int, code: str, **fields: Any) -> dict[str, Any]:
        answer = self.http.post(path, json={"model": "m", **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (status, code), answer.text
        assert error.keys() >= {"message", "type", "param", "code"}
        return error  # type: ignore[no-any-return]

    def raw(self) -> socket.socket:
        """A bare connection, for clients that misbehave."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(WAIT_S_MAX)
        connection.connect(self.path)
        return connection
