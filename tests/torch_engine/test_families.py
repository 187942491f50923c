"""Other decoder families: token for token like `model.generate`, or refused with a reason; never served wrongly."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests import models
from tests.torch_engine.generation import Bench, Reference, prompt
from tidegate.torch_engine.faults import ModelFault

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256, "bos_token_id": None}
WINDOW = {"sliding_window": 16}


def make(folder: Path, config: str, model: str, fields: dict[str, Any]) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.llama() / name, folder)
    torch.manual_seed(0)
    getattr(transformers, model)(getattr(transformers, config)(**fields)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "model", "fields"),
    [
        ("MistralConfig", "MistralForCausalLM", SHAPE | WINDOW),
        ("Qwen2Config", "Qwen2ForCausalLM", SHAPE | WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
        ("Qwen3Config", "Qwen3ForCausalLM", SHAPE | {"head_dim": 32}),
        ("Gemma3TextConfig", "Gemma3ForCausalLM", SHAPE | WINDOW | {"head_dim": 32}),
        ("Phi3Config", "Phi3ForCausalLM", SHAPE),
        ("GPT2Config", "GPT2LMHeadModel", GPT2 | {"eos_token_id": 2}),
    ],
)
def test_served_like_generate(tmp_path: Path, config: str, model: str, fields: dict[str, Any]) -> None:
    folder = make(tmp_path, config, model, fields)
    reference, bench = Reference(folder), Bench(folder, prefill_tokens_max=16)
    asked = [(prompt(5, 1), 20), (prompt(60, 2), 12), (prompt(23, 3), 9)]  # longer than a window of 16
    jobs = []
    for ids, tokens in asked:
        jobs.append(bench.add(ids, max_tokens=tokens))
        bench.loop.step()
        bench.loop.step()
    bench.run()
    assert [bench.tokens(job) for job in jobs] == [reference.greedy(ids, tokens) for ids, tokens in asked]


@pytest.mark.parametrize(
    ("config", "model", "fields", "reason"),
    [
        ("Gemma2Config", "Gemma2ForCausalLM", SHAPE | {"head_dim": 32}, "soft-capping"),
        ("MixtralConfig", "MixtralForCausalLM", SHAPE | {"num_local_experts": 2}, "missing"),
    ],
)
def test_refused_by_name(tmp_path: Path, config: str, model: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelFault, match=reason):
        Bench(make(tmp_path, config, model, fields))
