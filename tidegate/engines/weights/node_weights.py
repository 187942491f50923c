"""The weights of one node as its replicas ask for them: local directories in place, remote models from the cache."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import Refusal, WeightFault
from tidegate.engines.inspect import FileInspector, model_path
from tidegate.engines.weights.cache import DiskCache, Hold
from tidegate.engines.weights.faults import SourceChanged
from tidegate.engines.weights.source import parse

FETCHES_MAX = 8  # models at once; each has connections of its own


class NodeWeights:
    """Implements `Weights`. Its threads are its own: a download of minutes must not hold up anything else's."""

    def __init__(self, cache: DiskCache) -> None:
        self._cache = cache
        self._pool = ThreadPoolExecutor(FETCHES_MAX, "weights")
        self._seen: dict[str, tuple[object, ...]] = {}  # local directories: what was verified, so that it is once

    def present(self) -> tuple[str, ...]:
        return self._cache.present()

    async def hold(self, model: ModelProfile, progress: Callable[[int], None]) -> Hold:
        loop = asyncio.get_running_loop()
        if parse(model.source) is None:
            return await loop.run_in_executor(self._pool, self._local, model)
        stop = threading.Event()

        def tell(percent: int) -> None:
            loop.call_soon_threadsafe(progress, percent)

        fetching = loop.run_in_executor(self._pool, self._fetch, model, tell, stop)
        try:
            return await asyncio.shield(fetching)
        except asyncio.CancelledError:
            stop.set()
            fetching.add_done_callback(_let_go)
            raise

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

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


def _let_go(fetching: "asyncio.Future[Hold]") -> None:
    """Nobody waits for it any more: what it got is released, why it ended is of no interest."""
    if not fetching.cancelled() and fetching.exception() is None:
        fetching.result().release()
