"""How `tidegate batches` reaches `/v1`, and the line that shows how far a batch is."""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Self

import typer

from tidegate.cli.client import TIMEOUT_S_MAX, read_ready, refused
from tidegate.cli.output import Problem

Key = Annotated[str | None, typer.Option("--key", envvar="TIDEGATE_API_KEY", help="a tenant's API key")]
POLL_S = 0.5
UPLOAD_S_MAX = 1_800.0
ENDED = ("completed", "failed", "expired", "cancelled")


class Batches:
    """`/v1/files` and `/v1/batches` with a tenant's key. Methods return decoded JSON or raise Problem."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        import httpx

        if url is None or key is None:
            ready = read_ready()
            url, key = url or ready["base_url"], key or ready["api_key"]
        self._httpx = httpx
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=f"{self.url}/v1/", headers=headers, timeout=TIMEOUT_S_MAX)

    def create(self, file: Path, api: str) -> dict[str, Any]:
        try:
            with file.open("rb") as data:
                return self._create(data, file.name, api)
        except OSError as error:
            raise Problem(f"{file}: {error.strerror}", exit_code=2) from None

    def create_from(self, lines: Iterable[bytes], name: str, api: str) -> dict[str, Any]:
        return self._create(io.BytesIO(b"".join(lines)), name, api)

    def _create(self, data: IO[bytes], name: str, api: str) -> dict[str, Any]:
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


class Away(Problem):
    """Nobody there, or not ready yet."""


class Progress:
    """One line on stderr: a bar, lines, tokens a second, time left, cost so far. Nothing when `quiet`."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._first: tuple[float, int, int] | None = None

    def __enter__(self) -> Self:
        if not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[more]}"),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("validating", total=None, more="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, batch: dict[str, Any]) -> None:
        if self._bar is None:
            return
        counts = batch["request_counts"]
        done = counts["completed"] + counts["failed"]
        more = describe(batch, self._pace(done, batch["usage"]["output_tokens"]))
        self._bar.update(
            self._task, description=batch["status"], completed=done, total=counts["total"] or None, more=more
        )

    def _pace(self, done: int, tokens: int) -> tuple[float, float]:
        """(lines, output tokens) a second since this began to look."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done, tokens)
        since_s = now - self._first[0]
        if since_s <= 0:
            return 0.0, 0.0
        return (done - self._first[1]) / since_s, (tokens - self._first[2]) / since_s


def describe(batch: dict[str, Any], pace: tuple[float, float]) -> str:
    """``83 tokens/s · 4 min left · $0.0123``; what is not known yet is left out."""
    counts = batch["request_counts"]
    left = counts["total"] - counts["completed"] - counts["failed"]
    parts = []
    if pace[1] > 0:
        parts.append(f"{pace[1]:.0f} tokens/s")
    if pace[0] > 0 and left and batch["status"] == "in_progress":
        parts.append(f"{_duration(left / pace[0])} left")
    if batch.get("cost_nano_usd") is not None:
        parts.append(f"${batch['cost_nano_usd'] / 1e9:.4f}")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3600:.1f} h"
