"""What the batch service needs of the outside, and what it is told at assembly.

`assemble` plugs in `stores.batches`, `stores.vault` and the control plane. Methods of stores are synchronous and called
through ``asyncio.to_thread``; each raises StoreFault when it cannot do its work.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tidegate.domain.endpoint import ModelKind
from tidegate.wire.batch import StoredBatch, StoredFile


class BatchStore(Protocol):
    def add_file(self, file: StoredFile) -> None: ...

    def file(self, tenant: str, file_id: str) -> StoredFile | None: ...

    def list_files(
        self, tenant: str, *, after: str | None, limit: int, newest_first: bool = True, purpose: str | None = None
    ) -> Sequence[StoredFile]: ...

    def remove_file(self, file_id: str) -> None: ...

    def expired_files(self, now_ms: int, limit: int) -> Sequence[StoredFile]: ...

    def file_ids(self) -> frozenset[str]: ...

    def add_batch(self, batch: StoredBatch) -> None: ...

    def save_batch(self, batch: StoredBatch, produced: Sequence[StoredFile] = ()) -> None: ...

    def batch(self, tenant: str, batch_id: str) -> StoredBatch | None: ...

    def list_batches(self, tenant: str, *, after: str | None, limit: int) -> Sequence[StoredBatch]: ...

    def open_batches(self) -> Sequence[StoredBatch]: ...


class Writer(Protocol):
    def append(self, data: bytes) -> None:
        """One frame."""
        ...

    def sync(self) -> None:
        """What was appended is durable once this returns."""
        ...

    def finish(self) -> None:
        """The file is whole; durable once this returns."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    def frames(self) -> Iterator[bytes]: ...

    def frame(self, number: int) -> bytes: ...

    def close(self) -> None: ...


class Vault(Protocol):
    """Encrypted files by name."""

    def create(self, name: str) -> Writer: ...

    def resume(self, name: str, each: Callable[[bytes], None]) -> Writer: ...

    def open(self, name: str) -> Reader: ...

    def remove(self, name: str) -> None: ...

    def names(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Model:
    """What a batch must know of the endpoint its lines name."""

    endpoint: str
    kind: ModelKind


@dataclass(frozen=True, slots=True)
class Offer:
    """What the core offers batch work on one endpoint right now: replicas that are ready, requests each takes at once,
    and how many replicas there could ever be.
    """

    ready: int
    slots: int
    replicas_max: int


class Fleet(Protocol):
    """The control plane, as far as offline work goes."""

    def model(self, tenant: str, name: str) -> Model:
        """The endpoint `tenant` calls `name`. Refusal model_not_found."""
        ...

    def offer(self, endpoint: str) -> Offer: ...

    def cost_nano_usd(self, batch: StoredBatch) -> int | None:
        """What its tokens so far cost at the price in force now; None where there is no price. Blocking."""
        ...

    async def work(self, wanted: Mapping[str, bool]) -> None:
        """Which endpoints have batch lines to do; True where they may compete with serverless traffic."""
        ...


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where a tenant's finished batches are announced; `secret` (``whsec_…``) signs."""

    url: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """`gateway_url` ends without a slash; `runner_secret` is the key gateways know the runner by."""

    gateway_url: str
    runner_secret: str = field(repr=False)
    retention_s: int = 30 * 86_400
    may_rush: bool = False
    in_flight_max: int = 256
    line_bytes_max: int = 8 << 20
    webhooks: Mapping[str, Webhook] | None = None
