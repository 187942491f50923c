"""The data directory of a part of the platform: locked, private, with its log. Light to import: needed first."""

import fcntl
import logging
import os
import shutil
import sys
from contextlib import AsyncExitStack
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

from tidegate.assemble.sockets import StartError
from tidegate.config import Config, socket_directory

LOCK_FILE = "lock"
LOG_BYTES_MAX = 8 << 20
LOG_FILES_MAX = 3


@dataclass(frozen=True, slots=True)
class Folders:
    """A data directory (mode 0700) that this process alone uses; `run` is for sockets."""

    data: Path
    run: Path
    logs: Path
    log_file: Path


def take(config: Config, stack: AsyncExitStack, *, log_name: str) -> Folders:
    """Makes the data directory, locks it and logs into it; `stack` gives it back. Raises StartError."""
    data, run = config.data_dir.resolve(), socket_directory(config)
    logs = data / "logs"
    try:
        for folder in (data, run, logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _lock(data / LOCK_FILE, stack)
        _clear(data / "run", run)
    except OSError as error:
        raise StartError(f"the data directory {data} cannot be used: {error.strerror}") from error
    if run.parent != data:
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        _link(data / "run", run, stack)
    log_file = logs / log_name
    _log_to(log_file, stack)
    return Folders(data, run, logs, log_file)


def _clear(name: Path, run: Path) -> None:
    """Sockets of a predecessor that was killed: nobody listens on them any more, and its engines' have other names."""
    if name.is_symlink():
        before = name.resolve()
        if before.name.startswith(f"tidegate-{os.getuid()}-"):
            shutil.rmtree(before, ignore_errors=True)
        name.unlink()
        run.mkdir(mode=0o700, exist_ok=True)  # it may have been that very directory
    for left in run.iterdir():
        if left.is_socket():
            left.unlink()


def _link(name: Path, run: Path, stack: AsyncExitStack) -> None:
    """So that parts which join later find the sockets through the data directory."""
    name.unlink(missing_ok=True)
    name.symlink_to(run)
    stack.callback(name.unlink, missing_ok=True)


def _lock(path: Path, stack: AsyncExitStack) -> None:
    """Held while the platform lives; the kernel gives it back however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(f"another platform uses {path.parent}; end it or choose another --data-dir") from None


def _log_to(path: Path, stack: AsyncExitStack) -> None:
    """Everything from INFO on to a bounded file, warnings to stderr too. Records never hold prompt text."""
    file = _File(path, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES_MAX, delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    screen.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    # A line a request, with its URL: to fetch weights that may be a signed one.
    for noisy in ("alembic", "httpx", "httpx2", "httpcore", "httpcore2", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for handler in (file, screen):
        root.addHandler(handler)
        stack.callback(root.removeHandler, handler)
    stack.callback(file.close)


class _File(RotatingFileHandler):
    """A disk that is full costs lines of the log; said once on stderr, not with a traceback for each of them."""

    lost = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.lost:
            self.lost = True
            sys.stderr.write(f"lines of {self.baseFilename} are lost: {error.strerror}\n")


class _OneLine(logging.Formatter):
    """Tracebacks are for the log file; a person on a terminal gets the line."""

    def formatException(self, ei: object) -> str:
        return ""

    def format(self, record: logging.LogRecord) -> str:
        kept, record.exc_text = record.exc_text, None
        try:
            return super().format(record).rstrip("\n")
        finally:
            record.exc_text = kept
