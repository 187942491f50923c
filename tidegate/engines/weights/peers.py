"""Weights from nodes on other machines: asks whose turn it is, and reads what another node has (`sharing` answers).

Peers are a better source, never a condition: whatever goes wrong with them, the model is fetched from where it is from.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from socket import socket

from tidegate.domain.errors import LinkFault
from tidegate.engines.weights.faults import SourceMissing, SourceUnavailable, Stopped
from tidegate.engines.weights.source import RemoteFile, RemoteModel, safe

TURN_S_MAX = 900.0  # waited for another node's fetch; then this one fetches, too
READ_S_MAX = 60.0  # without a byte
POLL_S = 0.2
LINE_BYTES_MAX = 4 << 20

log = logging.getLogger(__name__)

Dial = Callable[[str], socket]
"""A blocking connection to the part at an address. Raises LinkFault, OSError."""


@dataclass
class Turn:
    """`peers` have the model. `done` is to be called once it is whole here."""

    peers: list[RemoteModel] = field(default_factory=list)
    done: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peers:
    """`registrar` gives out turns; `address` is where others find the models of this node."""

    dial: Dial
    registrar: str
    address: str

    @contextlib.contextmanager
    def turn(self, digest: str, stop: threading.Event) -> Iterator[Turn]:
        """Waits until it is this node's turn to fetch a model, or others have it. Raises Stopped."""
        with contextlib.ExitStack() as stack:
            stale: list[str] = []
            while True:
                try:
                    line, turns = self._asked(stack, digest, stale, stop)
                except (LinkFault, OSError) as error:
                    log.info("whose turn it is to fetch %s cannot be asked (%s)", digest[:12], type(error).__name__)
                    yield Turn()
                    return
                found = self._opened(line.split()[1:], digest) if line.startswith("from ") else []
                if found or not line.startswith("from "):
                    break
                stale += line.split()[1:]
            word = f"has {digest}" if found else "done"
            yield Turn(found, lambda: self._tell(turns, f"{word} {self.address}"))

    def _tell(self, turns: "_Lines", line: str) -> None:
        try:
            turns.say(line)
        except OSError as error:  # then others fetch it from its source
            log.info("that a model is here now could not be told (%s)", type(error).__name__)

    def _asked(
        self, stack: contextlib.ExitStack, digest: str, stale: list[str], stop: threading.Event
    ) -> tuple[str, "_Lines"]:
        turns = stack.enter_context(_Lines(self.dial(self.registrar)))
        turns.say(" ".join(["turn", digest, *stale]))
        until = time.monotonic() + TURN_S_MAX
        while (line := turns.hear(POLL_S)) is None:
            if stop.is_set():
                raise Stopped("given up while another node was fetching the same weights")
            if time.monotonic() > until:
                raise TimeoutError
        return line, turns

    def _opened(self, addresses: list[str], digest: str) -> list[RemoteModel]:
        found: list[RemoteModel] = []
        for address in addresses:
            try:
                found.append(PeerModel(self.dial, address, digest))
            except (SourceMissing, SourceUnavailable) as fault:
                log.info("%s: %s", address, fault.reason)
        return found


class PeerModel:
    """Implements `RemoteModel`: one model that another node has whole. Checksums are those of that node's manifest."""

    def __init__(self, dial: Dial, address: str, digest: str) -> None:
        """Raises SourceMissing, SourceUnavailable."""
        self._dial, self._address, self._digest = dial, address, digest
        self._own = threading.local()
        line = self._call(f"list {digest}")
        if line == "no":
            raise SourceMissing("it does not have these weights any more")
        try:
            listed = json.loads(line)
            self.source = str(listed["source"])
            self.files: Mapping[str, RemoteFile] = {
                name: RemoteFile(name, int(entry["size"]), f"sha256:{entry['sha256']}")
                for name, entry in listed["files"].items()
                if safe(name)
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceUnavailable("it does not say what it has") from error

    def read(self, name: str, start: int, end: int) -> bytes:
        body = bytearray(max(0, end - start))
        with memoryview(body) as buffer:
            self.read_into(name, start, buffer)
        return bytes(body)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        if not buffer:
            return
        if self._call(f"read {self._digest} {start} {start + len(buffer)} {name}") != "ok":
            raise SourceMissing(f"another node does not have {name} any more")
        try:
            self._own.lines.fill(buffer)
        except OSError as error:
            self._own.lines = None
            raise SourceUnavailable(f"another node broke off while reading {name}") from error

    def _call(self, line: str) -> str:
        """On this thread's own connection; once more on a new one where that was closed meanwhile."""
        for kept in (getattr(self._own, "lines", None), None):
            try:
                lines = kept or _Lines(self._dial(self._address))
                lines.say(line)
                self._own.lines = lines
                if (answer := lines.hear(READ_S_MAX)) is not None:
                    return answer
                raise TimeoutError
            except (LinkFault, OSError) as error:
                self._own.lines = None
                if kept is None:
                    raise SourceUnavailable(f"another node does not answer ({type(error).__name__})") from error
        raise AssertionError("unreachable: the last try returns or raises")


class _Lines:
    """Lines and bytes over a blocking connection. OSError when it is over."""

    def __init__(self, connection: socket) -> None:
        self._connection = connection
        self._read = bytearray()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def __del__(self) -> None:
        self._connection.close()

    def say(self, line: str) -> None:
        self._connection.settimeout(READ_S_MAX)
        self._connection.sendall(line.encode() + b"\n")

    def hear(self, wait_s: float) -> str | None:
        """The next line, or None after so long without one."""
        self._connection.settimeout(wait_s)
        while b"\n" not in self._read:
            try:
                piece = self._connection.recv(64 << 10)
            except TimeoutError:
                return None
            if not piece or len(self._read) > LINE_BYTES_MAX:
                raise ConnectionResetError("it was closed")
            self._read += piece
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read = bytearray(rest)
        return line.decode("utf-8", "replace")

    def fill(self, buffer: memoryview) -> None:
        self._connection.settimeout(READ_S_MAX)
        size = min(len(self._read), len(buffer))
        buffer[:size] = self._read[:size]
        del self._read[:size]
        while size < len(buffer):
            count = self._connection.recv_into(buffer[size:])
            if not count:
                raise ConnectionResetError("it was closed")
            size += count
