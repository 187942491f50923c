"""A Hub on loopback, for tests: the parts of the Hugging Face Hub's HTTP API that loading a model uses.

Shapes after https://huggingface.co/docs/hub/api: ``/api/models/ORG/NAME/revision/REV?blobs=true`` and
``/ORG/NAME/resolve/REV/FILE`` with byte ranges; errors carry ``X-Error-Code``. Faults can be switched on while it runs.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES_MIN = 4096  # the real Hub's rule is by file type; any bound will do here


@dataclass
class Hub:
    """`repositories`: (name, revision) → directory. Faults: see the fields; all of them may change while it serves."""

    url: str = ""
    repositories: dict[tuple[str, str], Path] = field(default_factory=dict)
    token: str | None = None
    status: int = 0  # answer everything with this
    retry_after: str = ""
    cut_after_reads: int | None = None  # after so many ranges, connections break half-way through the body
    slow_s: float = 0.0
    corrupt: str = ""  # a file whose bytes differ from its listed checksum, in reads of more than so many bytes
    corrupt_bytes_min: int = 0
    commits: dict[str, str] = field(default_factory=dict)
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    seen_tokens: Counter[str] = field(default_factory=Counter)
    elsewhere: bool = False  # files are behind a signed address of another host name, as the real Hub's large ones are
    signature: str = "s1"  # what such addresses must carry now
    signed_tokens: Counter[str] = field(default_factory=Counter)  # bearer tokens that were shown there
    resolved: int = 0
    pause: threading.Event = field(default_factory=threading.Event)

    def put(self, name: str, folder: Path, revision: str = "main") -> str:
        """Publishes a directory; the commit it got."""
        commit = hashlib.sha1(f"{name}{revision}{folder}{len(self.repositories)}".encode()).hexdigest()
        self.repositories[name, revision] = self.repositories[name, commit] = folder
        self.commits[f"{name}@{revision}"] = self.commits[f"{name}@{commit}"] = commit
        return commit

    @property
    def bytes_read(self) -> int:
        return sum(end - start for _, start, end in self.ranges)


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            bearer = self.headers.get("authorization", "").removeprefix("Bearer ")
            hub.seen_tokens[bearer] += 1
            if hub.status:
                return self._answer(hub.status, b"", {"retry-after": hub.retry_after} if hub.retry_after else {})
            if hub.token is not None and bearer != hub.token and "signature=" not in self.path:
                return self._answer(401, b"", {} if bearer else {"x-error-code": "RepoNotFound"})
            url = urlsplit(self.path)
            signed = parse_qs(url.query).get("signature", [""])[0]
            if signed:
                hub.signed_tokens[bearer] += 1
                if signed != hub.signature:
                    return self._answer(403, b"expired", {})
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if parts[:2] == ["api", "models"]:
                return self._info(f"{parts[2]}/{parts[3]}", parts[5] if len(parts) > 5 else "main", url.query)
            return self._file(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))

        def _folder(self, name: str, revision: str) -> Path | None:
            folder = hub.repositories.get((name, revision))
            if folder is None:
                known = any(repository == name for repository, _ in hub.repositories)
                code = "RevisionNotFound" if known else "RepoNotFound"
                self._answer(404, b"", {"x-error-code": code})
            return folder

        def _info(self, name: str, revision: str, query: str) -> None:
            folder = self._folder(name, revision)
            if folder is None:
                return
            blobs = parse_qs(query).get("blobs") == ["True"] or "blobs=true" in query.lower()
            siblings = []
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                entry: dict[str, object] = {"rfilename": str(path.relative_to(folder))}
                data = path.read_bytes()
                if blobs:
                    entry |= {"size": len(data), "blobId": _git_sha(data)}
                    if len(data) >= LFS_BYTES_MIN:
                        sha = hashlib.sha256(data).hexdigest()
                        entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 130}
                siblings.append(entry)
            info = {"id": name, "modelId": name, "sha": hub.commits[f"{name}@{revision}"], "siblings": siblings}
            self._answer(200, json.dumps(info).encode(), {"content-type": "application/json"})

        def _file(self, name: str, revision: str, file: str) -> None:
            folder = self._folder(name, revision)
            if folder is None:
                return
            path = folder / file
            if not path.is_file():
                return self._answer(404, b"", {"x-error-code": "EntryNotFound"})
            if hub.elsewhere and "signature=" not in self.path and file.endswith(".safetensors"):
                hub.resolved += 1
                place = f"http://localhost:{self.server.server_address[1]}{self.path}?signature={hub.signature}"
                return self._answer(302, b"", {"location": place})
            size = path.stat().st_size
            asked = self.headers.get("range", f"bytes=0-{size - 1}").removeprefix("bytes=").split("-")
            start, end = int(asked[0]), min(int(asked[1]) + 1, size)
            with path.open("rb") as opened:
                opened.seek(start)
                body = bytearray(opened.read(end - start))
            if file == hub.corrupt and len(body) > hub.corrupt_bytes_min:
                body[-1] ^= 0xFF
            hub.ranges.append((file, start, end))
            cut = hub.cut_after_reads is not None and len(hub.ranges) > hub.cut_after_reads
            if hub.slow_s:
                hub.pause.wait(hub.slow_s)
            self._answer(206, bytes(body), {"content-range": f"bytes {start}-{end - 1}/{size}"}, cut=cut)

        def _answer(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if cut:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(body)

    return Handler


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
