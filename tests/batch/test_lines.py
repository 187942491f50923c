"""Input files line by line: what is wrong and where, in OpenAI's codes; and the order good lines are done in."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.batch import lines
from tidegate.batch.upload import FRAME_BYTES
from tidegate.domain.errors import Refusal

URL = "/v1/chat/completions"


class Frames:
    """A vault file in memory, cut as uploads are."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def frames(self) -> Iterator[bytes]:
        for number in range(-(-len(self._data) // FRAME_BYTES)):
            yield self.frame(number)

    def frame(self, number: int) -> bytes:
        return self._data[number * FRAME_BYTES : (number + 1) * FRAME_BYTES]

    def close(self) -> None:
        """Nothing to close."""


def line(custom_id: str, text: str = "hi", **changes: Any) -> dict[str, Any]:
    body = {"model": "chat", "messages": [{"role": "user", "content": text}]}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body} | changes


def resolve(name: str) -> str:
    if name not in ("chat", "acme/chat", "acme/other"):
        raise Refusal("model_not_found", f"no such model: {name}", param="model")
    return name if "/" in name else f"acme/{name}"


def check(*items: dict[str, Any] | bytes) -> lines.Checked:
    data = b"\n".join(item if isinstance(item, bytes) else json.dumps(item).encode() for item in items)
    return lines.check(Frames(data), URL, 100_000, resolve)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in line("x").items() if key != name}


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{not json", "invalid_json_line", None),
        (b'["an", "array"]', "invalid_json_line", None),
        ("naïve".encode("latin-1"), "invalid_json_line", None),
        (json.dumps(line("x", "caf\xe9"), ensure_ascii=False).encode("latin-1"), "invalid_json_line", None),
        (without("custom_id"), "missing_required_parameter", "custom_id"),
        (without("method"), "missing_required_parameter", "method"),
        (without("url"), "missing_required_parameter", "url"),
        (without("body"), "missing_required_parameter", "body"),
        (line("x", body=None), "missing_required_parameter", "body"),
        (line("x", body="text"), "invalid_type", "body"),
        (line("x", body={}), "missing_required_parameter", "body.model"),
        (line("x", body={"model": "chat", "stream": True}), "unsupported_parameter", "body.stream"),
        (line("x", body={"model": "other/secret"}), "model_not_found", "body.model"),
        (line("x", body={"model": "acme/other"}), "mismatched_model", "body.model"),
        (line("x", method="GET"), "invalid_method", "method"),
        (line("x", url="/v1/embeddings"), "invalid_url", "url"),
        (line("first"), "duplicate_custom_id", "custom_id"),
        (line(""), "invalid_value", "custom_id"),
        (line("x") | {"custom_id": 7}, "invalid_type", "custom_id"),
        (line("x", "long" * 30_000), "request_too_large", None),
    ],
)
def test_a_wrong_line_is_named_with_its_number(bad: dict[str, Any] | bytes, code: str, param: str | None) -> None:
    checked = check(line("first"), b"", bad, line("last"))
    assert [(error.code, error.param, error.line) for error in checked.errors] == [(code, param, 3)]
    assert checked.order == []


def test_an_empty_file_and_one_with_too_many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(error.code, error.line) for error in check(b"\n \n").errors] == [("empty_file", None)]
    monkeypatch.setattr(lines, "LINES_MAX", 2)
    found = check(line("a"), line("b"), line("c"), line("d")).errors
    assert [(error.code, error.line) for error in found] == [("too_many_requests", 3)]


def test_errors_are_bounded() -> None:
    assert len(check(*[b"nonsense"] * 500).errors) == lines.ERRORS_MAX


def test_lines_that_begin_alike_are_done_together_and_long_ones_first() -> None:
    shared = "You are a patient assistant. " * 40
    items = [
        line("single-short", "a"),
        line("shared-1", shared + "x"),
        line("single-long", "b" * 900),
        line("shared-2", shared + "y" * 50),
        line("single-middle", "c" * 200),
    ]
    checked = check(*items)
    order = [items[each.number - 1]["custom_id"] for each in checked.order]
    assert order == ["shared-2", "shared-1", "single-long", "single-middle", "single-short"]
    assert checked.model == "acme/chat"


@given(st.lists(st.integers(0, 3 * FRAME_BYTES // 2), min_size=1, max_size=8), st.booleans())
def test_every_line_is_read_back_wherever_frames_cut_it(sizes: list[int], newline: bool) -> None:
    items = [line(f"id-{number}", "z" * size) for number, size in enumerate(sizes)]
    data = b"\n".join(json.dumps(item).encode() for item in items) + (b"\r\n" if newline else b"")
    reader = Frames(data)
    checked = lines.check(reader, URL, 1 << 20, resolve)
    assert checked.errors == []
    assert sorted(each.number for each in checked.order) == list(range(1, len(items) + 1))
    for each in checked.order:
        read = lines.read(reader, each)
        assert read.custom_id == f"id-{each.number - 1}"
        assert json.loads(bytes(read.body)) == items[each.number - 1]["body"]
