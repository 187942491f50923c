"""Encrypted files on disk: the `batch.ports.Vault`. Nothing a tenant uploaded or was answered lies in the clear.

A file is a head and frames. The head holds the file's own random key, wrapped by the newest key of the keyring; so
changing that key rewrites heads, never contents. A frame is AES-256-GCM (NIST SP 800-38D) over at most a few hundred
KiB, so that no file is ever whole in memory. Each frame's number and whether it is the last are authenticated: frames
cannot be reordered, and a file cut short is not taken for a whole one (the STREAM construction, Hoang et al. 2015).
Nonces are random: a frame torn by a crash and written again never meets its old nonce.
"""

import base64
import binascii
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tidegate.domain.errors import StoreFault

KEY_BYTES = 32
_MAGIC = b"TGV1"
_HEAD = struct.Struct("!4s8s12s48s")  # magic, key id, nonce, wrapped key with its tag
_LENGTH = struct.Struct("!I")
_LAST = 1 << 31
_NONCE_BYTES = 12
FRAME_BYTES_MAX = 128 << 20
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Keyring:
    """32-byte keys, newest first. The first wraps what is written from now on; the others still open older files."""

    def __init__(self, keys: list[bytes]) -> None:
        assert keys, "a keyring holds at least one key"
        self._by_id = {hashlib.sha256(key).hexdigest()[:8].encode(): AESGCM(key) for key in reversed(keys)}
        self.newest = hashlib.sha256(keys[0]).hexdigest()[:8].encode()

    @classmethod
    def parse(cls, text: str) -> "Keyring":
        """One base64 key of 32 bytes a line (``openssl rand -base64 32``), newest first. ValueError says which line."""
        keys = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                key = base64.b64decode(line.strip(), validate=True)
            except binascii.Error:
                key = b""
            if len(key) != KEY_BYTES:
                raise ValueError(f"line {number} is not the base64 of {KEY_BYTES} bytes")
            keys.append(key)
        if not keys:
            raise ValueError("there is no key")
        return cls(keys)

    def wrap(self, key: bytes, name: str) -> bytes:
        """The head of the file `name`: bound to its name, so that one file cannot be passed off as another."""
        nonce = os.urandom(_NONCE_BYTES)
        wrapped = self._by_id[self.newest].encrypt(nonce, key, name.encode())
        return _HEAD.pack(_MAGIC, self.newest, nonce, wrapped)

    def unwrap(self, head: bytes, name: str) -> bytes:
        if len(head) != _HEAD.size or not head.startswith(_MAGIC):
            raise StoreFault("a stored file is damaged: it has no head")
        _, key_id, nonce, wrapped = _HEAD.unpack(head)
        if key_id not in self._by_id:
            raise StoreFault(f"the key {key_id.decode('ascii', 'replace')} of a stored file is not in the keyring")
        return self._by_id[key_id].decrypt(nonce, wrapped, name.encode())


class Vault:
    """Files by name in one directory (mode 0700). Synchronous; every method raises StoreFault when it cannot do it."""

    def __init__(self, directory: Path, keyring: Keyring) -> None:
        self._directory = directory
        self._keyring = keyring
        with _faults("the vault's directory cannot be made"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def create(self, name: str) -> "VaultWriter":
        """A new file, empty; one of that name is written over."""
        key = os.urandom(KEY_BYTES)
        with _faults("a stored file cannot be made"):
            file = _open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            file.write(self._keyring.wrap(key, name))
            folder = os.open(self._directory, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return VaultWriter(file, key, 0)

    def resume(self, name: str, each: Callable[[bytes], None]) -> "VaultWriter":
        """Goes on with a file that was being written: `each` is told the whole frames a crash has left, the writer
        goes on after them. A file that was never begun is new; a finished one can be finished again.
        """
        path = self._path(name)
        if not path.exists() or path.stat().st_size < _HEAD.size:
            return self.create(name)
        with _faults("a stored file cannot be read"):
            file = _open(path, os.O_RDWR)
            key = self._keyring.unwrap(file.read(_HEAD.size), name)
            cipher, number, end = AESGCM(key), 0, _HEAD.size
            while (frame := _read_frame(file)) is not None and not frame[0] & _LAST:
                try:
                    plain = _decrypt(cipher, frame[1], number, last=False)
                except (InvalidTag, ValueError):
                    break  # torn by the crash, and everything after it: the line is done again
                each(plain)
                number, end = number + 1, file.tell()
            file.truncate(end)
            file.seek(end)
        return VaultWriter(file, key, number)

    def open(self, name: str) -> "VaultReader":
        """A finished file."""
        with _faults("a stored file cannot be read"):
            try:
                file = _open(self._path(name), os.O_RDONLY)
            except FileNotFoundError:
                raise StoreFault("a stored file is gone") from None
            key = self._keyring.unwrap(file.read(_HEAD.size), name)
        return VaultReader(file, key)

    def remove(self, name: str) -> None:
        with _faults("a stored file cannot be removed"):
            self._path(name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        with _faults("the vault cannot be listed"):
            return sorted(path.name for path in self._directory.iterdir())

    def rewrap(self) -> int:
        """Wraps the key of every file with the newest key; how many were not. After it the older keys can go."""
        changed = 0
        for name in self.names():
            with _faults("a stored file cannot be rewrapped"), _open(self._path(name), os.O_RDWR) as file:
                head = file.read(_HEAD.size)
                if len(head) == _HEAD.size and head[4:12] != self._keyring.newest:
                    key = self._keyring.unwrap(head, name)
                    file.seek(0)
                    file.write(self._keyring.wrap(key, name))
                    file.flush()
                    os.fsync(file.fileno())
                    changed += 1
        return changed

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name), "names of stored files are made here, never taken from a request"
        return self._directory / name


class VaultWriter:
    """One writer a file. What was appended is durable once `sync` or `finish` has returned."""

    def __init__(self, file: IO[bytes], key: bytes, frames: int) -> None:
        self._file = file
        self._cipher = AESGCM(key)
        self.frames = frames

    def append(self, data: bytes) -> None:
        """One frame."""
        self._write(data, last=False)

    def sync(self) -> None:
        with _faults("a stored file cannot be written"):
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Marks the end: from now on it can be opened."""
        self._write(b"", last=True)
        self.sync()
        self.close()

    def close(self) -> None:
        with _faults("a stored file cannot be written"):
            self._file.close()

    def _write(self, data: bytes, *, last: bool) -> None:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, data, _aad(self.frames, last))
        length = (_NONCE_BYTES + len(sealed)) | (_LAST if last else 0)
        with _faults("a stored file cannot be written"):
            self._file.write(_LENGTH.pack(length) + nonce + sealed)
        self.frames += 1


class VaultReader:
    """Frames in order, or one by its number (from 0)."""

    def __init__(self, file: IO[bytes], key: bytes) -> None:
        self._file = file
        self._cipher = AESGCM(key)
        self._offsets: list[int] = []

    def frames(self) -> Iterator[bytes]:
        """All of them. StoreFault where the file was altered or cut short."""
        number, offset = 0, _HEAD.size
        while True:
            with _faults("a stored file cannot be read"):
                self._file.seek(offset)
                frame = _read_frame(self._file)
                if frame is None or len(frame[1]) < frame[0] & ~_LAST:
                    raise StoreFault("a stored file is damaged: it has no end")
                length, data = frame
                plain = _decrypt(self._cipher, data, number, last=bool(length & _LAST))
                if len(self._offsets) == number:
                    self._offsets.append(offset)
                offset = self._file.tell()
            if length & _LAST:
                return
            yield plain
            number += 1

    def frame(self, number: int) -> bytes:
        """One that `frames` has passed before."""
        with _faults("a stored file cannot be read"):
            self._file.seek(self._offsets[number])
            frame = _read_frame(self._file)
            if frame is None:
                raise StoreFault("a stored file is damaged")
            return _decrypt(self._cipher, frame[1], number, last=False)

    def close(self) -> None:
        self._file.close()


def _read_frame(file: IO[bytes]) -> tuple[int, bytes] | None:
    """(length with its flag, what is there of it), None at the end or within a torn length."""
    raw = file.read(_LENGTH.size)
    if len(raw) < _LENGTH.size:
        return None
    length: int = _LENGTH.unpack(raw)[0]
    if length & ~_LAST > FRAME_BYTES_MAX:
        raise StoreFault("a stored file is damaged: a frame is too long")
    return length, file.read(length & ~_LAST)


def _decrypt(cipher: AESGCM, data: bytes, number: int, *, last: bool) -> bytes:
    return cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], _aad(number, last))


def _aad(number: int, last: bool) -> bytes:
    return struct.pack("!QB", number, last)


def _open(path: Path, flags: int) -> IO[bytes]:
    mode = "rb" if flags == os.O_RDONLY else "r+b"
    return os.fdopen(os.open(path, flags | os.O_CLOEXEC, 0o600), mode)


@contextmanager
def _faults(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFault(f"{what}: {error.strerror or 'input/output error'}") from error
    except (InvalidTag, ValueError) as error:
        raise StoreFault(f"{what}: it was altered, or its key is wrong") from error
