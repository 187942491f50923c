"""Embeddings, classification and reranking against transformers' own answers."""

import base64
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests import models
from tests.torch_engine.serving import Serving

TEXTS = ["the water", "come and see", "a man made it long ago, many years", "x"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_equal_the_reference(tmp_path: Path, pooling: str) -> None:
    model = models.bert_embedding(pooling=pooling, normalize=pooling != "max")
    tokenizer, reference = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    with Serving(model, tmp_path) as engine, torch.inference_mode():
        answer = engine.http.post("/v1/embeddings", json={"model": "m", "input": TEXTS})
        body = answer.json()
        for text, item in zip(TEXTS, body["data"], strict=True):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = reference(input_ids=ids).last_hidden_state[0]
            wanted = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[pooling]
            if pooling != "max":
                wanted = wanted / wanted.norm()
            assert torch.allclose(torch.tensor(item["embedding"]), wanted, atol=1e-5)
        tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
        assert body["usage"]["prompt_tokens"] == tokens == int(answer.headers["x-tidegate-prompt-tokens"])
        assert engine.state()["prompt_tokens_total"] == tokens


def test_base64_sleep_and_refusals(tmp_path: Path) -> None:
    with Serving(models.bert_embedding(), tmp_path) as engine:
        floats = engine.http.post("/v1/embeddings", json={"model": "m", "input": "the water"}).json()
        packed = engine.http.post(
            "/v1/embeddings", json={"model": "m", "input": "the water", "encoding_format": "base64"}
        ).json()
        raw = base64.b64decode(packed["data"][0]["embedding"])
        assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(floats["data"][0]["embedding"], abs=1e-7)
        canary = engine.control("canary")
        engine.control("sleep")
        engine.refused("/v1/embeddings", 503, "asleep", input="a")
        engine.control("wake")
        assert engine.control("canary") == canary
        engine.refused("/v1/embeddings", 400, "context_length_exceeded", input="the " * 100)
        engine.refused("/v1/embeddings", 400, "unsupported_parameter", input="a", dimensions=3)
        engine.refused("/v1/chat/completions", 400, "wrong_endpoint_kind", messages=[{"role": "user", "content": "a"}])
        ranked = engine.http.post("/v1/rerank", json={"model": "m", "query": "the water", "documents": TEXTS}).json()
        assert ranked["results"][0]["index"] == 0
        assert ranked["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-5)


def test_classification_equals_the_reference(tmp_path: Path) -> None:
    model = models.bert_classifier(labels=3)
    tokenizer, reference = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForSequenceClassification.from_pretrained(model).eval(),
    )
    with Serving(model, tmp_path) as engine, torch.inference_mode():
        data = engine.http.post("/v1/classify", json={"model": "m", "input": TEXTS}).json()["data"]
        for text, item in zip(TEXTS, data, strict=True):
            wanted = reference(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].softmax(-1)
            assert item["probs"] == pytest.approx(wanted.tolist(), abs=1e-5)
            assert item["label"] == f"label_{int(wanted.argmax())}"
            assert item["num_classes"] == 3
        engine.refused("/v1/rerank", 400, "wrong_endpoint_kind", query="a", documents=["b"])


def test_cross_encoder_reranks_pairs(tmp_path: Path) -> None:
    model = models.bert_classifier(labels=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForSequenceClassification.from_pretrained(model).eval()
    with Serving(model, tmp_path) as engine, torch.inference_mode():
        body = {"model": "m", "query": "who knows", "documents": TEXTS, "top_n": 2, "return_documents": False}
        results = engine.http.post("/v1/rerank", json=body).json()["results"]
        core = tokenizer.backend_tokenizer
        scores = []
        for text in TEXTS:
            pair = core.encode("who knows", text)
            out = reference(input_ids=torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids]))
            scores.append(float(out.logits[0, 0].sigmoid()))
        best = sorted(range(len(TEXTS)), key=lambda i: -scores[i])[:2]
        assert [r["index"] for r in results] == best
        assert [r["relevance_score"] for r in results] == pytest.approx([scores[i] for i in best], abs=1e-5)
