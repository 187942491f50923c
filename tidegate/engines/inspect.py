"""Reads a model directory without loading it: what it is, how large its weights are, whether it may be served.

Only JSON and safetensors headers are read (format: https://huggingface.co/docs/safetensors); nothing in a model is ever
executed. Files come from outside, so every number in them is checked against what is really on the disk.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tidegate.domain.endpoint import ModelKind, ModelProfile
from tidegate.domain.errors import Refusal
from tidegate.engines.gguf import inspect_gguf

HEADER_BYTES_MAX = 100_000_000  # the format's own bound
JSON_BYTES_MAX = 64 << 20
FILES_MAX = 1_000
SAMPLES, SAMPLE_BYTES = 16, 64 << 10
ACCEPTED = (
    "accepted is a local directory in Hugging Face layout: config.json, tokenizer files and model.safetensors "
    "(or shards with their index)"
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Everything that changes what the model answers is part of its digest; weights by header, size, samples.
DESCRIBING = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True, slots=True)
class Tensors:
    """What one safetensors file holds: bytes and elements of its tensors, SHA-256 of header and samples, file size."""

    tensor_bytes: int
    elements: int
    digest: str
    file_bytes: int


class FileInspector:
    """Implements `ModelInspector` for plain paths and ``file:///dir``, and for single GGUF files by either."""

    def inspect(self, source: str) -> ModelProfile:
        """Refusal("invalid_configuration") with param ``model`` says what is missing, truncated or not allowed."""
        if is_gguf(source):
            return inspect_gguf(source, _gguf_file(source))
        directory = _directory(source)
        config = _json(directory / "config.json", required=True)
        _refuse_code(directory, config)
        weights = _weights(directory)
        nested = config.get("text_config")
        text: dict[str, Any] = nested if isinstance(nested, dict) else config
        kind = _kind(directory, config)
        tensor_bytes = sum(tensors.tensor_bytes for tensors in weights.values())
        return ModelProfile(
            source=source,
            digest=_digest(directory, weights),
            kind=kind,
            weight_bytes=tensor_bytes,
            kv_bytes_per_token=_kv_bytes(text, weights) if kind is ModelKind.GENERATIVE else 0,
            context_tokens_max=_context(directory, text),
            params=sum(tensors.elements for tensors in weights.values()),
        )


def _refuse(message: str) -> Refusal:
    return Refusal("invalid_configuration", f"model: {message}", param="model")


def model_path(source: str) -> Path:
    """The directory a plain path or ``file:///dir`` names."""
    return Path(unquote(urlsplit(source).path) if source.startswith("file://") else source)


def is_gguf(source: str) -> bool:
    """Whether a source names a GGUF file: what llama.cpp loads, and no other engine."""
    return source.lower().endswith(".gguf")


def _gguf_file(source: str) -> Path:
    file = model_path(source)
    if "\0" in source or not file.is_absolute():
        raise _refuse("the path of a GGUF file must be absolute")
    if not file.is_file():
        raise _refuse("no such file")
    return file


def _directory(source: str) -> Path:
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme not in ("", "file"):
        raise _refuse(f"sources of kind {scheme[:20]}:// are not supported; {ACCEPTED}")
    directory = model_path(source)
    if "\0" in source or not directory.is_absolute():
        raise _refuse(f"the path must be absolute; {ACCEPTED}")
    if not directory.is_dir():
        raise _refuse(f"no such directory; {ACCEPTED}")
    return directory


def _json(path: Path, *, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise _refuse(f"{path.name} is missing; {ACCEPTED}")
        return {}
    try:
        if path.stat().st_size > JSON_BYTES_MAX:
            raise _refuse(f"{path.name} is larger than {JSON_BYTES_MAX} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _refuse(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _refuse(f"{path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise _refuse(f"{path.name} is not a JSON object")
    return value


def _refuse_code(directory: Path, config: dict[str, Any]) -> None:
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", _json(directory / "tokenizer_config.json")),
    ):
        if "auto_map" in content:
            raise _refuse(f"{name} asks for custom code (auto_map); remote code is never run. {ACCEPTED}")
    if config.get("quantization_config"):
        raise _refuse(
            "config.json has a quantization_config; weights are served as they are, and accepted are plain ones"
        )


def _weights(directory: Path) -> dict[str, Tensors]:
    """File name → what it holds. Follows the shard index where there is one."""
    index = _json(directory / "model.safetensors.index.json")
    if index:
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise _refuse("model.safetensors.index.json has no weight_map")
        names = sorted(set(shards.values()))
    else:
        # Only this name: other safetensors files beside it (adapters, another library's copy) are not what is loaded.
        names = ["model.safetensors"] if (directory / "model.safetensors").is_file() else []
    if len(names) > FILES_MAX:
        raise _refuse(f"more than {FILES_MAX} weight files")
    if not names:
        pickled = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLED)
        if pickled:
            raise _refuse(f"{pickled[0]} is a pickled format, which can run code when loaded; {ACCEPTED}")
        raise _refuse(f"there is no model.safetensors; {ACCEPTED}")
    if bad := [name for name in names if "/" in name or name in (".", "..")]:
        raise _refuse(f"model.safetensors.index.json names a file outside the directory: {bad[0][:80]}")
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise _refuse(f"{absent[0]} is named in model.safetensors.index.json, but missing")
    return {name: read_header(directory / name) for name in names}


def read_header(path: Path) -> Tensors:
    """Checks one safetensors file against its own header. Raises Refusal for what is truncated or malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_BYTES_MAX, size - 8):
                raise _refuse(f"{path.name} is truncated or not a safetensors file ({size} bytes)")
            raw = file.read(length)
    except OSError as error:
        raise _refuse(f"{path.name} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
        spans = [(t["data_offsets"], t["shape"]) for name, t in header.items() if name != "__metadata__"]
        ends = [(int(span[0]), int(span[1])) for span, _ in spans]
        elements = sum(_product(shape) for _, shape in spans)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _refuse(f"{path.name} is not a safetensors file: its header is malformed") from error
    wanted = 8 + length + max((end for _, end in ends), default=0)
    if wanted != size:
        raise _refuse(f"{path.name} is truncated: {size} bytes on disk, its header describes {wanted}")
    tensor_bytes = sum(end - begin for begin, end in ends)
    # The format leaves no holes and no overlaps: with those, a header could claim any number of bytes.
    if tensor_bytes != size - 8 - length or any(begin < 0 or end < begin for begin, end in ends) or not ends:
        raise _refuse(f"{path.name} is not a safetensors file: its header is malformed")
    return Tensors(tensor_bytes, elements, hashlib.sha256(raw + _sample(path, size)).hexdigest(), size)


def _sample(path: Path, size: int) -> bytes:
    """`SAMPLES` blocks spread evenly over the file: fine-tunes of one shape differ nearly everywhere."""
    with path.open("rb") as file:
        blocks = []
        for offset in sample_offsets(size):
            file.seek(offset)
            blocks.append(file.read(SAMPLE_BYTES))
    return b"".join(blocks)


def sample_offsets(size: int) -> range:
    """Where the sampled blocks of a file of `size` bytes begin."""
    return range(0, size, max(SAMPLE_BYTES, (size - SAMPLE_BYTES) // (SAMPLES - 1)))


def _product(shape: list[int]) -> int:
    product = 1
    for length in shape:
        product *= int(length)
    return product


def _kind(directory: Path, config: dict[str, Any]) -> ModelKind:
    architectures = config.get("architectures") or [""]
    architecture = str(architectures[0]) if isinstance(architectures, list) else ""
    if (directory / "modules.json").is_file():
        return ModelKind.EMBEDDING
    if architecture.endswith("ForSequenceClassification"):
        return ModelKind.CLASSIFICATION
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return ModelKind.GENERATIVE
    if architecture.endswith(("Model", "ForMaskedLM")):
        return ModelKind.EMBEDDING
    raise _refuse(
        f"architecture {architecture[:80] or 'unknown'} is not served; accepted are …ForCausalLM, "
        "…ForSequenceClassification, and embedding models"
    )


def _kv_bytes(text: dict[str, Any], weights: dict[str, Tensors]) -> int:
    """Keys and values of one token over all layers: 2 × layers × KV heads × head size × element size."""
    heads = _count(text, "num_attention_heads", "n_head")
    layers = _count(text, "num_hidden_layers", "n_layer")
    hidden = _count(text, "hidden_size", "n_embd")
    kv_heads = _count(text, "num_key_value_heads") if text.get("num_key_value_heads") is not None else heads
    head_size = _count(text, "head_dim") if text.get("head_dim") is not None else max(1, hidden // heads)
    return 2 * layers * kv_heads * head_size * _element_bytes(text, weights)


def _count(text: dict[str, Any], *names: str) -> int:
    value = next((text[name] for name in names if name in text), None)
    if not isinstance(value, int) or value < 1:
        raise _refuse(f"config.json has no usable {names[0]}")
    return value


def _element_bytes(text: dict[str, Any], weights: dict[str, Tensors]) -> int:
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
    named = sizes.get(str(text.get("dtype") or text.get("torch_dtype")))
    elements = sum(tensors.elements for tensors in weights.values())
    return named or max(1, sum(tensors.tensor_bytes for tensors in weights.values()) // max(1, elements))


def _context(directory: Path, text: dict[str, Any]) -> int:
    limits = [text.get(name) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    limits.append(_json(directory / "sentence_bert_config.json").get("max_seq_length"))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    if not known:
        raise _refuse("config.json has no max_position_embeddings")
    return min(known)


def _digest(directory: Path, weights: dict[str, Tensors]) -> str:
    """Hex SHA-256 over names and contents of the describing files, and names, sizes, headers and samples of weights.

    Cheap (about 1 MiB of each weight file is read), the same for every copy of a model, and it changes with any change
    of configuration, tokenizer, template or shape and with any retraining; a patch of single weights may escape it.
    """
    digest = hashlib.sha256()
    for path in sorted((*directory.glob("*"), *directory.glob("*/config.json"))):
        if path.suffix in DESCRIBING and path.is_file() and path.stat().st_size <= JSON_BYTES_MAX:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(directory)}\0{content}\n".encode())
    for name, tensors in sorted(weights.items()):
        digest.update(f"{name}\0{tensors.file_bytes}\0{tensors.digest}\n".encode())
    return digest.hexdigest()
