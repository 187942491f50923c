"""Reads a LoRA adapter's directory without loading it, and checks it against the base it is to be added to.

Layout: PEFT's (https://huggingface.co/docs/peft/developer_guides/checkpoint). Only headers are read of weights; the
digest covers both files whole, as they are small, and is what the engine verifies before it adds anything.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from tidegate.domain.endpoint import ModelKind, ModelProfile
from tidegate.domain.errors import Refusal
from tidegate.engines.inspect import model_path, read_header

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ACCEPTED = f"accepted is a local directory with {CONFIG} and {TENSORS}, as PEFT saves LoRA adapters"
UNSERVED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "fan_in_fan_out")
PREFIX = "base_model.model."

Shape = tuple[int, ...]


class AdapterFiles:
    """Implements `ports.AdapterInspector` for plain paths and ``file:///dir``."""

    def inspect(self, source: str, base: str) -> ModelProfile:
        """`weight_bytes` are the adapter's own. Refusal("invalid_configuration") says what is wrong."""
        folder = model_path(source)
        if "\0" in source or not folder.is_absolute() or not folder.is_dir():
            raise _refuse(f"no such directory; {ACCEPTED}")
        _check_config(folder)
        if not (folder / TENSORS).is_file():
            raise _refuse(f"{TENSORS} is missing; {ACCEPTED}")
        tensors = read_header(folder / TENSORS)
        if "://" not in base.removeprefix("file://"):
            _check_shapes(_shapes(folder / TENSORS), _base_shapes(model_path(base)))
        return ModelProfile(
            source=source,
            digest=_digest(folder),
            kind=ModelKind.GENERATIVE,
            weight_bytes=tensors.tensor_bytes,
            kv_bytes_per_token=0,
            context_tokens_max=0,
            params=tensors.elements,
        )


def _check_config(folder: Path) -> None:
    try:
        config: Any = json.loads((folder / CONFIG).read_bytes())
        plain = config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"
        unserved = next((name for name in UNSERVED if config.get(name)), "")
        sized = int(config["r"]) > 0 and float(config["lora_alpha"]) > 0
    except OSError as error:
        raise _refuse(f"{CONFIG} cannot be read: {error.strerror}; {ACCEPTED}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refuse(f"{CONFIG} is damaged: it must be JSON with peft_type, r and lora_alpha") from error
    if not plain or unserved or not sized:
        raise _refuse(f"{CONFIG} asks for {unserved or 'more'} than plain LoRA (peft_type LORA, bias none, r above 0)")


def _check_shapes(pairs: dict[str, Shape], base: dict[str, Shape]) -> None:
    for name, shape in sorted(pairs.items()):
        layer, _, half = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        weight = base.get(f"{layer}.weight")
        if half not in ("A", "B") or weight is None or len(shape) != 2 or len(weight) != 2:
            raise _refuse(f"the adapter is for another base: its tensor {name[:120]} belongs to no layer of this one")
        mine, its = (shape[1], weight[1]) if half == "A" else (shape[0], weight[0])
        if mine != its:
            raise _refuse(f"the adapter is for another base: {layer[:120]} has {its} there, {mine} in the adapter")


def _base_shapes(folder: Path) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= _shapes(path)
    return found


def _shapes(path: Path) -> dict[str, Shape]:
    """Of a file whose header `read_header` has accepted."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _digest(folder: Path) -> str:
    """As `torch_engine.adapter.digest_of`: SHA-256 over the SHA-256 of each file."""
    hashed = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        with (folder / name).open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def _refuse(message: str) -> Refusal:
    return Refusal("invalid_configuration", f"model: {message}", param="model")
