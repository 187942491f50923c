"""From a model directory to a module whose parameters *are* the mapped weights: no copy, no cast, no foreign code.

The module is built with its parameters on the meta device (so nothing is initialised only to be thrown away) and its
buffers for real (they are computed from the config, not stored); then every parameter is assigned a view of the file.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights

from tidegate.torch_engine.attention import ATTENTION
from tidegate.torch_engine.faults import ModelFault
from tidegate.torch_engine.weights import Weights

Kind = Literal["generative", "embedding", "classification"]
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What config.json and the layout say, before any weight is read."""

    folder: Path
    kind: Kind
    architecture: str
    config: Any


def inspect(folder: Path) -> ModelSpec:
    """Raises ModelFault for what we do not serve: custom code, unknown architectures, a damaged config."""
    if not folder.is_dir():
        raise ModelFault("the model directory does not exist")
    raw = _read_json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in _read_json(folder / name):
            raise ModelFault(f"{name} asks for custom code (auto_map): code from a model directory is never run")
    if raw.get("quantization_config"):
        raise ModelFault("config.json has a quantization_config: this engine serves plain weights only")
    architecture = (raw.get("architectures") or [""])[0]
    kind = _kind(folder, architecture)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelFault(f"config.json is not one this engine can serve ({type(error).__name__})") from error
    return ModelSpec(folder, kind, architecture, config)


def _kind(folder: Path, architecture: str) -> Kind:
    if (folder / "modules.json").is_file():
        return "embedding"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "generative"
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    if architecture.endswith(("Model", "ForMaskedLM")):
        return "embedding"
    raise ModelFault(
        f"architecture {architecture[:80] or '(none)'} is not served (causal LMs, encoders, classifiers are)"
    )


def build(spec: ModelSpec, weights: Weights) -> nn.Module:
    """The module in eval mode, every parameter a view of `weights`."""
    if spec.kind == "embedding":
        make: Any = AutoModel.from_config
    else:
        model_type = getattr(transformers, spec.architecture, None)
        if model_type is None:
            raise ModelFault(
                f"architecture {spec.architecture[:80]} is not known to transformers {transformers.__version__}"
            )
        make = model_type._from_config
    tensors = weights.tensors()
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point() and t.dim() > 1), torch.float32)
    attention = ATTENTION if spec.kind == "generative" else "sdpa"
    with _parameters_on_meta(), no_init_weights():
        model = make(spec.config, attn_implementation=attention, dtype=dtype)
    model.eval().requires_grad_(False)
    _assign(model, tensors)
    return model  # type: ignore[no-any-return]


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _assign(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    wanted = set(model.state_dict().keys())
    named = _rename(tensors, wanted, model.base_model_prefix)
    for name, parameter in model.named_parameters():
        if name in named and named[name].shape != parameter.shape:
            raise ModelFault(
                f"tensor {name} has shape {tuple(named[name].shape)}, config.json says {tuple(parameter.shape)}"
            )
    model.load_state_dict({k: v for k, v in named.items() if k in wanted}, strict=False, assign=True)
    model.requires_grad_(False)
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        optional = [name for name in absent if "pooler." in name]  # not used: pooling is ours
        if len(optional) < len(absent) or model.__class__.__name__.endswith("Classification"):
            shown = ", ".join(absent[:_NAMES_SHOWN])
            raise ModelFault(f"{len(absent)} tensors are missing from the safetensors files: {shown}")
        model.pooler = None


def _rename(tensors: dict[str, torch.Tensor], wanted: set[str], prefix: str) -> dict[str, torch.Tensor]:
    """Checkpoints of a base model and of one with a head differ by the base's prefix: the reading that fits best."""
    dot = f"{prefix}."
    readings = [
        tensors,
        {name.removeprefix(dot): tensor for name, tensor in tensors.items()},
        {dot + name: tensor for name, tensor in tensors.items()},
    ]
    return max(readings, key=lambda named: len(wanted & named.keys()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelFault(f"{path.name} is missing from the model directory") from error
    except ValueError as error:
        raise ModelFault(f"{path.name} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ModelFault(f"{path.name} is not a JSON object")
    return value
