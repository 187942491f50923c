"""Loading: from a directory to a running worker. Everything that can be wrong with a model is found here."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tidegate.torch_engine import kv, loader, memory
from tidegate.torch_engine.devices import Device, devices_of
from tidegate.torch_engine.faults import MemoryFault, ModelFault
from tidegate.torch_engine.host_copy import HostCopy
from tidegate.torch_engine.loader import Kind
from tidegate.torch_engine.lora import Lora
from tidegate.torch_engine.options import Options
from tidegate.torch_engine.residency import CopiedResidency, CpuResidency, Residency
from tidegate.torch_engine.runner import EncoderRunner, GenerativeRunner, kv_shape
from tidegate.torch_engine.text import TextCodec
from tidegate.torch_engine.weights import Weights

_CANARY_TEXT = "The tide rises, the tide falls"
_POOLING_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sampling when a request says nothing: generation_config.json's values where it has them (as vLLM does)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(slots=True)
class Loaded:
    """One model, ready to run. `runner` is generative or an encoder, by `kind`."""

    kind: Kind
    runner: GenerativeRunner | EncoderRunner
    codec: TextCodec
    residency: Residency
    weight_bytes: int
    context_tokens_max: int
    vocab: int
    slots: int
    eos: frozenset[int] = frozenset()
    defaults: Defaults = Defaults()
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    lora: Lora | None = None

    def sleep(self) -> None:
        """Gives accelerator memory back; adapters are read again when asked for."""
        if self.lora is not None:
            self.lora.forget()
        self.residency.sleep()

    def canary(self) -> list[int]:
        """Greedy tokens for a fixed text, or a rounded digest of its vector. Same weights, same answer."""
        prompt = self.codec.encode(_CANARY_TEXT)[: self.context_tokens_max // 2] or [0]
        if isinstance(self.runner, GenerativeRunner):
            return self.runner.canary(prompt)
        vector = self.runner.encode([prompt])[0].double()
        scale = float(vector.abs().max()) or 1.0
        return [round(value / scale * 1000) for value in vector[:16].tolist()]


def load(options: Options) -> Loaded:
    """Raises ModelFault or MemoryFault with the reason. Leaves the weights where they lie."""
    torch.set_num_threads(max(1, options.threads_used))
    torch.set_grad_enabled(False)
    devices = devices_of(options.device)
    spec = loader.inspect(options.model)
    weights = Weights(options.model)
    room = None if options.memory_bytes is None else options.memory_bytes * max(1, len(devices))
    if room is not None and weights.tensor_bytes > room:
        raise MemoryFault(f"the model does not fit: its weights have {weights.tensor_bytes} bytes, {room} are allowed")
    if len(devices) > 1 and (spec.kind != "generative" or options.adapter_bytes_max):
        raise ModelFault("over several accelerators only generative models without adapters are served")
    reading = weights.read_ahead()  # the disk works while the tokenizer and the module are made
    codec = TextCodec(options.model)
    model: Any = loader.build(spec, weights)
    reading.join()
    residency = _residency(options, weights, model, devices)
    if spec.kind == "generative":
        return _generative(options, spec, weights, codec, model, residency)
    return _encoder(options, spec, weights, codec, model, residency)


def _residency(options: Options, weights: Weights, model: Any, devices: list[Device]) -> Residency:
    if not devices:
        return CpuResidency(weights)
    copy = HostCopy(options.model, weights, options.host_copy, writable=devices[0].locks_host)
    return CopiedResidency(weights, model, copy, devices)


def _generative(
    options: Options, spec: loader.ModelSpec, weights: Weights, codec: TextCodec, model: Any, residency: Residency
) -> Loaded:
    shape = kv_shape(spec.config, model.dtype)
    own = int(getattr(spec.config, "max_position_embeddings", 0) or 2048)
    context = min(own, options.context_tokens_max or own)
    parts = residency.kv_parts(shape.layers)
    left = [
        (memory.available_bytes() // 2 if options.memory_bytes is None else options.memory_bytes)
        - residency.weight_bytes(side)
        - 2 * options.adapter_bytes_max
        for side in range(len(parts))
    ]
    # A row has all layers: what the device with the least room for its share of them leaves.
    bytes_max = min(room * shape.layers // len(part.layers) for room, part in zip(left, parts, strict=True))
    backed = parts[0].device.type != "cpu"
    plan = kv.plan(shape, bytes_max=bytes_max, slots=options.slots, context_tokens_max=context, backed=backed)
    store = residency.store = kv.KvStore(shape, plan, parts)
    lora = Lora(model, options.adapter_bytes_max, plan.rows) if options.adapter_bytes_max else None
    runner = GenerativeRunner(model, store, lora)
    runner.warm_up()
    generation = _optional_json(spec.folder / "generation_config.json")
    return Loaded(
        kind="generative",
        runner=runner,
        codec=codec,
        residency=residency,
        weight_bytes=weights.tensor_bytes,
        context_tokens_max=plan.context_tokens_max,
        vocab=int(spec.config.vocab_size),
        slots=plan.rows,
        eos=_eos(generation, spec.config, codec),
        defaults=Defaults(
            float(_given(generation, "temperature", 1.0)),
            float(_given(generation, "top_p", 1.0)),
            int(_given(generation, "top_k", 0)),
        ),
        lora=lora,
    )


def _given(values: dict[str, Any], name: str, otherwise: float) -> float:
    value = values.get(name)
    return otherwise if not isinstance(value, int | float) else value


def _eos(generation: dict[str, Any], config: Any, codec: TextCodec) -> frozenset[int]:
    found: set[int] = set()
    for value in (generation.get("eos_token_id"), getattr(config, "eos_token_id", None), codec.hf.eos_token_id):
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)


def _encoder(
    options: Options, spec: loader.ModelSpec, weights: Weights, codec: TextCodec, model: Any, residency: Residency
) -> Loaded:
    pooling, normalize = _pooling(spec.folder) if spec.kind == "embedding" else (None, False)
    context = _encoder_context(spec, codec)
    pad = codec.hf.pad_token_id
    labels = getattr(spec.config, "id2label", None) or {}
    loaded = Loaded(
        kind=spec.kind,
        runner=EncoderRunner(model, pad if pad is not None else 0, pooling, normalize, residency.device),
        codec=codec,
        residency=residency,
        weight_bytes=weights.tensor_bytes,
        context_tokens_max=min(context, options.context_tokens_max or context),
        vocab=int(spec.config.vocab_size),
        slots=options.slots,
        labels=tuple(str(labels[key]) for key in sorted(labels, key=int)) if spec.kind == "classification" else (),
        multi_label=getattr(spec.config, "problem_type", None) == "multi_label_classification",
    )
    try:
        loaded.canary()
    except ModelFault:
        raise
    except Exception as error:
        raise ModelFault(f"architecture {spec.architecture} does not run here ({type(error).__name__})") from error
    return loaded


def _encoder_context(spec: loader.ModelSpec, codec: TextCodec) -> int:
    positions = int(getattr(spec.config, "max_position_embeddings", 0) or 512)
    if spec.config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):  # positions start after the pad id
        positions -= int(spec.config.pad_token_id or 0) + 1
    bounds = [positions, int(min(codec.hf.model_max_length, 1 << 30))]
    own = _optional_json(spec.folder / "sentence_bert_config.json").get("max_seq_length")
    if isinstance(own, int):
        bounds.append(own)
    return min(bounds)


def _pooling(folder: Path) -> tuple[str, bool]:
    """(mode, whether vectors are normalised), from a sentence-transformers layout; mean and normalised without one."""
    if not (folder / "modules.json").is_file():
        return "mean", True
    try:
        modules = json.loads((folder / "modules.json").read_text())
        types = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFault("modules.json is damaged") from error
    foreign = types.keys() - {"Transformer", "Pooling", "Normalize"}
    if foreign:
        raise ModelFault(
            f"modules.json has a {min(foreign)} module: only Transformer, Pooling and Normalize are served"
        )
    if types.get("Transformer"):
        raise ModelFault("modules.json keeps the transformer in a folder of its own: not served")
    config = _optional_json(folder / types.get("Pooling", "1_Pooling") / "config.json")
    modes = [mode for flag, mode in _POOLING_MODES.items() if config.get(flag)]
    others = [
        name for name, on in config.items() if name.startswith("pooling_mode_") and on and name not in _POOLING_MODES
    ]
    if others or len(modes) > 1:
        raise ModelFault("the pooling config asks for a mode that is not served: mean, cls, max or lasttoken is")
    return (modes or ["mean"])[0], "Normalize" in types


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ModelFault(f"{path.name} is not valid JSON") from error
    return value if isinstance(value, dict) else {}
