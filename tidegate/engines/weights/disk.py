"""Files on the disk of a weight cache: written past the page cache, replaced whole, measured, hashed.

Gigabytes of fresh pages in the page cache are written back at a rate the kernel chooses, and it makes the writers wait
for it; written with O_DIRECT the same bytes go as fast as the disk takes them, and nobody else's pages are pushed out.
"""

import errno
import hashlib
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tidegate.engines.weights.faults import DiskFull

HASH_BYTES = 1 << 20  # at a time: much more of it falls out of the processor caches between the copy and the hash
ALIGN_BYTES = 4_096  # what O_DIRECT wants of an offset, a length and an address, on every common disk
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


class Sink:
    """One file of known size, written in pieces by several threads. Closed once the last thread that may use it let go.

    One descriptor each, since a large model has hundreds of files.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor, self._direct = path, -1, True
        try:
            self._descriptor = os.open(path, _FLAGS | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this file system has none, as tmpfs of older kernels
                raise
            self._direct, self._descriptor = False, os.open(path, _FLAGS, 0o600)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def allocate(self, size: int) -> None:
        """Takes its room from the disk. OSError when it is not there."""
        if size and os.fstat(self._descriptor).st_size != size:
            os.posix_fallocate(self._descriptor, 0, size)

    def write(self, body: memoryview, at: int) -> None:
        """`body` begins on a page boundary of memory (see `staging`)."""
        whole = len(body) // ALIGN_BYTES * ALIGN_BYTES if self._direct and at % ALIGN_BYTES == 0 else 0
        try:
            _pwrite(self._descriptor, body[:whole], at)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: this disk wants larger pieces than ours to begin and end with
                raise
            whole = 0
        if rest := body[whole:]:
            with self.buffered() as descriptor:
                _pwrite(descriptor, rest, at + whole)

    @contextmanager
    def buffered(self) -> Iterator[int]:
        """A descriptor that goes through the page cache."""
        descriptor = os.open(self._path, _FLAGS, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """What was written, either way."""
        os.fdatasync(self._descriptor)


def staging(size: int) -> memoryview:
    """Memory for `Sink.write`, gone with its last reference."""
    return memoryview(mmap.mmap(-1, size))


def sha256(path: Path) -> str:
    with path.open("rb", buffering=0) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def git_sha(path: Path) -> str:
    """The SHA-1 of the file as a git blob."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def allocated(path: Path) -> int:
    """Bytes a file takes from the disk now."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def disk_bytes(folder: Path) -> int:
    """Bytes everything under `folder` takes from the disk."""
    # Not Path.rglob: that raises when a folder is deleted meanwhile.
    return sum(allocated(Path(at, name)) for at, _, names in os.walk(folder) for name in names)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a small file: after a crash it has the old content or the new."""
    with disk_faults():
        making = path.with_name(path.name + ".new")
        with making.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        making.rename(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_faults() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull("the disk of the weight cache is full") from error
        raise DiskFull(f"the disk of the weight cache failed: {error.strerror}") from error


def _pwrite(descriptor: int, view: memoryview, at: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
