"""Reading one LoRA adapter: PEFT's layout (adapter_config.json, adapter_model.safetensors), checked against its base.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. A low-rank pair (A, B) is added to a linear layer
as ``scale · B(A(x))``; the scale (alpha ÷ r, or alpha ÷ √r with rank stabilisation) is folded into B when it is read.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidegate.torch_engine.faults import ModelFault
from tidegate.torch_engine.weights import WeightFile

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_UNSERVED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "fan_in_fan_out")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """``down`` [rank, in] and ``up`` [out, rank], the scale folded into `up`."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter, ready to be added. `pairs` by the name of the base's linear layer."""

    digest: str
    pairs: dict[str, Pair]
    nbytes: int


def digest_of(folder: Path) -> str:
    """Hex SHA-256 over both files. Raises ModelFault when one is missing."""
    hashed = hashlib.sha256()
    for name in (CONFIG, TENSORS):
        try:
            with (folder / name).open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelFault(f"the adapter has no readable {name}") from error
    return hashed.hexdigest()


def read(folder: Path, digest: str, shapes: dict[str, tuple[int, int]], dtype: torch.dtype) -> Adapter:
    """`shapes` are (out, in) of the base's linear layers by name. Raises ModelFault naming what does not fit."""
    if digest_of(folder) != digest:
        raise ModelFault("the adapter's files are not the ones that were applied: their digest differs")
    scale = _scale(folder)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    file = WeightFile(folder / TENSORS)
    for name, tensor in file.views(file.buffer).items():
        layer, _, half = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if half not in ("A", "B") or layer not in shapes:
            raise ModelFault(f"the adapter's tensor {name[:200]} belongs to no linear layer of this base")
        halves.setdefault(layer, {})[half] = tensor.to(dtype)
    pairs = {layer: _pair(layer, both, shapes[layer], scale) for layer, both in halves.items()}
    if not pairs:
        raise ModelFault("the adapter has no tensors")
    nbytes = sum(t.numel() * t.element_size() for pair in pairs.values() for t in (pair.down, pair.up))
    return Adapter(digest, pairs, nbytes)


def _scale(folder: Path) -> float:
    try:
        config: Any = json.loads((folder / CONFIG).read_text())
        if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
            raise ModelFault("the adapter is not plain LoRA (peft_type LORA, bias none)")
        unserved = [name for name in _UNSERVED if config.get(name)]
        if unserved:
            raise ModelFault(f"the adapter uses {unserved[0]}, which this engine does not serve")
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ModelFault(f"the adapter's {CONFIG} is damaged: it must have r and lora_alpha") from error


def _pair(layer: str, both: dict[str, torch.Tensor], shape: tuple[int, int], scale: float) -> Pair:
    if both.keys() != {"A", "B"}:
        raise ModelFault(f"the adapter has only one half of {layer}")
    down, up = both["A"], both["B"]
    if down.dim() != 2 or up.dim() != 2 or (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
        raise ModelFault(
            f"the adapter is for another base: {layer} is {shape[0]} × {shape[1]}, "
            f"its pair is {tuple(up.shape)} · {tuple(down.shape)}"
        )
    return Pair(down.contiguous(), (up * scale).contiguous())
