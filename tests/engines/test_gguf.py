"""GGUF headers: read from what tests write and llama.cpp loads; hostile ones refused, never believed."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import gguf
from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import Refusal
from tidegate.engines.inspect import FileInspector

FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.block_count": 3,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.token_type": [1, 1],
}


def make(path: Path, **fields: Any) -> Path:
    kept = {name: value for name, value in (FIELDS | fields).items() if value is not None}
    tensors: dict[str, Any] = {"a.weight": np.ones((8, 16), np.float16), "b.weight": np.ones((4,), np.float32)}
    gguf.write(path, kept, tensors)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(Refusal) as refused:
        FileInspector().inspect(str(path))
    assert refused.value.code == "invalid_configuration"
    assert refused.value.param == "model"
    return refused.value.message


def test_what_a_header_says(tmp_path: Path) -> None:
    found = FileInspector().inspect(str(make(tmp_path / "m.gguf")))
    assert found.kind is ModelKind.GENERATIVE
    assert found.context_tokens_max == 512
    assert found.params == 8 * 16 + 4
    assert found.kv_bytes_per_token == 3 * 2 * (16 + 16) * 2
    assert 8 * 16 * 2 + 4 * 4 <= found.weight_bytes <= 8 * 16 * 2 + 4 * 4 + 64


def test_heads_of_their_own_size_and_by_layer(tmp_path: Path) -> None:
    sizes = {"llama.attention.key_length": 32, "llama.attention.value_length": 8}
    found = FileInspector().inspect(str(make(tmp_path / "m.gguf", **sizes)))
    assert found.kv_bytes_per_token == 3 * 2 * (32 + 8) * 2
    found = FileInspector().inspect(str(make(tmp_path / "n.gguf", **{"llama.attention.head_count_kv": [1, 2, 2]})))
    assert found.kv_bytes_per_token == 3 * 2 * (16 + 16) * 2


def test_a_split_model_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    whole = FileInspector().inspect(str(make(tmp_path / "m.gguf")))
    first = make(tmp_path / "m-00001-of-00002.gguf")
    assert "m-00002-of-00002.gguf is missing" in refusal(first)
    make(tmp_path / "m-00002-of-00002.gguf")
    assert FileInspector().inspect(str(first)).weight_bytes == 2 * whole.weight_bytes


def test_any_change_of_the_weights_changes_the_digest(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf")
    before = FileInspector().inspect(str(path)).digest
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    assert FileInspector().inspect(str(path)).digest != before


@pytest.mark.parametrize("missing", ["llama.context_length", "llama.block_count", "llama.embedding_length"])
def test_what_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    assert missing in refusal(make(tmp_path / "m.gguf", **{missing: None}))


def test_not_there_not_absolute_not_gguf(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "m.gguf")
    with pytest.raises(Refusal, match="absolute"):
        FileInspector().inspect("m.gguf")
    (tmp_path / "p.gguf").write_bytes(b"\x80\x04N.")
    assert "not a GGUF file" in refusal(tmp_path / "p.gguf")


@given(st.data())
def test_a_header_cut_or_overwritten_anywhere_is_refused_or_consistent(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = make(tmp_path_factory.mktemp("gguf") / "m.gguf")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(4, len(content) - 8))
        content[at : at + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    path.write_bytes(content)
    try:
        found = FileInspector().inspect(str(path))
    except Refusal:
        return
    assert 0 <= found.weight_bytes <= len(content)
