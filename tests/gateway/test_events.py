"""Counting on the way through: however a stream is cut, the same bytes leave and the same tokens are counted."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.engine import DONE, event
from tidegate.domain.errors import EngineFault
from tidegate.domain.usage import CountSource
from tidegate.gateway.events import Meter, NumberedEvents

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
