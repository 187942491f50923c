"""How verbs reach a running platform: its URL and key from options, environment or the platform's ready file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from tidegate.cli.files import configured
from tidegate.cli.output import Problem

READY_FILE = "ready.json"
TIMEOUT_S_MAX = 60.0

Url = Annotated[str | None, typer.Option("--url", envvar="TIDEGATE_URL", help="URL of the platform")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", envvar=["TIDEGATE_ADMIN_KEY", "TIDEGATE_API_KEY"], help="admin key (or a tenant's key: sees its own)"
    ),
]


class Api:
    """The admin REST API. Every method returns decoded JSON or raises Problem with the server's own words."""

    def __init__(self, url: str | None = None, key: str | None = None) -> None:
        import httpx

        if url is None or key is None:
            ready = read_ready()
            url, key = url or ready["base_url"], key or ready["admin_key"]
        self._httpx = httpx
        self.url = platform_url(url)
        check_key(key)
        self._client = httpx.Client(
            base_url=f"{self.url}/api/v1/", headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_S_MAX
        )

    def get(self, path: str, **query: Any) -> Any:
        return self._call("GET", path, query=query)

    def post(self, path: str, body: Any = None) -> Any:
        return self._call("POST", path, body)

    def put(self, path: str, body: Any) -> Any:
        return self._call("PUT", path, body)

    def delete(self, path: str, **query: Any) -> Any:
        return self._call("DELETE", path, query=query)

    def text(self, path: str, **query: Any) -> str:
        """The body as it is, for exports."""
        return str(self._send("GET", path, None, query).text)

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        """Data of each server-sent event, until the server ends the stream."""
        try:
            with self._client.stream("GET", path, timeout=None) as response:
                if response.status_code >= 400:
                    response.read()
                    raise refused(response)
                for line in response.iter_lines():
                    if line.startswith("data:"):
                        yield json.loads(line[5:])
        except self._httpx.TransportError as error:
            raise Problem(f"the platform at {self.url} went away ({type(error).__name__})") from error

    def _call(self, method: str, path: str, body: Any = None, query: Any = None) -> Any:
        response = self._send(method, path, body, query)
        return response.json() if response.content else None

    def _send(self, method: str, path: str, body: Any, query: Any) -> Any:
        asked = given(**(query or {}))
        try:
            response = self._client.request(method, path, json=body, params=asked)
        except self._httpx.TransportError as error:
            raise Problem(
                f"no platform answers at {self.url} ({type(error).__name__}); is `tidegate up` running?",
                exit_code=2 if isinstance(error, self._httpx.ConnectError) else 1,
            ) from error
        if response.status_code >= 400:
            raise refused(response)
        return response


def given(**fields: Any) -> dict[str, Any]:
    """Options that were given: what was left out is for the platform to decide."""
    return {name: value for name, value in fields.items() if value is not None}


def platform_url(url: str) -> str:
    """Without what comes after the platform's own address. Raises Problem for what is none."""
    import httpx

    try:
        usable = httpx.URL(url).scheme in ("http", "https") and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        usable = False
    if not usable:
        raise Problem(f"--url: {url[:80]!r} is not the URL of a platform, e.g. http://127.0.0.1:8000", exit_code=2)
    return url.rstrip("/").removesuffix("/v1")


def check_key(key: str) -> None:
    """Raises Problem for what no header can carry; the key itself is not said."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise Problem("--key: not a key: it is empty, or has characters no key has (keys begin with tg-)", exit_code=2)


def escaped(name: str) -> str:
    """An id as one or more path segments: the slash of ``tenant/name`` stays."""
    return quote(name, safe="/")


def read_ready() -> dict[str, Any]:
    """What `tidegate up` left in its data directory: base_url, admin_key, api_key, endpoints."""
    path = data_dir() / READY_FILE
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise Problem(
            "no platform was started here; run `tidegate up`, or name one with --url and --key "
            "(TIDEGATE_URL and TIDEGATE_ADMIN_KEY)",
            exit_code=2,
        ) from None
    except (OSError, ValueError) as error:
        raise Problem(f"the ready file in the data directory cannot be read ({type(error).__name__})") from error


def data_dir() -> Path:
    """The data directory without loading (and validating) the whole configuration where the environment names it."""
    if named := os.environ.get("TIDEGATE_DATA_DIR"):
        return Path(named)
    if not Path("tidegate.toml").exists():
        return Path(".tidegate")
    return configured().data_dir


def refused(response: Any) -> Problem:
    """What the platform refused, in its own words: the caller's mistake below 500, but for limits that pass (429)."""
    exit_code = 2 if response.status_code < 500 and response.status_code != 429 else 1
    try:
        error = response.json()["error"]
        return Problem(f"{error['message']} ({error.get('code') or error.get('type')})", exit_code)
    except (ValueError, KeyError, TypeError):
        return Problem(f"the platform answered {response.status_code}", exit_code)
