"""The template process: started once, imports torch once, and forks an engine for each order.

It is kept running (restarted when it dies; engines it forked live on, since their lifeline is held by this process).
"""

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tidegate.domain.errors import EngineFault
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Child, Lifeline, Process

PROGRAM = "tidegate.torch_engine.template"
REPLY_BYTES_MAX = 64 << 10
RETRY_MS = 20
DEATHS_MAX = 3  # the template process died this often while an order waited for it: it will not come up

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Template:
    """Owns the template process. `fork` may be called from many tasks at once."""

    def __init__(
        self,
        directory: Path,
        *,
        lifeline: Lifeline,
        logs: LogRing | None = None,
        start_ms_max: int = 60_000,
        fork_ms_max: int = 10_000,
    ) -> None:
        self._socket, self._lifeline = directory / "template.sock", lifeline
        self._start_ms_max, self._fork_ms_max = start_ms_max, fork_ms_max
        argv = [sys.executable, "-m", PROGRAM, "--socket", str(self._socket)]
        self._child = Child(
            "engine template",
            [*argv, "--lifeline", str(lifeline.read_fd)],
            logs=logs,
            pass_fds=(lifeline.read_fd,),
            grace_ms_max=2_000,
        )
        self._running: asyncio.Task[None] | None = None

    @property
    def process(self) -> Process | None:
        return self._child.process

    def open(self) -> None:
        """Starts it. Returns at once: a fork waits until it has imported what it needs."""
        if self._running is None:
            self._socket.parent.mkdir(parents=True, exist_ok=True)
            self._running = asyncio.create_task(self._child.run(), name="engine template")

    async def fork(self, connection: Connection, order: dict[str, Any]) -> Process:
        """Sends one order line, adopts the process it forked. EngineFault says why it did not."""
        reader, writer = connection
        try:
            async with asyncio.timeout(self._fork_ms_max / 1000):
                writer.write(json.dumps(order).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
            reply = json.loads(line) if line else {}
        except TimeoutError as error:
            raise EngineFault(f"the template process did not fork within {self._fork_ms_max} ms") from error
        except (ConnectionError, ValueError) as error:
            raise EngineFault("the template process broke off") from error
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):  # it answered and left: fine
                await writer.wait_closed()
        if not isinstance(reply, dict) or not isinstance(reply.get("pid"), int):
            reason = reply.get("error") if isinstance(reply, dict) else None
            raise EngineFault(str(reason)[:300] if reason else "the template process broke off")
        return Process.adopt(reply["pid"], self._lifeline)

    async def close(self) -> None:
        await self._child.stop()
        if self._running is not None:
            await asyncio.wait({self._running})
        self._socket.unlink(missing_ok=True)

    async def connect(self) -> Connection:
        """For one `fork`. Waits for the template to listen: it imports for a second or two, and is away while it is
        started again. May be given up at any moment: nothing was asked for yet.
        """
        self.open()
        assert self._running is not None
        starts = self._child.starts
        try:
            async with asyncio.timeout(self._start_ms_max / 1000):
                while True:
                    if self._running.done():
                        self._running.result()
                        raise EngineFault("the template process is shut down")
                    if self._child.starts - starts > DEATHS_MAX:
                        raise EngineFault(f"the template process does not come up: it {self._child.last_end}")
                    try:
                        return await asyncio.open_unix_connection(self._socket, limit=REPLY_BYTES_MAX)
                    except (FileNotFoundError, ConnectionError):
                        await asyncio.sleep(RETRY_MS / 1000)
        except TimeoutError as error:
            raise EngineFault(f"the template process did not listen within {self._start_ms_max} ms") from error
