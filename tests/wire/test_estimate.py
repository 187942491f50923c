"""Bounds read off a body: never below what a tokenizer could make of it."""

import json

import pytest

from tidegate.wire.estimate import TEMPLATE_TOKENS_MAX, bounds
from tidegate.wire.openai import parse_head


def _bounds(api: str, **body: object) -> tuple[int, int | None, int]:
    data = json.dumps({"model": "m", **body}).encode()
    found = bounds(api, parse_head(data), data, 2_048)
    return found.input_tokens - len(data), found.output_tokens, found.answers


@pytest.mark.parametrize(
    ("api", "body", "expected"),
    [
        ("chat/completions", {"messages": []}, (TEMPLATE_TOKENS_MAX, None, 1)),
        ("chat/completions", {"max_tokens": 9, "n": 3}, (TEMPLATE_TOKENS_MAX, 9, 3)),
        ("chat/completions", {"max_tokens": 9, "max_completion_tokens": 5}, (TEMPLATE_TOKENS_MAX, 5, 1)),
        ("chat/completions", {"max_tokens": 10**9}, (TEMPLATE_TOKENS_MAX, 2_048, 1)),
        ("completions", {"prompt": "a", "max_tokens": 2}, (TEMPLATE_TOKENS_MAX, 2, 1)),
        ("completions", {"prompt": [1, 2, 3], "max_tokens": 2}, (TEMPLATE_TOKENS_MAX, 2, 1)),
        ("completions", {"prompt": ["a", "b"], "max_tokens": 2, "n": 2}, (2 * TEMPLATE_TOKENS_MAX, 2, 4)),
        ("completions", {"prompt": [[1], [2], [3]]}, (3 * TEMPLATE_TOKENS_MAX, None, 3)),
        ("rerank", {"query": "héllo", "documents": ["a", "b"]}, (2 * (6 + 8), 0, 0)),
        ("rerank", {"query": 7}, (8, 0, 0)),
    ],
)
def test_bounds(api: str, body: dict[str, object], expected: tuple[int, int | None, int]) -> None:
    assert _bounds(api, **body) == expected


def test_a_long_prompt_is_bounded_by_the_context() -> None:
    data = json.dumps({"model": "m", "messages": "x" * 9_000}).encode()
    assert bounds("chat/completions", parse_head(data), data, 2_048).input_tokens == 2_048


def test_each_text_of_an_embedding_may_have_special_tokens() -> None:
    more, output, answers = _bounds("embeddings", input=["a"] * 100)
    assert (more > 2 * 100, output, answers) == (True, 0, 0)
