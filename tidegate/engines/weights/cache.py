"""The weights on one node's disk: content-addressed, within a budget, whole or not there at all.

    models/DIGEST/{files/…, manifest}   complete; made by one rename, so a crash leaves a whole model or none
    models/DIGEST/uses                  how often it was used, as of the manifest's time (`eviction.faded`)
    partial/DIGEST/                     a download under way or interrupted (`download`)
    records/DIGEST                      SHA-256 of each file at the first load, kept when the model is evicted
    locks/DIGEST, locks/DIGEST.use      one fetch at a time on this node; shared by whoever runs on the files
    quarantine/DIGEST                   what did not match its checksum; the first thing to go when room is needed

Safe between threads and processes of one node: every change is made under the lock of its digest, and room is made and
taken under ``locks/room``.
"""

import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import Refusal
from tidegate.domain.units import GIB
from tidegate.engines.inspect import FileInspector
from tidegate.engines.weights import eviction
from tidegate.engines.weights.disk import disk_bytes, sha256, sync_folder, write_whole
from tidegate.engines.weights.download import Download, DownloadLimits
from tidegate.engines.weights.faults import Corrupt, DiskFull, SourceChanged, SourceMissing, SourceUnavailable
from tidegate.engines.weights.locks import FileLock
from tidegate.engines.weights.peers import Peers
from tidegate.engines.weights.source import RemoteModel, wanted

RECORDS_MAX = 4_096
FREE_BYTES_MIN = GIB // 2  # never taken from the disk: journals and databases live beside the cache
log = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Hold:
    """One model's files, not evicted until `release`."""

    def __init__(self, path: Path, use: FileLock | None) -> None:
        self.path = str(path)
        self._use = use

    def release(self) -> None:
        """Idempotent."""
        if self._use is not None:
            self._use.close()


class DiskCache:
    """`open_model` lists a remote source. `budget_bytes` bounds everything under `root`. `peers` are nodes on other
    machines, which may have a model already.
    """

    def __init__(
        self,
        root: Path,
        budget_bytes: int,
        open_model: Callable[[str], RemoteModel],
        limits: DownloadLimits = DownloadLimits(),
        free_bytes_min: int = FREE_BYTES_MIN,
        peers: Peers | None = None,
    ) -> None:
        self._root, self._budget_bytes, self._open_model, self._limits = root, budget_bytes, open_model, limits
        self._free_bytes_min, self._peers = free_bytes_min, peers
        for name in ("models", "partial", "records", "locks", "quarantine", "trash"):
            (root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in (root / "trash").iterdir():  # a crash may have left something half deleted
            shutil.rmtree(left, ignore_errors=True)

    def present(self) -> tuple[str, ...]:
        """Digests of every complete model."""
        return tuple(sorted(path.parent.name for path in (self._root / "models").glob("*/manifest")))

    def hold(self, model: ModelProfile, progress: Callable[[int], None], stop: threading.Event) -> Hold:
        """Brings a model here if it is not, verified against its digest. Blocks. Raises WeightFault, Refusal."""
        if not _DIGEST.fullmatch(model.digest):
            raise Corrupt("the model has no usable digest: apply its endpoint again")
        lock = FileLock(self._root / "locks" / model.digest)
        lock.acquire(stop)
        with lock:
            folder = self._root / "models" / model.digest
            if not self._whole(model.digest):
                self._fetch(model, progress, stop)
            use = FileLock(self._root / "locks" / f"{model.digest}.use")
            use.acquire(stop, shared=True)  # waits only for somebody who looks whether it is in use
            self._used_now(folder)
            return Hold(folder / "files", use)

    # --- what is there --------------------------------------------------------------------------------------------

    def _whole(self, digest: str) -> bool:
        """Whether a complete, unaltered model is there. One that is not what it was is put into quarantine."""
        folder = self._root / "models" / digest
        if not folder.is_dir():
            return False
        try:
            entries = json.loads((folder / "manifest").read_bytes())["files"]
            for name, entry in entries.items():
                stat = (folder / "files" / name).stat()
                if (stat.st_size, stat.st_mtime_ns) != (entry["size"], entry["mtime_ns"]) and (
                    sha256(folder / "files" / name) != entry["sha256"]
                ):
                    raise Corrupt(f"{name} changed on the disk")
            if FileInspector().inspect(str(folder / "files")).digest != digest:
                raise Corrupt("its contents changed on the disk")
        except (Corrupt, Refusal, OSError, ValueError, KeyError, TypeError, AttributeError):
            self._quarantine(folder)
            return False
        return True

    def _quarantine(self, folder: Path) -> None:
        """Out of the way, kept for whoever wants to know; the next one of the same name takes its place."""
        target = self._root / "quarantine" / folder.name
        self._remove(target)
        folder.rename(target)

    def _remove(self, folder: Path) -> None:
        """First out of its place, then deleted: a crash between leaves no half of a model behind."""
        if folder.exists():
            trash = self._root / "trash" / f"{folder.name}-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    # --- fetching -------------------------------------------------------------------------------------------------

    def _fetch(self, model: ModelProfile, progress: Callable[[int], None], stop: threading.Event) -> None:
        """From another node that has it, else from its source when it is this node's turn."""
        if self._peers is None:
            self._fetch_from(self._open_model(model.source), model, progress, stop)
            return
        with self._peers.turn(model.digest, stop) as turn:
            for peer in turn.peers:
                try:
                    self._fetch_from(peer, model, progress, stop)
                    break
                except (SourceUnavailable, SourceMissing, SourceChanged, Corrupt) as fault:
                    log.warning("%s of another node: %s", model.digest[:12], fault.reason)
            else:
                self._fetch_from(self._open_model(model.source), model, progress, stop)
            turn.done()

    def _fetch_from(
        self, remote: RemoteModel, model: ModelProfile, progress: Callable[[int], None], stop: threading.Event
    ) -> None:
        folder = self._root / "partial" / model.digest
        download = Download(folder, remote, wanted(remote), self._limits)
        download.prepare()
        began_s = time.monotonic()
        try:
            with FileLock(self._root / "locks" / "room") as room:
                room.acquire(stop)
                self._make_room(model.digest, download)
                download.allocate()
            download.run(progress, stop)
            sums = self._verified(model, download)
        except Corrupt:
            self._quarantine(folder)
            raise
        except DiskFull:
            self._remove(folder)  # what cannot be completed must not keep others from being
            raise
        fetch_ms = 1_000 * (time.monotonic() - began_s) * download.total_bytes / max(download.fetched_bytes, 1)
        self._publish(model, folder, sums, round(fetch_ms) if download.fetched_bytes else 0)

    def _verified(self, model: ModelProfile, download: Download) -> dict[str, str]:
        sums = download.verify()
        record = self._root / "records" / model.digest
        if record.is_file() and json.loads(record.read_bytes()) != sums:
            raise Corrupt("the source gives other bytes than at the first load; they were put into quarantine")
        try:
            found = FileInspector().inspect(str(download.files)).digest
        except Refusal as refusal:
            raise Corrupt(f"what was downloaded cannot be served: {refusal.message}") from refusal
        if found != model.digest:
            self._remove(download.files.parent)
            raise SourceChanged("the source is not what was applied any more: apply the endpoint again to take it")
        return sums

    def _publish(self, model: ModelProfile, folder: Path, sums: dict[str, str], fetch_ms: int) -> None:
        files = {}
        for name, digest in sums.items():
            stat = (folder / "files" / name).stat()
            files[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
        self._record(model.digest, sums)
        manifest = {"source": model.source, "fetch_ms": fetch_ms, "files": files}
        write_whole(folder / "manifest", json.dumps(manifest).encode())
        for name in ("journal", "plan"):
            (folder / name).unlink()
        for directory in {folder, *(path for path in (folder / "files").rglob("*") if path.is_dir()), folder / "files"}:
            sync_folder(directory)
        folder.rename(self._root / "models" / model.digest)
        sync_folder(self._root / "models")

    def _record(self, digest: str, sums: dict[str, str]) -> None:
        write_whole(self._root / "records" / digest, json.dumps(sums).encode())
        records = sorted((self._root / "records").iterdir(), key=lambda path: path.stat().st_mtime)
        for old in records[:-RECORDS_MAX]:
            old.unlink(missing_ok=True)

    # --- room -----------------------------------------------------------------------------------------------------

    def _make_room(self, digest: str, download: Download) -> None:
        """Under ``locks/room``. DiskFull says what is needed and what there is."""
        need = download.missing_bytes()
        over = self._over(need)
        for rubbish in ("quarantine", "partial"):
            for folder in (self._root / rubbish).iterdir() if over > 0 else ():
                if folder.name != digest:
                    self._drop(folder)
            over = self._over(need)
        if over <= 0:
            return
        kept = (self._kept(path) for path in (self._root / "models").iterdir() if not self._used(path.name))
        for victim in eviction.victims([k for k in kept if k is not None], over) or ():
            self._drop(self._root / "models" / victim)
        if self._over(need) > 0:
            raise DiskFull(
                f"the weights need {need} bytes more; the disk cache may have {self._budget_bytes} bytes (setting "
                f"`disk`), what is in use takes {disk_bytes(self._root)}, and the disk has {self._free_bytes()} to give"
            )

    def _kept(self, folder: Path) -> eviction.Kept | None:
        try:
            fetch_ms = json.loads((folder / "manifest").read_bytes()).get("fetch_ms", 0)
            return eviction.Kept(folder.name, disk_bytes(folder), self._uses(folder), int(fetch_ms))
        except FileNotFoundError:  # put into quarantine just now
            return None
        except (ValueError, TypeError, AttributeError):  # damaged: its next use will find out
            return eviction.Kept(folder.name, disk_bytes(folder), 0.0)

    def _uses(self, folder: Path) -> float:
        """As of now. Raises FileNotFoundError for a model that is not there."""
        unused_s = time.time() - (folder / "manifest").stat().st_mtime
        try:
            uses = float((folder / "uses").read_bytes())
        except (FileNotFoundError, ValueError):  # never used, or torn by a crash
            uses = 1.0
        return eviction.faded(uses, unused_s)

    def _used_now(self, folder: Path) -> None:
        """Not synced: what a crash loses of it is a guess a little worse."""
        uses = (self._uses(folder) if (folder / "uses").exists() else 0.0) + 1.0
        (folder / "uses").write_text(f"{uses:.6f}")
        os.utime(folder / "manifest")

    def _over(self, need: int) -> int:
        """Bytes by which `need` more would break the budget or the disk."""
        return max(disk_bytes(self._root) + need - self._budget_bytes, need - self._free_bytes())

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._root)
        return max(0, disk.f_bavail * disk.f_frsize - self._free_bytes_min)

    def _used(self, digest: str) -> bool:
        with FileLock(self._root / "locks" / f"{digest}.use") as use:
            return not use.try_acquire()

    def _drop(self, folder: Path) -> None:
        """Removes it unless somebody is fetching, opening or running it."""
        with FileLock(self._root / "locks" / folder.name) as lock:
            if lock.try_acquire() and not self._used(folder.name):
                self._remove(folder)
