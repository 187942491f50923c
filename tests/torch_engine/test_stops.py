"""Stop strings are found wherever a stream was cut, and no piece of one gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.torch_engine.stops import StopMatcher

letters = st.text(alphabet="abc", max_size=24)


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        if stopped:
            return out, True
    return out + matcher.flush(), False


@given(letters, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_same_as_on_the_whole_text(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out, stopped = run(stops, pieces)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(out)
    if stopped:
        assert not any(stop in out for stop in stops)
        assert any(text[len(out) :].startswith(stop) for stop in stops)
    else:
        assert out == text


@pytest.mark.parametrize(
    ("stops", "pieces", "sent"),
    [
        (["\n\nUser:"], ["hello\n", "\nUs", "er: more"], "hello"),
        (["END"], ["EN", "E", "ND"], "ENE"[:2]),
        (["aab"], ["a", "a", "a", "b"], "a"),
        (["x"], ["abc"], "abc"),
    ],
)
def test_examples(stops: list[str], pieces: list[str], sent: str) -> None:
    assert run(stops, pieces)[0] == sent


def test_text_that_cannot_begin_a_stop_is_sent_at_once() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.push("abc") == ("abc", False)
    assert matcher.push("xST") == ("x", False)
    assert matcher.push("ART") == ("START", False)
