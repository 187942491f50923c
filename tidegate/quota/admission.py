"""May this key call this? Refused by name, before anything is held or sent."""

from typing import Protocol, TypeVar

from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import Refusal


class KeyFacts(Protocol):
    """What admission must know of an API key; instants are epoch milliseconds."""

    @property
    def tenant(self) -> str | None: ...

    @property
    def expires_ms(self) -> int | None: ...

    @property
    def revoked(self) -> bool: ...


Key = TypeVar("Key", bound=KeyFacts)

# Which kinds of model answer an API path.
KINDS: dict[str, frozenset[ModelKind]] = {
    "chat/completions": frozenset({ModelKind.GENERATIVE}),
    "completions": frozenset({ModelKind.GENERATIVE}),
    "embeddings": frozenset({ModelKind.EMBEDDING}),
    "classify": frozenset({ModelKind.CLASSIFICATION}),
    "rerank": frozenset({ModelKind.CLASSIFICATION, ModelKind.EMBEDDING}),
}
_SERVES = {
    ModelKind.GENERATIVE: "chat/completions and completions",
    ModelKind.EMBEDDING: "embeddings and rerank",
    ModelKind.CLASSIFICATION: "classify and rerank",
}


def check_key(key: Key | None, now_ms: int) -> Key:
    """The key, if it is good now. Refusal invalid_api_key, revoked_api_key or expired_api_key."""
    if key is None:
        raise Refusal("invalid_api_key", "no valid API key: send `Authorization: Bearer KEY`")
    if key.revoked:
        raise Refusal("revoked_api_key", "this API key was revoked")
    if key.expires_ms is not None and key.expires_ms <= now_ms:
        raise Refusal("expired_api_key", "this API key has expired")
    return key


def tenant_of(key: KeyFacts) -> str:
    """Whose requests these are. Refusal permission_denied for an admin key: nobody could be billed."""
    if key.tenant is None:
        raise Refusal("permission_denied", "an admin key belongs to no tenant and cannot call models; use an API key")
    return key.tenant


def check_operator(key: KeyFacts) -> None:
    """Refusal permission_denied for a tenant's key where only the operator may look."""
    if key.tenant is not None:
        raise Refusal("permission_denied", "this is for the operator: send the admin key")


def check_kind(api: str, kind: ModelKind, model: str) -> None:
    """Refusal wrong_endpoint_kind when a model of `kind` does not answer `/v1/<api>`."""
    if kind not in KINDS[api]:
        raise Refusal(
            "wrong_endpoint_kind", f"{model} is {_article(kind)} model: it answers {_SERVES[kind]}", param="model"
        )


def _article(kind: ModelKind) -> str:
    return f"an {kind}" if kind is ModelKind.EMBEDDING else f"a {kind}"
