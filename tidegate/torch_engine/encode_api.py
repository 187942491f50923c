"""Embeddings, classification and reranking: from a request to a job, and from its vectors to the answer's bytes."""

import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from tidegate.domain.errors import Refusal
from tidegate.torch_engine.encode_loop import EncodeJob
from tidegate.torch_engine.model import Loaded
from tidegate.torch_engine.text import pack_float32
from tidegate.wire import openai
from tidegate.wire.openai import encode, usage

Finish = Callable[[EncodeJob], bytes]


def embedding_job(body: bytes, model: Loaded) -> tuple[EncodeJob, Finish]:
    """Raises Refusal. The second item turns the finished job into the answer."""
    request = openai.parse(openai.EmbeddingRequest, body)
    texts = [t if isinstance(t, list) else model.codec.encode(t) for t in openai.texts(request.input)]
    _check(texts, model, "input")
    base64 = request.encoding_format == "base64"

    def finish(job: EncodeJob) -> bytes:
        data = [
            {"object": "embedding", "index": i, "embedding": pack_float32(v) if base64 else v}
            for i, v in enumerate(job.vectors)
        ]
        return encode({"object": "list", "data": data, "model": request.model, "usage": usage(_tokens(job), 0)})

    return EncodeJob(texts), finish


def classify_job(body: bytes, model: Loaded) -> tuple[EncodeJob, Finish]:
    """Raises Refusal. vLLM's shape: a label and all probabilities for each text."""
    request = openai.parse(openai.ClassifyRequest, body)
    texts = [model.codec.encode(t) for t in ([request.input] if isinstance(request.input, str) else request.input)]
    _check(texts, model, "input")

    def finish(job: EncodeJob) -> bytes:
        data = []
        for i, logits in enumerate(job.vectors):
            each = [_sigmoid(x) for x in logits] if model.multi_label or len(logits) == 1 else _softmax(logits)
            best = max(range(len(each)), key=each.__getitem__)
            label = model.labels[best] if best < len(model.labels) else str(best)
            data.append({"index": i, "label": label, "probs": each, "num_classes": len(each)})
        head = {"id": f"classify-{os.urandom(12).hex()}", "object": "list", "created": int(time.time())}
        return encode({**head, "model": request.model, "data": data, "usage": usage(_tokens(job), 0)})

    return EncodeJob(texts), finish


def rerank_job(body: bytes, model: Loaded) -> tuple[EncodeJob, Finish]:
    """Raises Refusal. A cross-encoder scores pairs; an embedding model scores by cosine."""
    request = openai.parse(openai.RerankRequest, body)
    if model.kind == "classification":
        if len(model.labels) > 1:
            raise Refusal("wrong_endpoint_kind", "rerank needs a classifier with one label or an embedding model")
        pairs = [model.codec.encode_pair(request.query, document) for document in request.documents]
        job = EncodeJob([ids for ids, _ in pairs], [types for _, types in pairs])
    else:
        job = EncodeJob([model.codec.encode(text) for text in (request.query, *request.documents)])
    _check(job.texts, model, "documents")

    def finish(done: EncodeJob) -> bytes:
        if model.kind == "classification":
            scores = [_sigmoid(logits[0]) for logits in done.vectors]
        else:
            scores = [_cosine(done.vectors[0], vector) for vector in done.vectors[1:]]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: request.top_n or len(scores)]
        results: list[dict[str, Any]] = []
        for i in order:
            document = {} if request.return_documents is False else {"document": {"text": request.documents[i]}}
            results.append({"index": i, **document, "relevance_score": scores[i]})
        head = {"id": f"rerank-{os.urandom(12).hex()}", "model": request.model}
        return encode({**head, "usage": usage(_tokens(done), 0), "results": results})

    return job, finish


def _tokens(job: EncodeJob) -> int:
    return sum(map(len, job.texts))


def _check(texts: Sequence[list[int]], model: Loaded, param: str) -> None:
    if not texts:
        raise Refusal("invalid_request", f"{param}: must not be empty", param=param)
    for ids in texts:
        if not ids:
            raise Refusal("invalid_request", f"{param}: a text has no tokens", param=param)
        if len(ids) > model.context_tokens_max:
            raise Refusal(
                "context_length_exceeded",
                f"this model takes {model.context_tokens_max} tokens a text, one has {len(ids)}",
                param=param,
            )
        if any(not 0 <= token < model.vocab for token in ids):
            raise Refusal("invalid_request", f"{param}: a token id is outside the vocabulary", param=param)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    each = [math.exp(x - top) for x in logits]
    total = sum(each)
    return [x / total for x in each]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    return product / ((math.hypot(*a) * math.hypot(*b)) or 1.0)
