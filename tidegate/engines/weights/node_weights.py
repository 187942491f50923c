"""The weights of one node as its replicas ask for them: local directories in place, remote models from the cache."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import Refusal, WeightFault
from tidegate.engines.inspect import FileInspector, model_path
from tidegate.engines.weights.cache import DiskCache, Hold
from tidegate.engines.weights.faults import SourceChanged
from tidegate.engines.weights.source import parse

FETCHES_MAX = 8  # models at once; each has connections of its own


class NodeWeights:
    """Implements `Weights`."""

    def __init__(self, cache: DiskCache) -> None:
        self._cache = cache
        self._turns = asyncio.Semaphore(FETCHES_MAX)
        self._listening: dict[str, list[Callable[[int], None]]] = {}
        self._seen: dict[str, tuple[object, ...]] = {}  # local directories: what was verified, so that it is once

    def present(self) -> tuple[str, ...]:
        return self._cache.present()

    async def hold(self, model: ModelProfile, progress: Callable[[int], None]) -> Hold:
        loop = asyncio.get_running_loop()
        if parse(model.source) is None:
            return await _on_thread(lambda: self._local(model), threading.Event())
        stop = threading.Event()

        def tell(percent: int) -> None:
            if not stop.is_set():
                loop.call_soon_threadsafe(self._tell, model.digest, percent)

        listening = self._listening.setdefault(model.digest, [])
        listening.append(progress)
        try:
            async with self._turns:
                return await _on_thread(lambda: self._fetch(model, tell, stop), stop)
        finally:
            listening.remove(progress)
            if not listening:
                self._listening.pop(model.digest, None)

    def _tell(self, digest: str, percent: int) -> None:
        """To everybody who waits for this model, whoever of them it is that fetches it."""
        for progress in self._listening.get(digest, ()):
            progress(percent)

    def _fetch(self, model: ModelProfile, progress: Callable[[int], None], stop: threading.Event) -> Hold:
        try:
            return self._cache.hold(model, progress, stop)
        except Refusal as refusal:  # an extra that is not installed on this node
            raise WeightFault(refusal.message) from refusal

    def _local(self, model: ModelProfile) -> Hold:
        """Read where it is; refused when it is not what was applied."""
        folder = model_path(model.source)
        signature = _signature(folder)
        if self._seen.get(model.source) != (model.digest, *signature):
            try:
                found = FileInspector().inspect(model.source).digest
            except Refusal as refusal:
                raise SourceChanged(f"the model cannot be used any more: {refusal.message}") from refusal
            if found != model.digest:
                raise SourceChanged("the model's files changed since it was applied: apply the endpoint again")
            self._seen[model.source] = (model.digest, *signature)
        return Hold(folder, None)


def _signature(folder: Path) -> tuple[object, ...]:
    """What changes when anybody writes to the files of a local model."""
    paths = sorted((*folder.glob("*"), *folder.glob("*/config.json"))) if folder.is_dir() else [folder]
    stats = ((path, path.stat()) for path in paths if path.is_file())
    return tuple((path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats)


async def _on_thread(call: Callable[[], Hold], stop: threading.Event) -> Hold:
    """A daemon thread of its own, not a pool's: a source that hangs must hold up neither the rest nor the exit.

    Given up, `stop` is set, and what the call brings all the same is released.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Hold] = loop.create_future()

    def settle(held: Hold | None, error: BaseException | None) -> None:
        if done.done():
            if held is not None:
                held.release()
        elif error is not None:
            done.set_exception(error)
        elif held is not None:
            done.set_result(held)

    def work() -> None:
        try:
            held, error = call(), None
        except BaseException as raised:  # noqa: BLE001 - raised again where it is awaited
            held, error = None, raised
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever asked
            loop.call_soon_threadsafe(settle, held, error)

    threading.Thread(target=work, name="weights", daemon=True).start()
    try:
        return await done
    finally:
        stop.set()
