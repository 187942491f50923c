"""vLLM's ``/v1/score`` as a rerank and back. Pure. One text against one or several; pairs of lists are refused."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from tidegate.domain.errors import Refusal
from tidegate.wire import openai
from tidegate.wire.openai import INPUTS_MAX, Usage

Texts = str | Annotated[list[str], Meta(min_length=1, max_length=INPUTS_MAX)]


class ScoreRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/score` (vLLM)."""

    model: Annotated[str, Meta(min_length=1, max_length=512)]
    text_1: Texts
    text_2: Texts
    user: str | None = None


class _Ranked(Struct):
    index: int
    relevance_score: float


class _Rerank(Struct):
    results: list[_Ranked]
    usage: Usage | None = None


_decode = msgspec.json.Decoder(_Rerank).decode


class Score:
    """One request and its answer."""

    def __init__(self, request_id: str, created_s: int = 0) -> None:
        self._id = "score-" + request_id.removeprefix("req-")
        self._created_s = created_s
        self._model = ""

    def request(self, body: bytes) -> bytes:
        """The rerank request. Refusal where `text_1` is more than one text."""
        asked = openai.parse(ScoreRequest, body)
        first = [asked.text_1] if isinstance(asked.text_1, str) else asked.text_1
        second = [asked.text_2] if isinstance(asked.text_2, str) else asked.text_2
        if len(first) > 1:
            message = "`text_1`: one text; lists of pairs are not supported, send a request for each"
            raise Refusal("invalid_request", message, param="text_1")
        self._model = asked.model
        rerank: dict[str, Any] = {"model": asked.model, "query": first[0], "documents": second}
        return msgspec.json.encode(rerank | {"return_documents": False})

    def answer(self, body: bytes) -> bytes:
        """Scores in the order of the texts."""
        rerank = _decode(body)
        data = [
            {"index": ranked.index, "object": "score", "score": ranked.relevance_score}
            for ranked in sorted(rerank.results, key=lambda ranked: ranked.index)
        ]
        head = {"id": self._id, "object": "list", "created": self._created_s, "model": self._model}
        return msgspec.json.encode(head | {"data": data, "usage": rerank.usage})

    def error(self, status: int, body: bytes) -> bytes:
        """It is OpenAI's own shape already."""
        return body

    def event(self, data: bytes) -> bytes:
        raise AssertionError("a rerank is never streamed")

    def done(self) -> bytes:
        raise AssertionError("a rerank is never streamed")

    def ping(self) -> bytes:
        raise AssertionError("a rerank is never streamed")
