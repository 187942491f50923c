"""``s3://bucket/prefix``: objects of S3 or of a store that speaks its API (MinIO, Ceph, R2, …), through `obstore`.

Every read carries the entity tag of the listing (``If-Match``), so that an object replaced half-way through a download
is noticed at once. Credentials: those of the settings, else of the environment (``AWS_*``), else of the machine's role.
"""

import configparser
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tidegate.domain.errors import Refusal
from tidegate.engines.weights.faults import SourceChanged, SourceDenied, SourceMissing, SourceUnavailable
from tidegate.engines.weights.source import FILES_MAX, RemoteFile, S3Address, safe

HOW = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or weights.s3_credentials_file"
REQUEST_S_MAX = 60


@dataclass(frozen=True, slots=True)
class S3Access:
    """`endpoint` empty: Amazon's. `keys`: credentials given outright, as obstore names them. `credentials_file`: in the
    format of the AWS command line; its ``[default]`` section is used.
    """

    endpoint: str = ""
    region: str = ""
    credentials_file: Path | None = None
    keys: dict[str, str] = field(default_factory=dict, repr=False)


class S3Model:
    """Implements `RemoteModel`."""

    def __init__(self, address: S3Address, access: S3Access) -> None:
        """Lists the prefix. Raises WeightFault; Refusal when the extra is not installed."""
        try:
            import obstore
            from obstore.store import S3Store
        except ImportError as error:
            raise Refusal(
                "invalid_configuration", "model: s3:// needs the extra: pip install 'tidegate[s3]'", param="model"
            ) from error
        self._get, self._range = obstore.get, address
        self.source = f"s3://{address.bucket}/{address.prefix}"
        self._store = S3Store(address.bucket, **_options(access))
        self._tags: dict[str, str] = {}
        self.files: dict[str, RemoteFile] = {}
        try:
            for page in obstore.list(self._store, address.prefix):
                for found in page:
                    self._note(found, address.prefix)
        except (FileNotFoundError, obstore.exceptions.BaseError) as error:
            raise _failed(error, self.source) from error
        if not self.files:
            raise SourceMissing(f"there are no objects under {self.source}")

    def read(self, name: str, start: int, end: int) -> bytes:
        body = bytearray(max(0, end - start))
        with memoryview(body) as buffer:
            self.read_into(name, start, buffer)
        return bytes(body)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        if start == end:
            return
        from obstore.exceptions import BaseError

        options: Any = (
            {"range": (start, end), "if_match": self._tags[name]} if self._tags[name] else {"range": (start, end)}
        )
        try:
            body = memoryview(self._get(self._store, f"{self._range.prefix}/{name}", options=options).bytes())
        except (FileNotFoundError, BaseError) as error:
            raise _failed(error, name) from error
        if body.nbytes != len(buffer):
            raise SourceUnavailable(f"the store sent {body.nbytes} of {len(buffer)} bytes of {name}")
        buffer[:] = body

    def _note(self, found: Any, prefix: str) -> None:
        name = str(found["path"]).removeprefix(prefix).lstrip("/")
        if safe(name) and len(self.files) < FILES_MAX:
            self.files[name] = RemoteFile(name, int(found["size"]), f"etag:{found['e_tag'] or ''}")
            self._tags[name] = str(found["e_tag"] or "")


def _options(access: S3Access) -> dict[str, Any]:
    options: dict[str, Any] = {
        "client_options": {"timeout": f"{REQUEST_S_MAX}s", "allow_http": access.endpoint.startswith("http://")},
        "retry_config": {"max_retries": 0},  # retries are the download's own
    }
    if access.endpoint:
        options |= {"endpoint": access.endpoint, "virtual_hosted_style_request": False}
    if access.region:
        options["region"] = access.region
    return options | access.keys | _credentials(access.credentials_file)


def _credentials(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text())
        section = parser["default"]
        found = {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token", ""),
        }
    except (OSError, configparser.Error, KeyError) as error:
        # Neither the parser's text nor the cause's: both may quote the file.
        raise SourceDenied(f"weights.s3_credentials_file cannot be used ({type(error).__name__})") from None
    return {name: value for name, value in found.items() if value}


def _failed(error: Exception, what: str) -> SourceDenied | SourceMissing | SourceChanged | SourceUnavailable:
    text, kind = str(error), type(error).__name__
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or (
        "status code: 40" in text and ("status code: 401" in text or "status code: 403" in text)
    ):
        return SourceDenied(f"the store refuses the credentials for {what}; {HOW}")
    if isinstance(error, FileNotFoundError) or "status code: 404" in text:
        return SourceMissing(f"the store has no {what}")
    if kind == "PreconditionError":
        return SourceChanged(f"{what} was replaced at the source while it was read")
    return SourceUnavailable(f"the store does not answer for {what} ({kind})")
