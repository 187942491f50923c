"""Counting the streams of foreign engines: exact wherever they are cut, and nothing shown that was not asked for."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.engine import DONE
from tests.gateway.rig import endpoint
from tests.gateway.test_events import TEXT, feed
from tidegate.domain.errors import EngineFault
from tidegate.domain.usage import CountSource
from tidegate.gateway.events import Tokens
from tidegate.gateway.intake import Call
from tidegate.gateway.metering import CountedEvents, UsageEvents, for_engine, usage_of
from tidegate.wire.internal import RemoteTarget

BYTES_MAX = 1 << 20


def call(body: bytes = b"{}", *, stream: bool = True, tenant: str = "acme", **entry: Any) -> Call:
    return Call("r", "chat/completions", "k", tenant, endpoint(**entry), body, stream, False, 0, 0)


def _chunk(**more: object) -> bytes:
    return (
        b"data: "
        + json.dumps({"choices": [{"delta": {"content": "x"}}], **more}, separators=(",", ":")).encode()
        + b"\n\n"
    )


USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


@pytest.mark.parametrize("show", [False, True])
@given(cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_usage_events_are_counted_and_shown_only_to_who_asked(show: bool, cuts: list[int]) -> None:
    plain = _chunk() + _chunk(usage=None) + _chunk(note='"usage":')
    last = _chunk(choices=[], usage=USAGE)
    meter = UsageEvents(show, 1 << 20)
    assert feed(meter, plain + last + DONE, cuts) == (plain + last if show else plain)
    tokens = meter.tokens()
    assert (tokens.input, tokens.cached, tokens.output) == (9, 4, 2)
    assert tokens.source is CountSource.ENGINE_USAGE


@pytest.mark.parametrize("options", ["", ',"stream_options":null', ',"stream_options":{"include_usage":false,"x":1}'])
@pytest.mark.parametrize("metering", ["usage_event", "usage_continuous", "timings"])
def test_asking_for_usage_changes_nothing_else(options: str, metering: str) -> None:
    body = ('{"model":"m","big":1.0000000000000000001,"messages":[ 1 ]' + options + "}").encode()
    asked = for_engine(call(body, metering=metering))
    assert b'"big":1.0000000000000000001,"messages":[ 1 ]' in asked
    request = msgspec.json.decode(asked)
    assert request["stream_options"]["include_usage"] is True
    assert request["stream_options"].get("continuous_usage_stats") is (True if metering == "usage_continuous" else None)
    assert request.get("timings_per_token") is (True if metering == "timings" else None)
    assert request["model"] == "acme/chat"
    assert "cache_salt" not in request


def test_a_unary_request_is_not_asked_to_count() -> None:
    assert json.loads(for_engine(call(b'{"model":"m"}', stream=False, metering="usage_continuous"))) == {
        "model": "acme/chat"
    }


def test_a_remote_model_has_its_own_name() -> None:
    remote = RemoteTarget("p", "https://h/v1", "their/model")
    assert json.loads(for_engine(call(b'{"model":"m"}', stream=False, remote=remote, metering="usage_event"))) == {
        "model": "their/model"
    }


def test_cached_prefixes_are_salted_by_tenant_whatever_the_client_sends() -> None:
    """Two tenants never share a salt, even if one sends the other's; one tenant's own salts stay apart."""

    def salt(tenant: str, body: bytes) -> str:
        return str(
            json.loads(for_engine(call(body, tenant=tenant, cache_salt=True, metering="usage_event")))["cache_salt"]
        )

    acme = salt("acme", b"{}")
    assert salt("acme", b'{"x":1}') == acme
    assert salt("other", b"{}") != acme
    assert salt("other", json.dumps({"cache_salt": acme}).encode()) != acme
    assert salt("acme", b'{"cache_salt":"a"}') not in (acme, salt("acme", b'{"cache_salt":"b"}'))


def vllm_event(number: int, text: str, **usage: object) -> bytes:
    """As vLLM writes one with ``continuous_usage_stats``: compact, usage last."""
    data = {"id": "c", "choices": [{"index": 0, "delta": {"content": text}}]}
    data["usage"] = {"prompt_tokens": 5, "total_tokens": 5 + number, "completion_tokens": number, **usage}  # type: ignore[assignment]
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def llama_event(number: int, text: str) -> bytes:
    """As llama.cpp writes one with ``timings_per_token``."""
    data = {"choices": [{"index": 0, "delta": {"content": text}}], "id": "c"}
    data["timings"] = {"cache_n": 2, "prompt_n": 3, "prompt_ms": 1.5, "predicted_n": number, "predicted_ms": 0.25}  # type: ignore[assignment]
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def plain(event: bytes) -> bytes:
    data = json.loads(event[6:])
    data.pop("usage", None)
    data.pop("timings", None)
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


HOSTILE = TEXT | st.sampled_from([',"usage":{"completion_tokens":99}', ',"timings":{"predicted_n":99}', '"choices":[]'])


@pytest.mark.parametrize("field", ["usage_continuous", "timings"])
@given(st.lists(HOSTILE, min_size=1, max_size=8), st.lists(st.integers(0, 10_000), max_size=20), st.data())
def test_a_stream_cut_off_anywhere_is_counted_to_the_last_event_sent(
    field: str, texts: list[str], cuts: list[int], data: st.DataObject
) -> None:
    make = vllm_event if field == "usage_continuous" else llama_event
    events = [make(3 * number, text) for number, text in enumerate(texts, 1)]
    stream = b"".join(events)
    end = data.draw(st.integers(0, len(stream)))
    meter = CountedEvents(field, False, True, BYTES_MAX)
    out = feed(meter, stream[:end], cuts)
    whole = out.count(b"\n\n")
    assert out == b"".join(plain(event) for event in events[:whole]), "nothing but the counts is cut out"
    tokens = meter.tokens()
    assert (tokens.input, tokens.output) == ((5, 3 * whole) if whole else (0, 0))
    assert tokens.source is (CountSource.DELIVERED_EVENT if whole else CountSource.NONE)


def test_what_a_foreign_engine_said_and_nobody_was_sent_is_not_counted() -> None:
    meter = CountedEvents("usage_continuous", False, True, BYTES_MAX)
    meter.sent(meter.pass_on(vllm_event(1, "a")))
    meter.pass_on(vllm_event(2, "b"))
    assert meter.tokens().output == 1


@pytest.mark.parametrize("show", [False, True])
@pytest.mark.parametrize("hide", [False, True])
@given(cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_the_final_usage_counts_and_only_who_asked_sees_it(show: bool, hide: bool, cuts: list[int]) -> None:
    events = [vllm_event(1, "a"), vllm_event(2, '"choices":[]')]
    last = _chunk(choices=[], usage=USAGE)
    meter = CountedEvents("usage_continuous", show, hide, BYTES_MAX)
    out = feed(meter, b"".join(events) + last + DONE, cuts)
    assert out == b"".join(plain(e) if hide else e for e in events) + (last if show else b"")
    tokens = meter.tokens()
    assert (tokens.input, tokens.cached, tokens.output) == (9, 4, 2)
    assert tokens.source is CountSource.ENGINE_USAGE


def test_where_usage_comes_only_at_the_end_the_pieces_delivered_are_counted() -> None:
    """Never more than was sent: events without text are no tokens, and the prompt stays unbilled."""
    meter = UsageEvents(False, BYTES_MAX)
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    meter.sent(meter.pass_on(role + _chunk() + _chunk()))
    meter.pass_on(_chunk())
    assert meter.tokens() == Tokens(output=2, source=CountSource.DELIVERED_PIECES)


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        (b"{}", (0, 0, 0)),
        (b'{"usage":null}', (0, 0, 0)),
        (json.dumps({"usage": USAGE}).encode(), (9, 4, 2)),
        (b'{"usage":{"prompt_tokens":3,"total_tokens":3}}', (3, 0, 0)),
    ],
)
def test_usage_of_an_answer(answer: bytes, tokens: tuple[int, int, int]) -> None:
    found = usage_of(answer)
    assert (found.input, found.cached, found.output) == tokens


@pytest.mark.parametrize("answer", [b"", b"hello", b"\xff", b'{"usage":{"prompt_tokens":"x"}}', b"[" * 100_000])
def test_answers_that_are_none(answer: bytes) -> None:
    with pytest.raises(EngineFault):
        usage_of(answer)
