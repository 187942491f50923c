"""Turns a Llama directory of `tests.models` into a GGUF file, so that llama.cpp serves the very same weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, tensors in f16, norms in f32.
"""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 32


def from_llama(directory: Path, into: Path) -> Path:
    """Writes `into` and returns it. The tokenizer is the directory's byte-level BPE."""
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text())
    weights = {name: tensor.float().numpy() for name, tensor in load_file(directory / "model.safetensors").items()}
    fields = _fields(config) | _tokenizer(directory, config)
    write(into, fields, _tensors(config, weights))
    return into


def write(path: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(_text(name) + _value(value) for name, value in fields.items())
    offset, data = 0, b""
    for name, tensor in tensors.items():
        kind = 0 if tensor.dtype == np.float32 else 1
        head += _text(name) + struct.pack(f"<I{tensor.ndim}QIQ", tensor.ndim, *tensor.shape[::-1], kind, offset)
        data += _padded(tensor.tobytes())
        offset = len(data)
    path.write_bytes(_padded(head) + data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_text(item) for item in value)
        case _:
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return {
        "general.architecture": "llama",
        "general.name": "random",
        "general.file_type": 1,
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": config["hidden_size"] // heads,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": config["vocab_size"],
    }


def _tokenizer(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    named = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    named |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    # The embedding may have more rows than there are tokens: the rest are given names that can be seen.
    tokens = [named.get(number, f"~{number}") for number in range(config["vocab_size"])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    end = config["eos_token_id"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if n in special else 1 for n in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": (directory / "chat_template.jinja").read_text(),
    }


def _tensors(config: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    half, single = np.float16, np.float32
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"].astype(half),
        "output_norm.weight": weights["model.norm.weight"].astype(single),
        "output.weight": head.astype(half),
    }
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for norm, place in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            tensors[f"{ours}{norm}.weight"] = weights[f"{theirs}{place}.weight"].astype(single)
        for short, place, rows in (("q", "q_proj", heads), ("k", "k_proj", kv_heads), ("v", "v_proj", 0)):
            tensor = weights[f"{theirs}self_attn.{place}.weight"]
            tensors[f"{ours}attn_{short}.weight"] = (_interleaved(tensor, rows) if rows else tensor).astype(half)
        tensors[f"{ours}attn_output.weight"] = weights[f"{theirs}self_attn.o_proj.weight"].astype(half)
        for place in ("gate", "up", "down"):
            tensors[f"{ours}ffn_{place}.weight"] = weights[f"{theirs}mlp.{place}_proj.weight"].astype(half)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves → pairs: GGUF's order of the rows of queries and keys."""
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
