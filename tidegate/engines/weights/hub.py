"""``hf://org/name@revision``: a repository of the Hugging Face Hub, or of any server that speaks its API.

API: https://huggingface.co/docs/hub/api (model info with file sizes; ``/resolve/`` with byte ranges), spoken through
`huggingface_hub`, so that tokens, proxies and custom certificates work as its users expect. A branch or tag is resolved
to the commit it means now: the source that is remembered never changes its contents.
"""

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]  # lazily exported

from tidegate.engines.weights.faults import SourceDenied, SourceMissing, SourceUnavailable
from tidegate.engines.weights.source import FILES_MAX, HubAddress, RemoteFile, safe

LISTING_S_MAX = 30.0
READ_S_MAX = 60.0  # without a byte
HOW = "set weights.hub_token (or HF_TOKEN) to a token that may read it"
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class HubModel:
    """Implements `RemoteModel`. `token` None: what `huggingface_hub` finds in its environment, if anything."""

    def __init__(self, address: HubAddress, *, endpoint: str | None, token: str | None) -> None:
        """Lists the repository. Raises WeightFault."""
        self._repository, self._endpoint = address.repository, endpoint
        self._landed: dict[str, str] = {}
        self._headers = build_hf_headers(token=token, library_name="tidegate")
        where = f"{address.repository}@{address.revision}"
        try:
            info = HfApi(endpoint=endpoint, token=token, library_name="tidegate").model_info(
                address.repository, revision=address.revision, files_metadata=True, timeout=LISTING_S_MAX
            )
        except GatedRepoError as error:
            raise SourceDenied(f"{where} is gated and its owner has not let this token in; {HOW}") from error
        except RevisionNotFoundError as error:
            raise SourceMissing(f"{address.repository} has no revision {address.revision!r}") from error
        except RepositoryNotFoundError as error:
            raise SourceMissing(f"there is no repository {address.repository}, or it is private: then {HOW}") from error
        except HFValidationError as error:
            raise SourceMissing(f"{address.repository!r} is not a repository's name") from error
        except HfHubHTTPError as error:
            raise _failed(error.response, where) from error
        except OfflineModeIsEnabled as error:
            raise SourceUnavailable("HF_HUB_OFFLINE is set: nothing is fetched from the Hub") from error
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise SourceUnavailable(f"the Hub does not answer ({type(error).__name__})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise SourceUnavailable("what answers at weights.hub_url does not speak the Hub's API") from error
        siblings = [s for s in info.siblings or () if s.size is not None and safe(s.rfilename)][:FILES_MAX]
        self._revision = info.sha or address.revision
        self.source = f"hf://{address.repository}@{self._revision}"
        self.files = {
            s.rfilename: RemoteFile(
                s.rfilename,
                s.size or 0,
                f"sha256:{s.lfs.sha256}" if s.lfs else f"git:{s.blob_id}" if s.blob_id else "",
            )
            for s in siblings
        }

    def read(self, name: str, start: int, end: int) -> bytes:
        body = bytearray(max(0, end - start))
        with memoryview(body) as buffer:
            self.read_into(name, start, buffer)
        return bytes(body)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Large files are elsewhere, behind a signed address that the Hub redirects to: it is asked for once, and again
        when it is refused, as after it has run out.
        """
        if not buffer:
            return
        landed = self._landed.get(name)
        if landed is not None:
            try:
                self._get(landed, {}, name, start, buffer)
                return
            except (SourceDenied, SourceMissing):
                self._landed.pop(name, None)
        url = hf_hub_url(self._repository, name, revision=self._revision, endpoint=self._endpoint)
        found = self._get(url, self._headers, name, start, buffer)
        if found != url:
            self._landed[name] = found

    def _get(self, url: str, headers: dict[str, str], name: str, start: int, buffer: memoryview) -> str:
        """Fills the buffer; the address the bytes came from in the end."""
        size, end = 0, start + len(buffer)
        wanted = {**headers, "range": f"bytes={start}-{end - 1}", "accept-encoding": "identity"}
        try:
            with get_session().stream("GET", url, headers=wanted, timeout=READ_S_MAX) as response:
                if response.status_code == 200 and (start or end < self.files[name].size):
                    raise SourceMissing(f"the Hub does not serve byte ranges of {name}, which loading needs")
                if response.status_code not in (200, 206):
                    raise _failed(response, name)
                for piece in response.iter_raw():
                    kept = piece[: len(buffer) - size]
                    buffer[size : size + len(kept)] = kept
                    size += len(piece)
                    if size > len(buffer):
                        break
                found = str(response.url)
        except (httpx2.RequestError, OfflineModeIsEnabled) as error:
            raise SourceUnavailable(f"the Hub broke off while reading {name} ({type(error).__name__})") from error
        if size != len(buffer):
            raise SourceUnavailable(f"the Hub sent {size} of {len(buffer)} bytes of {name}")
        return found


def _failed(response: httpx2.Response | None, what: str) -> SourceDenied | SourceMissing | SourceUnavailable:
    status = response.status_code if response is not None else 0
    if status in (401, 403):
        return SourceDenied(f"the Hub refuses the credentials for {what}; {HOW}")
    if status in (404, 410):
        return SourceMissing(f"the Hub has no {what}")
    after = response.headers.get("retry-after", "") if response is not None and status in _BUSY else ""
    return SourceUnavailable(
        f"the Hub answered {status or 'nothing usable'} for {what}", int(after) * 1000 if after.isdigit() else 0
    )
