"""A cable between two parts on TCP: it delays, is cut without a word, mended, or broken with a reset."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

CHUNK_BYTES = 64 << 10


class Cable:
    """Listens on `port` of loopback and carries everything to `target` (a port), from a thread of its own."""

    def __init__(self, delay_ms: float = 0) -> None:
        self.target = 0
        self.port = 0
        self.delay_ms = delay_ms
        self._loop = asyncio.new_event_loop()
        self._whole = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = threading.Event()

    def __enter__(self) -> "Cable":
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        self._do(self._whole.clear)

    def mend(self) -> None:
        self._do(self._whole.set)

    def reset(self) -> None:
        """Every connection over it ends at once."""
        self._do(lambda: [writer.transport.abort() for writer in self._writers])

    def _do(self, act: Callable[[], Any]) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (act(), done.set()))
        assert done.wait(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._whole.set()
        server = self._loop.run_until_complete(asyncio.start_server(self._carry, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        try:
            await asyncio.gather(self._one_way(reader, back), self._one_way(there, writer))
        finally:
            self._writers -= {writer, back}

    async def _one_way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                await asyncio.sleep(self.delay_ms / 1000)
                await self._whole.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            writer.close()
