"""Which engines this machine has: their programs looked for, what endpoints may ask of them, their drivers."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from tidegate.config import Config, ForeignEngine
from tidegate.control.engines import ENGINES, REMOTE, EngineTraits
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import EngineDriver
from tidegate.domain.units import GIB
from tidegate.engines.llamacpp import LlamaDriver
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Lifeline
from tidegate.engines.programs import Program, ServedDriver
from tidegate.engines.sglang import SglangDriver
from tidegate.engines.trtllm import TrtllmDriver
from tidegate.engines.vllm import VllmDriver
from tidegate.wire.internal import RemoteTarget

VLLM_CPU_WORKSPACE_BYTES = 4 * GIB  # its Python processes and a KV cache in whole GiB count as accelerator memory here


@dataclass(frozen=True, slots=True)
class Foreign:
    """An engine that is a program of its own: what it is called on PATH, and where it comes from."""

    driver: type[ServedDriver]
    command: str
    install: str


FOREIGN: dict[ForeignEngine, Foreign] = {
    "llamacpp": Foreign(LlamaDriver, "llama-server", "llama.cpp (https://github.com/ggml-org/llama.cpp)"),
    "vllm": Foreign(VllmDriver, "vllm", "vLLM in an environment of its own (pip install vllm)"),
    "sglang": Foreign(SglangDriver, "sglang", "SGLang in an environment of its own (pip install sglang)"),
    "trtllm": Foreign(TrtllmDriver, "trtllm-serve", "TensorRT-LLM (https://nvidia.github.io/TensorRT-LLM)"),
}


def program(config: Config, engine: ForeignEngine) -> Program:
    """How to call a foreign engine: as configured, else by its usual name on PATH."""
    return Program.find(shlex.split(config.engine.programs.get(engine, FOREIGN[engine].command)))


def traits(config: Config, accelerators: tuple[Accelerator, ...]) -> dict[str, EngineTraits]:
    """CPU accelerators are budgets, not places: an engine that slept on one wakes on any; on GPUs only on its own."""
    on_cpu = all(accelerator.kind == "cpu" for accelerator in accelerators)
    found = {"builtin": replace(ENGINES["builtin"], movable=on_cpu), "remote": REMOTE}
    for name in FOREIGN:
        known = replace(ENGINES[name], movable=on_cpu)
        if not program(config, name).argv:
            known = replace(known, missing=_missing(config, name))
        if name == "vllm" and on_cpu:
            known = replace(known, workspace_bytes=VLLM_CPU_WORKSPACE_BYTES)
        found[name] = known
    return found


def providers(config: Config) -> dict[str, RemoteTarget]:
    """The APIs elsewhere that endpoints may name, by name. Their keys stay where they are."""
    made = {}
    for name, remote in config.remotes.items():
        file = f"file:{remote.key_file.resolve()}" if remote.key_file else ""
        made[name] = RemoteTarget(
            provider=name,
            url=remote.url.rstrip("/"),
            model="",
            key=f"env:{remote.key_env}" if remote.key_env else file,
            ca_file=str(remote.ca_file.resolve()) if remote.ca_file else "",
            concurrency_max=remote.concurrency_max,
            connect_ms_max=remote.connect_ms_max,
            first_byte_ms_max=remote.first_byte_ms_max,
            metering="usage_continuous" if remote.continuous_usage else "usage_event",
            context_tokens_max=remote.context_tokens_max,
            region=remote.region,
        )
    return made


def foreign_drivers(
    config: Config, directory: Path, *, lifeline: Lifeline, threads: int, logs: LogRing
) -> dict[str, EngineDriver]:
    """A driver of each foreign engine found."""
    found: dict[str, EngineDriver] = {}
    for name, foreign in FOREIGN.items():
        called = program(config, name)
        if called.argv:
            found[name] = foreign.driver(called, directory=directory, lifeline=lifeline, threads=threads, logs=logs)
    return found


def _missing(config: Config, engine: ForeignEngine) -> str:
    foreign = FOREIGN[engine]
    configured = config.engine.programs.get(engine)
    if configured:
        return f"engine.programs.{engine} = {configured!r} was not found"
    return f"{foreign.command} is not on PATH: install {foreign.install}, or set engine.programs.{engine}"
