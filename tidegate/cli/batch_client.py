"""How `tidegate batches` reaches `/v1`."""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from tidegate.cli.client import TIMEOUT_S_MAX, check_key, platform_url, read_ready, refused
from tidegate.cli.output import Problem

Key = Annotated[str | None, typer.Option("--key", envvar="TIDEGATE_API_KEY", help="a tenant's API key")]
POLL_S = 0.5
UPLOAD_S_MAX = 1_800.0
ENDED = ("completed", "failed", "expired", "cancelled")


class Batches:
    """`/v1/files` and `/v1/batches` with a tenant's key. Methods return decoded JSON or raise Problem."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        import httpx

        if url is None:
            ready = read_ready()
            url, key = ready["base_url"], ready["api_key"] if key is None else key
        if not key:  # of another platform, or of one without the demo tenant, no tenant's key is known
            made = "`tidegate keys create TENANT` makes one"
            raise Problem(f"batches are a tenant's: say --key or TIDEGATE_API_KEY; {made}", exit_code=2)
        self._httpx = httpx
        self.url = platform_url(url)
        check_key(key)
        headers = {"authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=f"{self.url}/v1/", headers=headers, timeout=TIMEOUT_S_MAX)

    def create(self, file: Path, api: str, sent: Callable[[int, int], None]) -> dict[str, Any]:
        """`sent` is told how many bytes of how many are on their way."""
        try:
            with file.open("rb") as data:
                return self._create(_Told(data, file.stat().st_size, sent), file.name, api)
        except OSError as error:
            raise Problem(f"{file}: {error.strerror}", exit_code=2) from None

    def create_from(self, lines: Iterable[bytes], name: str, api: str) -> dict[str, Any]:
        return self._create(io.BytesIO(b"".join(lines)), name, api)

    def _create(self, data: Any, name: str, api: str) -> dict[str, Any]:
        form = {"purpose": (None, "batch"), "file": (name, data)}
        file = self.call("POST", "files", files=form, timeout=UPLOAD_S_MAX)
        wanted = {"input_file_id": file["id"], "endpoint": api, "completion_window": "24h"}
        return self.call("POST", "batches", json=wanted)

    def get(self, batch_id: str) -> dict[str, Any]:
        return self.call("GET", f"batches/{batch_id}")

    def follow(self, batch_id: str, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Asks until it has ended; a platform that restarts meanwhile is waited for."""
        while True:
            try:
                batch = self.get(batch_id)
            except Away:
                time.sleep(POLL_S)
                continue
            show(batch)
            if batch["status"] in ENDED:
                return batch
            time.sleep(POLL_S)

    def content(self, file_id: str) -> Iterator[bytes]:
        try:
            with self._client.stream("GET", f"files/{file_id}/content") as response:
                if response.status_code >= 400:
                    response.read()
                    raise refused(response)
                yield from response.iter_bytes()
        except self._httpx.TransportError as error:
            raise Away(f"the platform at {self.url} went away ({type(error).__name__})") from error

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, **options)
        except self._httpx.TransportError as error:
            raise Away(
                f"no platform answers at {self.url} ({type(error).__name__}); is `tidegate up` running?"
            ) from error
        if response.status_code == 503:
            raise Away("the platform is not ready")
        if response.status_code >= 400:
            raise refused(response)
        return dict(response.json())


class _Told:
    """A file that tells how much of it was read."""

    def __init__(self, file: IO[bytes], nbytes: int, sent: Callable[[int, int], None]) -> None:
        self._file = file
        self._nbytes = nbytes
        self._sent = sent

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self._sent(self._file.tell(), self._nbytes)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Away(Problem):
    """Nobody there, or not ready yet."""
