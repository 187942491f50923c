"""Upper bounds on what a request can come to, read off its body. Pure. Only asked for where a limit counts tokens.

A token is at least one byte of the body, and what a chat template or a tokenizer adds around a prompt is bounded by an
allowance: so the bounds hold for any tokenizer that does not make several tokens of one byte. Never used for a bill.
"""

from typing import Any

import msgspec
from msgspec import Struct

from tidegate.wire.openai import RequestHead

TEMPLATE_TOKENS_MAX = 256  # a template's own words and special tokens, for one prompt
TEXT_TOKENS_MAX = 8  # special tokens around one text of an embedding, a pair of a rerank

_READING = frozenset({"embeddings", "classify", "score"})  # nothing is generated


class Bounds(Struct, frozen=True):
    """`output_tokens` is None where the client left it open; `answers` is how many outputs of that length may come."""

    input_tokens: int
    output_tokens: int | None
    answers: int


class _Prompts(Struct):
    prompt: Any = None


class _Rerank(Struct):
    query: str = ""
    documents: list[Any] = []


_prompts = msgspec.json.Decoder(_Prompts)
_reranks = msgspec.json.Decoder(_Rerank)


def bounds(api: str, head: RequestHead, body: bytes, context_tokens_max: int) -> Bounds:
    """For `/v1/<api>`, of a model with that context. A malformed body is the engine's to refuse: it bounds as one."""
    size = len(body)
    if api == "rerank":
        query, documents = _rerank(body)
        return Bounds(size + documents * (query + TEXT_TOKENS_MAX), 0, 0)
    if api in _READING:
        return Bounds(size + TEXT_TOKENS_MAX * (1 + size // 3), 0, 0)
    prompts = _prompt_count(body) if api == "completions" else 1
    given = head.max_completion_tokens or head.max_tokens
    output = None if given is None else min(max(given, 0), context_tokens_max)
    most = min(size + TEMPLATE_TOKENS_MAX * prompts, context_tokens_max * prompts)
    return Bounds(most, output, prompts * max(1, head.n or 1))


def _prompt_count(body: bytes) -> int:
    try:
        prompt = _prompts.decode(body).prompt
    except msgspec.DecodeError:
        return 1
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


def _rerank(body: bytes) -> tuple[int, int]:
    """Bytes of the query, and how many documents it is read with."""
    try:
        asked = _reranks.decode(body)
    except msgspec.DecodeError:
        return 0, 1
    return len(asked.query.encode()), len(asked.documents)
