"""Counting on the way through: however a stream is cut, the same bytes leave and the same tokens are counted."""

import itertools
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.engine import DONE, event
from tidegate.domain.errors import EngineFault
from tidegate.domain.usage import CountSource
from tidegate.gateway.events import Meter, NumberedEvents, UsageEvents, ask_for_usage, usage_of

TEXT = st.text(max_size=30) | st.sampled_from(["\nid: 99\n", "data: [DONE]\n\n", "id: 7", '"usage":{}'])


def feed(meter: Meter, stream: bytes, cuts: list[int]) -> bytes:
    places = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    out = b""
    for start, end in itertools.pairwise(places):
        events = meter.pass_on(stream[start:end])
        assert events == b"" or events.endswith(b"\n\n"), "whole events only"
        meter.sent(events)
        out += events
    return out


@given(st.lists(TEXT, max_size=8), st.lists(st.integers(0, 10_000), max_size=30))
def test_numbered_events_survive_any_segmentation(texts: list[str], cuts: list[int]) -> None:
    events = b"".join(event(3 * number, text) for number, text in enumerate(texts, 1))
    meter = NumberedEvents(5, 1, 1 << 20)
    assert feed(meter, events + DONE, cuts) == events
    assert meter.done
    tokens = meter.tokens()
    assert (tokens.input, tokens.cached, tokens.output) == (5, 1, 3 * len(texts))
    assert tokens.source is (CountSource.DELIVERED_EVENT if texts else CountSource.NONE)


@given(st.lists(TEXT, min_size=1, max_size=8), st.lists(st.integers(0, 10_000), max_size=20), st.data())
def test_a_stream_cut_off_anywhere_counts_the_whole_events_that_were_sent(
    texts: list[str], cuts: list[int], data: st.DataObject
) -> None:
    stream = b"".join(event(number, text) for number, text in enumerate(texts, 1))
    end = data.draw(st.integers(0, len(stream)))
    meter = NumberedEvents(0, 0, 1 << 20)
    out = feed(meter, stream[:end], cuts)
    assert meter.tokens().output == out.count(b"\n\n")
    assert not meter.done


def test_what_was_not_sent_is_not_counted() -> None:
    meter = NumberedEvents(0, 0, 1 << 20)
    meter.sent(meter.pass_on(event(1, "a")))
    meter.pass_on(event(2, "b"))
    assert meter.tokens().output == 1


def test_an_event_over_the_bound() -> None:
    meter = NumberedEvents(0, 0, 100)
    assert meter.pass_on(event(1, "") + b"x" * 500) == event(1, "")
    with pytest.raises(EngineFault):
        meter.pass_on(b"x")


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
def test_asking_for_usage_changes_nothing_else(options: str) -> None:
    body = ('{"model":"m","big":1.0000000000000000001,"messages":[ 1 ]' + options + "}").encode()
    asked = ask_for_usage(body)
    assert b'"big":1.0000000000000000001,"messages":[ 1 ]' in asked
    assert msgspec.json.decode(asked)["stream_options"]["include_usage"] is True


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
