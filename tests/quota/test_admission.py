"""Keys, kinds and names: who may call what, and that refusals tell nothing about others."""

import pytest

from tidegate.domain.endpoint import Mode, ModelKind
from tidegate.domain.errors import Refusal
from tidegate.quota import admission, routing
from tidegate.wire.internal import EndpointEntry, KeyEntry


def entry(name: str, shared: bool = False) -> EndpointEntry:
    return EndpointEntry(name, name.split("/")[0], "m", ModelKind.GENERATIVE, Mode.DEDICATED, 1, 9, 1, shared=shared)


ENDPOINTS = {e.endpoint: e for e in (entry("acme/a"), entry("acme/b"), entry("other/a"), entry("house/x", shared=True))}


@pytest.mark.parametrize(
    ("key", "code"),
    [
        (None, "invalid_api_key"),
        (KeyEntry("d", "k", "acme", revoked=True), "revoked_api_key"),
        (KeyEntry("d", "k", "acme", expires_ms=1_000), "expired_api_key"),
        (KeyEntry("d", "k", "acme", expires_ms=999, revoked=True), "revoked_api_key"),
    ],
)
def test_bad_keys(key: KeyEntry | None, code: str) -> None:
    with pytest.raises(Refusal) as refused:
        admission.check_key(key, 1_000)
    assert (refused.value.code, refused.value.status) == (code, 401)


def test_a_key_is_good_until_the_instant_it_expires() -> None:
    key = KeyEntry("d", "k", "acme", expires_ms=1_001)
    assert admission.check_key(key, 1_000) is key
    assert admission.tenant_of(key) == "acme"
    with pytest.raises(Refusal) as refused:
        admission.tenant_of(KeyEntry("d", "k", None))
    assert refused.value.code == "permission_denied"


@pytest.mark.parametrize(
    ("model", "endpoint"), [("acme/a", "acme/a"), ("a", "acme/a"), ("house/x", "house/x"), ("b", "acme/b")]
)
def test_names_resolve(model: str, endpoint: str) -> None:
    assert routing.resolve(ENDPOINTS, "acme", model).endpoint == endpoint


def test_a_foreign_endpoint_is_refused_in_the_words_of_an_unknown_one() -> None:
    words = []
    for model in ("other/a", "other/z"):
        with pytest.raises(Refusal) as refused:
            routing.resolve(ENDPOINTS, "acme", model)
        assert (refused.value.code, refused.value.status, refused.value.param) == ("model_not_found", 404, "model")
        words.append(refused.value.message.replace(model, "*"))
    assert words[0] == words[1]


@pytest.mark.parametrize("model", ["x", "acme/", "/a", "a/acme", "ACME/a", "acme/a ", "z" * 500])
def test_names_that_do_not_exist(model: str) -> None:
    with pytest.raises(Refusal) as refused:
        routing.resolve(ENDPOINTS, "acme", model)
    assert len(refused.value.message) < 300


def test_visible() -> None:
    def names(tenant: str | None) -> list[str]:
        return [e.endpoint for e in routing.visible(ENDPOINTS.values(), tenant)]

    assert names("acme") == ["acme/a", "acme/b", "house/x"]
    assert names("other") == ["house/x", "other/a"]
    assert names(None) == sorted(ENDPOINTS)


@pytest.mark.parametrize("api", sorted(admission.KINDS))
@pytest.mark.parametrize("kind", list(ModelKind))
def test_every_api_answers_its_kinds_only(api: str, kind: ModelKind) -> None:
    if kind in admission.KINDS[api]:
        admission.check_kind(api, kind, "m")
        return
    with pytest.raises(Refusal) as refused:
        admission.check_kind(api, kind, "acme/a")
    assert (refused.value.code, refused.value.param) == ("wrong_endpoint_kind", "model")
    assert any(other in refused.value.message for other, kinds in admission.KINDS.items() if kind in kinds)
