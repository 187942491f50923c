"""What this machine computes on, and the built-in engine's driver for it. Light to import: needed first."""

import os
from dataclasses import dataclass
from pathlib import Path

from tidegate.assemble.sockets import StartError
from tidegate.config import Config
from tidegate.domain.errors import Refusal
from tidegate.domain.fleet import Accelerator
from tidegate.engines.builtin import BuiltinDriver
from tidegate.engines.discover import discover
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Lifeline


@dataclass(frozen=True, slots=True)
class Machine:
    """Engines end with `lifeline` and print into `logs`; `threads` is what each may use of the CPU."""

    accelerators: tuple[Accelerator, ...]
    threads: int
    lifeline: Lifeline
    logs: LogRing
    driver: BuiltinDriver


def machine_of(config: Config, run: Path, logs: Path) -> Machine:
    """Nothing runs yet. Raises StartError."""
    accelerators = accelerators_of(config)
    threads, lifeline, ring = engine_threads(config, len(accelerators)), Lifeline(), LogRing(logs / "engines.log")
    driver = BuiltinDriver(directory=run, lifeline=lifeline, threads=threads, logs=ring)
    return Machine(accelerators, threads, lifeline, ring, driver)


def accelerators_of(config: Config) -> tuple[Accelerator, ...]:
    """What this machine can compute on, as configured. Raises StartError."""
    shape = config.accelerators
    try:
        return discover(shape.kind, cpu_count=shape.count, cpu_memory_bytes=shape.memory)
    except Refusal as refusal:
        raise StartError(refusal.message) from refusal


def engine_threads(config: Config, accelerators: int) -> int:
    """CPU threads of one engine: what was set, or this process's cores divided among the accelerators."""
    return config.engine.threads or max(1, len(os.sched_getaffinity(0)) // accelerators)
