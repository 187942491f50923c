"""From the `model` of a request to an endpoint its tenant may call."""

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from tidegate.domain.errors import Refusal

MODEL_CHARS_SHOWN = 200


class EndpointFacts(Protocol):
    @property
    def endpoint(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    @property
    def shared(self) -> bool: ...


Endpoint = TypeVar("Endpoint", bound=EndpointFacts)


def resolve(endpoints: Mapping[str, Endpoint], tenant: str, model: str) -> Endpoint:
    """`tenant/name`, or `name` inside its own tenant. Another tenant's endpoint is refused in exactly the words that an
    unknown one is, so that nobody can find out what others have. Refusal model_not_found.
    """
    found = endpoints.get(model if "/" in model else f"{tenant}/{model}")
    if found is None or not may_call(found, tenant):
        raise Refusal("model_not_found", f"no such model: {model[:MODEL_CHARS_SHOWN]}", param="model")
    return found


def to_canary(permille: int, request: str) -> bool:
    """Whether this request is of the share that a canary gets. Request ids are random, so their digits decide."""
    return int(request[-6:], 16) % 1_000 < permille


def may_call(endpoint: EndpointFacts, tenant: str | None) -> bool:
    """None is an administrator, who sees every endpoint."""
    return tenant is None or endpoint.shared or endpoint.tenant == tenant


def visible(endpoints: Iterable[Endpoint], tenant: str | None) -> list[Endpoint]:
    """What `GET /v1/models` lists, by name."""
    return sorted((e for e in endpoints if may_call(e, tenant)), key=lambda e: e.endpoint)
