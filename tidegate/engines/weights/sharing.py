"""What nodes on other machines may ask of this one about weights: models that are whole here, and whose turn it is.

One line a request, over a connection that proves who asks (the assembly's matter):

    list DIGEST                    → ``{"source": …, "files": {NAME: {"size": …, "sha256": …}}}``, or ``no``
    read DIGEST START END NAME     → ``ok`` and the bytes, or ``no``
    turn DIGEST [ADDRESS …]        → ``from ADDRESS …``: whole there; or ``fetch``: nobody has it and nobody fetches it

    has DIGEST ADDRESS             (no answer)

Turns are given out by one machine of the platform. Whoever was told to fetch has the turn until it says
``done ADDRESS`` (where others find it now), or until its connection ends, however it ends: then it is the next one's.
Addresses named in ``turn`` were asked and do not have it any more.
"""

import asyncio
import json
import logging
import os
import re
from pathlib import Path

LINE_BYTES_MAX = 16 << 10
PIECE_BYTES = 256 << 10  # between two of these the loop does other things
HOLDERS_MAX = 64  # told of one model
MODELS_MAX = 4_096
_DIGEST = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


class Sharing:
    """`root` is this node's disk cache, `address` where others find it. `serve` makes one connection's protocol."""

    def __init__(self, root: Path, address: str = "") -> None:
        self._models, self._address = root / "models", address
        self._turns: dict[str, asyncio.Lock] = {}
        self._holders: dict[str, list[str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, peer: object) -> asyncio.Protocol:
        def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, writer))
            self._tasks.add(task)  # the loop itself keeps only a weak one
            task.add_done_callback(self._tasks.discard)

        return asyncio.StreamReaderProtocol(asyncio.StreamReader(limit=LINE_BYTES_MAX), begin)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := (await reader.readline()).decode("utf-8", "replace").strip():
                verb, _, rest = line.partition(" ")
                if verb == "turn":
                    await self._turn(rest.split(), reader, writer)
                elif verb == "has":
                    digest, _, address = rest.partition(" ")
                    self._has(digest, address)
                elif verb == "list":
                    writer.write((self._listing(rest) or "no").encode() + b"\n")
                elif verb == "read":
                    await self._read(rest, writer)
                else:
                    break
                await writer.drain()
        except (OSError, ValueError) as error:  # ValueError: a line too long; the node asks elsewhere
            log.info("sharing weights with another node: %s", type(error).__name__)
        finally:
            writer.close()

    # --- models -------------------------------------------------------------------------------------------------------

    def _listing(self, digest: str) -> str:
        """Empty for what is not whole here."""
        if not _DIGEST.fullmatch(digest):
            return ""
        try:
            manifest = json.loads((self._models / digest / "manifest").read_bytes())
            files = {name: {key: entry[key] for key in ("size", "sha256")} for name, entry in manifest["files"].items()}
            return json.dumps({"source": manifest["source"], "files": files})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return ""

    async def _read(self, wanted: str, writer: asyncio.StreamWriter) -> None:
        digest, start, end, name = (wanted.split(" ", 3) + [""] * 4)[:4]
        at, stop = int(start), int(end)
        listed = json.loads(self._listing(digest) or '{"files": {}}')["files"].get(name)
        if listed is None or not 0 <= at <= stop <= listed["size"]:
            writer.write(b"no\n")
            return
        descriptor = await asyncio.to_thread(os.open, self._models / digest / "files" / name, os.O_RDONLY)
        try:
            writer.write(b"ok\n")
            while at < stop:
                piece = await asyncio.to_thread(os.pread, descriptor, min(PIECE_BYTES, stop - at), at)
                if not piece:
                    raise OSError(0, "the file became shorter")
                writer.write(piece)
                await writer.drain()
                at += len(piece)
        finally:
            os.close(descriptor)

    # --- turns --------------------------------------------------------------------------------------------------------

    async def _turn(self, words: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Whoever gave up meanwhile gets its turn, is found gone, and the next one is served."""
        digest, stale = (words or [""])[0], set(words[1:])
        if not _DIGEST.fullmatch(digest):
            writer.write(b"no\n")
            return
        async with self._lock(digest):
            known = self._holders.get(digest) or ([self._address] if self._address and self._listing(digest) else [])
            holders = [address for address in known if address not in stale]
            self._holders[digest] = holders
            if holders:
                writer.write(f"from {' '.join(holders)}\n".encode())
                return
            writer.write(b"fetch\n")
            await writer.drain()
            verb, _, address = (await reader.readline()).decode("utf-8", "replace").strip().partition(" ")
            if verb == "done" and address:
                self._holders[digest] = [address]

    def _lock(self, digest: str) -> asyncio.Lock:
        if len(self._turns) >= MODELS_MAX:
            self._turns = {known: lock for known, lock in self._turns.items() if lock.locked()}
            self._holders = {known: there for known, there in self._holders.items() if known in self._turns}
        return self._turns.setdefault(digest, asyncio.Lock())

    def _has(self, digest: str, address: str) -> None:
        """A copy was made there, too; only of what was asked for before."""
        holders = self._holders.get(digest)
        if holders is not None and address and address not in holders and len(holders) < HOLDERS_MAX:
            holders.append(address)
