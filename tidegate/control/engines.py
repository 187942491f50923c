"""The engines an endpoint may ask for, as data: what each is good for and which of its arguments an owner may set.

Only what tunes serving is allowed. What opens ports, reads files, runs code or alters weights is not an endpoint's to
ask for: the platform decides where engines listen and what they load.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tidegate.domain.units import GIB, MIB

COUNT = r"[1-9]\d{0,8}"
SWITCH = r"true"
LORA_SWITCH = "enable_lora"  # vLLM sets its own room aside, for max_loras adapters of max_lora_rank
ADAPTER_ROOM = "adapter_bytes_max"  # set aside by the built-in engine for LoRA adapters, and as much again for a batch


@dataclass(frozen=True, slots=True)
class EngineTraits:
    """What a deployment may ask of an engine. `metering` is how gateways count its output (see EndpointEntry).

    `arguments`: name allowed in `engine_args` → the pattern its value must match. `movable` engines can wake on other
    accelerators of their node. `one_copy`: the replicas of a model on a node have its weights in host memory once.
    `gguf`: it loads GGUF files, and nothing else. `workspace_bytes` is reserved beyond weights and KV on each
    accelerator; 0: the installation's default. `missing`: why it cannot be used here, and what to install; empty where
    it can. `remote`: it is an API elsewhere, needs no accelerator and has no replicas.
    """

    metering: str = "usage_event"
    accelerators_per_replica_max: int = 1024
    one_copy: bool = False
    arguments: Mapping[str, str] = field(default_factory=dict)
    movable: bool = False
    gguf: bool = False
    workspace_bytes: int = 0
    cache_salt: bool = False
    missing: str = ""
    remote: bool = False


BUILTIN = EngineTraits(
    metering="sse_id",
    one_copy=True,
    accelerators_per_replica_max=16,
    arguments=MappingProxyType({ADAPTER_ROOM: r"[1-9]\d{0,12}"}),
)

LLAMACPP = EngineTraits(
    metering="timings",
    accelerators_per_replica_max=16,
    gguf=True,
    workspace_bytes=256 * MIB,
    arguments=MappingProxyType(
        {
            "batch_size": COUNT,
            "ubatch_size": COUNT,
            "flash_attn": r"on|off|auto",
            "cache_type_k": r"f32|f16|bf16|q8_0|q4_0",
            "cache_type_v": r"f32|f16|bf16|q8_0|q4_0",
            "cont_batching": SWITCH,
            "rope_freq_scale": r"\d{1,3}(\.\d{1,6})?",
        }
    ),
)

VLLM = EngineTraits(
    metering="usage_continuous",
    accelerators_per_replica_max=64,
    cache_salt=True,
    workspace_bytes=2 * GIB,
    arguments=MappingProxyType(
        {
            "max_num_seqs": COUNT,
            "max_num_batched_tokens": COUNT,
            "block_size": COUNT,
            "enforce_eager": SWITCH,
            "enable_prefix_caching": SWITCH,
            "enable_chunked_prefill": SWITCH,
            "kv_cache_dtype": r"auto|fp8|fp8_e4m3|fp8_e5m2|bfloat16",
            "sleep_level": r"1|2",
            "max_loras": COUNT,
            "max_lora_rank": COUNT,
            "enable_lora": SWITCH,
            "speculative_tokens": r"[1-9]|1\d|20",  # guessed ahead from the request's own words, and then checked
        }
    ),
)

SGLANG = EngineTraits(
    metering="usage_continuous",
    accelerators_per_replica_max=64,
    workspace_bytes=2 * GIB,
    arguments=MappingProxyType(
        {
            "max_running_requests": COUNT,
            "chunked_prefill_size": COUNT,
            "max_prefill_tokens": COUNT,
            "schedule_conservativeness": r"\d(\.\d{1,3})?",
            "kv_cache_dtype": r"auto|fp8_e4m3|fp8_e5m2",
            "disable_cuda_graph": SWITCH,
            "disable_radix_cache": SWITCH,
        }
    ),
)

TRTLLM = EngineTraits(
    metering="usage_continuous",
    accelerators_per_replica_max=64,
    workspace_bytes=2 * GIB,
    arguments=MappingProxyType({"max_batch_size": COUNT, "max_num_tokens": COUNT, "max_beam_width": COUNT}),
)

REMOTE = EngineTraits(remote=True, accelerators_per_replica_max=0)

ENGINES = MappingProxyType(
    {
        "builtin": BUILTIN,
        "llamacpp": LLAMACPP,
        "vllm": VLLM,
        "sglang": SGLANG,
        "trtllm": TRTLLM,
    }
)
