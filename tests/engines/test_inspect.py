"""Model directories as they come, right and wrong: read without torch, refused with the field and the reason."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.domain.endpoint import ModelKind
from tidegate.domain.errors import Refusal
from tidegate.engines.inspect import FileInspector, read_header

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}
inspect = FileInspector().inspect


def write_safetensors(path: Path, shapes: dict[str, list[int]], *, fill: int = 0, element_bytes: int = 2) -> None:
    """The format by hand: 8 bytes of header length, JSON header, tensor bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = element_bytes
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes([fill]) * at)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", {"a": [10, 64], "b": [64]})
    return folder


def test_reads_everything_off_the_files(model: Path) -> None:
    profile = inspect(str(model))
    assert profile.kind is ModelKind.GENERATIVE
    assert profile.weight_bytes == (10 * 64 + 64) * 2
    assert profile.params == 10 * 64 + 64
    assert profile.kv_bytes_per_token == 2 * 3 * 2 * 16 * 2
    assert profile.context_tokens_max == 128
    assert profile.source == str(model)
    assert inspect(f"file://{model}").digest == profile.digest


def test_sharded_weights_are_summed(model: Path) -> None:
    (model / "model.safetensors").unlink()
    for n in (1, 2):
        write_safetensors(model / f"model-{n}.safetensors", {f"t{n}": [100]})
    index = {"weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect(str(model)).weight_bytes == 400
    (model / "model-2.safetensors").unlink()
    with pytest.raises(Refusal, match=r"model-2\.safetensors is named .* but missing"):
        inspect(str(model))


@pytest.mark.parametrize(
    ("architecture", "files", "kind"),
    [
        ("BertForSequenceClassification", (), ModelKind.CLASSIFICATION),
        ("BertModel", (), ModelKind.EMBEDDING),
        ("BertModel", ("modules.json",), ModelKind.EMBEDDING),
        ("BertForMaskedLM", (), ModelKind.EMBEDDING),
        ("Qwen2ForCausalLM", (), ModelKind.GENERATIVE),
        ("GPT2LMHeadModel", (), ModelKind.GENERATIVE),
    ],
)
def test_kinds(model: Path, architecture: str, files: tuple[str, ...], kind: ModelKind) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | {"architectures": [architecture]}))
    for name in files:
        (model / name).write_text("[]")
    profile = inspect(str(model))
    assert profile.kind is kind
    assert (profile.kv_bytes_per_token > 0) == (kind is ModelKind.GENERATIVE)


def test_safetensors_that_are_not_loaded_do_not_count(model: Path) -> None:
    before = inspect(str(model)).weight_bytes
    write_safetensors(model / "adapter_model.safetensors", {"lora": [1000]})
    assert inspect(str(model)).weight_bytes == before


def test_an_embedding_models_context_is_the_smaller_of_its_limits(model: Path) -> None:
    (model / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["BertModel"]}))
    (model / "sentence_bert_config.json").write_text('{"max_seq_length": 48}')
    assert inspect(str(model)).context_tokens_max == 48


def drop(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def config(**changes: Any) -> Callable[[Path], None]:
    return put("config.json", json.dumps(LLAMA | changes))


def cut(count: int) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        whole = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(whole[:count])

    return change


def only_pickles(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def header(content: Any) -> Callable[[Path], None]:
    raw = json.dumps(content).encode()
    return put("model.safetensors", len(raw).to_bytes(8, "little") + raw)


BROKEN: list[tuple[str, Callable[[Path], None], str]] = [
    ("no-config", drop("config.json"), "config.json is missing"),
    ("no-weights", drop("model.safetensors"), "there is no model.safetensors"),
    ("pickled", only_pickles, "pytorch_model.bin is a pickled format"),
    ("code", config(auto_map={"AutoModel": "evil.Model"}), "config.json asks for custom code (auto_map)"),
    ("tokenizer-code", put("tokenizer_config.json", '{"auto_map": {}}'), "tokenizer_config.json asks for custom code"),
    ("quantized", config(quantization_config={"bits": 4}), "has a quantization_config"),
    ("not-json", put("config.json", "{"), "config.json is not valid JSON"),
    ("deep-json", put("config.json", "[" * 100_000), "config.json is not valid JSON"),
    ("not-utf8", put("config.json", b"\xff\xfe{}"), "config.json is not valid JSON"),
    ("not-object", put("config.json", "[]"), "config.json is not a JSON object"),
    ("truncated-end", cut(-1), "model.safetensors is truncated"),
    ("truncated-header", cut(40), "model.safetensors is truncated"),
    ("empty", cut(0), "model.safetensors is truncated"),
    (
        "trailing",
        lambda m: (m / "model.safetensors").open("ab").write(b"xx") and None,
        "model.safetensors is truncated",
    ),
    ("header-list", header([1]), "header is malformed"),
    ("no-tensors", header({}), "header is malformed"),
    ("negative", header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}), "header is malformed"),
    ("bad-shape", header({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 0]}}), "header is malformed"),
    ("index-empty", put("model.safetensors.index.json", '{"weight_map": 3}'), "has no weight_map"),
    ("index-escape", put("model.safetensors.index.json", '{"weight_map": {"a": "../../x"}}'), "outside the directory"),
    ("unknown-kind", config(architectures=["WhisperForConditionalGeneration"]), "is not served"),
    ("no-kind", config(architectures=None), "architecture unknown is not served"),
    ("no-layers", config(num_hidden_layers=0), "no usable num_hidden_layers"),
    ("text-heads", config(num_key_value_heads="many"), "no usable num_key_value_heads"),
    ("no-context", config(max_position_embeddings=None), "no max_position_embeddings"),
]


@pytest.mark.parametrize(("change", "reason"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_what_is_wrong_is_refused_by_name(model: Path, change: Callable[[Path], None], reason: str) -> None:
    change(model)
    with pytest.raises(Refusal) as refused:
        inspect(str(model))
    assert (refused.value.code, refused.value.param) == ("invalid_configuration", "model")
    assert reason in refused.value.message
    assert str(model) not in refused.value.message


SOURCES = [
    ("/no/such/directory", "no such directory"),
    ("relative/path", "the path must be absolute"),
    ("hf://acme/model", "sources of kind hf:// are not supported"),
    ("s3://bucket/model", "sources of kind s3:// are not supported"),
    ("", "the path must be absolute"),
    ("/a\0b", "the path must be absolute"),
]


@pytest.mark.parametrize(("source", "reason"), SOURCES)
def test_sources(source: str, reason: str) -> None:
    with pytest.raises(Refusal, match="model: ") as refused:
        inspect(source)
    assert reason in refused.value.message


def test_digest_is_of_the_content(model: Path, tmp_path: Path) -> None:
    first = inspect(str(model)).digest
    assert inspect(str(shutil.copytree(model, tmp_path / "copy"))).digest == first
    changes: list[Callable[[Path], None]] = [
        put("chat_template.jinja", "{{ messages }}"),
        put("tokenizer.json", '{"v": 2}'),
        config(rope_theta=5),
        lambda m: write_safetensors(m / "model.safetensors", {"a": [10, 64], "b": [64]}, fill=1),
        lambda m: write_safetensors(m / "model.safetensors", {"a": [10, 64], "c": [64]}),
    ]
    seen = {first}
    for number, change in enumerate(changes):
        changed = shutil.copytree(model, tmp_path / f"changed-{number}")
        change(changed)
        seen.add(inspect(str(changed)).digest)
    assert len(seen) == len(changes) + 1


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_bytes_make_the_header_reader_fail_otherwise(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, length: int
) -> None:
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + noise)
    with pytest.raises(Refusal):
        read_header(path)
