"""What services stand on: the data directory with its lock and log, the database and the stores in it, the clock."""

import fcntl
import logging
import os
import shutil
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path

from tidegate.assemble.sockets import StartError
from tidegate.config import Config, socket_directory
from tidegate.stores.batches import SqlBatchStore
from tidegate.stores.contracts import SqlContracts
from tidegate.stores.database import migrate, open_database
from tidegate.stores.journal_reader import SegmentJournalReader
from tidegate.stores.ledger import SqlLedger
from tidegate.stores.prices import SqlPriceBook
from tidegate.stores.state import SqlStateStore

DATABASE_FILE = "tidegate.db"
LOCK_FILE = "lock"
LOG_BYTES_MAX = 8 << 20
LOG_FILES_MAX = 3


class WallClock:
    """The real time, for everything that is handed a Clock."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Ground:
    """Directories (all of mode 0700) and stores. `run` is for sockets, `journal` for usage records of every gateway."""

    data: Path
    run: Path
    logs: Path
    journal: Path
    log_file: Path
    state: SqlStateStore
    ledger: SqlLedger
    prices: SqlPriceBook
    contracts: SqlContracts
    journal_reader: SegmentJournalReader
    batches: SqlBatchStore


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
    except OSError as error:
        raise StartError(f"the data directory {data} cannot be used: {error.strerror}") from error
    if run.parent != data:
        stack.callback(shutil.rmtree, run, ignore_errors=True)
        _link(data / "run", run, stack)
    log_file = logs / log_name
    _log_to(log_file, stack)
    return Folders(data, run, logs, log_file)


def prepare(config: Config, stack: AsyncExitStack) -> Ground:
    """Takes the data directory and opens what is in it; `stack` gives both back.

    Raises StartError when the directory cannot be used or another platform uses it, StoreFault for the database.
    """
    folders = take(config, stack, log_name="platform.log")
    data, journal = folders.data, folders.data / "journal"
    journal.mkdir(mode=0o700, exist_ok=True)
    url = config.database_url.get_secret_value() if config.database_url else f"sqlite:///{data / DATABASE_FILE}"
    engine = open_database(url)
    stack.callback(engine.dispose)
    migrate(engine)
    return Ground(
        data=data,
        run=folders.run,
        logs=folders.logs,
        journal=journal,
        log_file=folders.log_file,
        state=SqlStateStore(engine),
        ledger=SqlLedger(engine),
        prices=SqlPriceBook(engine),
        contracts=SqlContracts(engine),
        journal_reader=SegmentJournalReader(journal),
        batches=SqlBatchStore(engine),
    )


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
    file = RotatingFileHandler(path, maxBytes=LOG_BYTES_MAX, backupCount=LOG_FILES_MAX, delay=True)
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
