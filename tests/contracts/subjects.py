"""The drivers under the contract suite, each with what differs between them. Real ones run where they are found."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.programs import LLAMA_SERVER, VLLM_PYTHON
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import Engine, EngineDriver, StartOrder
from tidegate.engines.builtin import BuiltinDriver
from tidegate.engines.fake import FakeDriver, FakeScript
from tidegate.engines.inspect import FileInspector
from tidegate.engines.llamacpp import LlamaDriver
from tidegate.engines.process import Lifeline
from tidegate.engines.programs import Program, ServedDriver
from tidegate.engines.served import ServedLimits
from tidegate.engines.sglang import SglangDriver
from tidegate.engines.trtllm import TrtllmDriver
from tidegate.engines.vllm import VllmDriver

MIB = 1 << 20
RESERVED = 64 * MIB
SHAPE: dict[str, Any] = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 704, "vocab": 2048}
STANDIN = Path(__file__).resolve().parent.parent / "engines" / "standin.py"
QUICK = ServedLimits(ready_ms_max=60_000, sleep_ms_max=3_000, wake_ms_max=3_000, settle_ms_max=500)
CPU = Accelerator("cpu-0", "cpu", 256 * MIB)


@dataclass
class Subject:
    """A driver under test, with what differs between them: its model, and how one of its engines is killed."""

    driver: EngineDriver
    model: Path
    kill: Callable[[Any], None]
    reason_killed: str
    bad_models: dict[str, Path]
    count: Callable[[], int]  # of engine processes alive
    ours: bool = True  # numbers its events, and refuses by itself while it sleeps
    reserved: int = RESERVED
    long_tokens: int = 100  # an answer that is still running when the test has looked
    engines: list[Engine] = field(default_factory=list)

    def order(self, replica: str = "acme/chat-1", model: Path | None = None) -> StartOrder:
        source = str(model or self.model)
        profile = ModelProfile(source, "", ModelKind.GENERATIVE, 1, 1, 256)
        if model is None and self.model.exists():
            profile = FileInspector().inspect(source)
        deployment = Deployment("acme/chat", "acme", profile, Mode.DEDICATED_SERVERLESS, slots=4)
        return StartOrder(replica, deployment, (CPU,), self.reserved)

    async def start(self, order: StartOrder) -> Engine:
        engine = await self.driver.start(order)
        self.engines.append(engine)
        return engine

    async def started(self, replica: str = "acme/chat-1") -> Engine:
        engine = await self.start(self.order(replica))
        await engine.ready()
        return engine

    async def stop_all(self) -> None:
        while self.engines:
            await self.engines.pop().stop()


@contextlib.asynccontextmanager
async def fake_subject(folder: Path) -> AsyncIterator[Subject]:
    bad = {kind: folder / kind for kind in ("missing", "truncated", "pickled")}
    sources = {str(path) for path in bad.values()}

    def script(order: StartOrder) -> FakeScript:
        return FakeScript(fail_ready="no weights" if order.deployment.model.source in sources else "", token_ms=20)

    driver = FakeDriver(script, directory=folder)

    def die(engine: Any) -> None:
        engine.die("killed by SIGKILL")

    try:
        yield Subject(driver, folder / "model", die, "killed by SIGKILL", bad, lambda: len(driver.alive()))
    finally:
        await driver.close()


@contextlib.asynccontextmanager
async def builtin_subject(folder: Path, cpu_device: str = "cpu") -> AsyncIterator[Subject]:
    from tests import models

    model = models.llama()
    bad = _bad_models(model, folder)
    lifeline = Lifeline()
    driver = BuiltinDriver(directory=folder / "run", lifeline=lifeline, threads=1, cpu_device=cpu_device)

    def count() -> int:
        assert driver.template.process is not None
        return len(psutil.Process(driver.template.process.pid).children())

    try:
        yield Subject(driver, model, kill, "engine process", bad, count)
    finally:
        lifeline.close()
        await driver.close()


@contextlib.asynccontextmanager
async def llamacpp_subject(folder: Path) -> AsyncIterator[Subject]:
    from tests import gguf, models

    model = gguf.from_llama(models.llama(**SHAPE, context=2048), folder / "model.gguf")
    truncated, pickled = folder / "truncated.gguf", folder / "pickled.gguf"
    truncated.write_bytes(model.read_bytes()[:-100_000])
    pickled.write_bytes(b"\x80\x04N.")
    bad = {"missing": folder / "missing.gguf", "truncated": truncated, "pickled": pickled}
    lifeline = Lifeline()
    driver = LlamaDriver(Program.find([LLAMA_SERVER]), directory=folder / "run", lifeline=lifeline)
    try:
        yield Subject(driver, model, kill, "engine process", bad, children_named("llama-server"),
                      ours=False, long_tokens=1_500)  # fmt: skip
    finally:
        lifeline.close()
        await driver.close()


@contextlib.asynccontextmanager
async def standin_subject(kind: str, folder: Path) -> AsyncIterator[Subject]:
    """The driver of an engine that needs a GPU, on a stand-in for that engine."""
    from tests import models

    model = models.copy(models.llama(**SHAPE, dtype="bfloat16"), folder)
    bad = _bad_models(model, folder)
    lifeline = Lifeline()
    driver = standin_driver(kind, folder, lifeline)
    try:
        yield Subject(driver, model, kill, "engine process", bad, children_named(STANDIN.name), ours=False)
    finally:
        lifeline.close()
        await driver.close()


def standin_driver(kind: str, folder: Path, lifeline: Lifeline) -> ServedDriver:
    """Installed as the real one would be: a program, and for TensorRT-LLM the file that says whether it can sleep."""
    program = folder / "bin" / kind
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {STANDIN} {kind} "$@"\n')
    program.chmod(0o700)
    options = folder / "lib" / "python3.11" / "site-packages" / "tensorrt_llm" / "llmapi" / "llm_args.py"
    options.parent.mkdir(parents=True, exist_ok=True)
    options.write_text("class SleepConfig: ...\n")
    made: dict[str, type[ServedDriver]] = {"vllm": VllmDriver, "sglang": SglangDriver, "trtllm": TrtllmDriver}
    return made[kind](Program((str(program),)), directory=folder / "run", lifeline=lifeline, limits=QUICK)


@contextlib.asynccontextmanager
async def vllm_subject(folder: Path) -> AsyncIterator[Subject]:
    """Real vLLM, its CPU build."""
    from tests import models

    model = models.llama(**SHAPE, context=2048, dtype="bfloat16")
    bad = _bad_models(model, folder)
    lifeline = Lifeline()
    program = Program.find([VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server"])
    driver = VllmDriver(program, directory=folder / "run", lifeline=lifeline)
    try:
        yield Subject(driver, model, kill, "engine process", bad, children_named("api_server"),
                      ours=False, long_tokens=500, reserved=8 << 30)  # fmt: skip
    finally:
        lifeline.close()
        await driver.close()


def _bad_models(model: Path, folder: Path) -> dict[str, Path]:
    from tests import models

    truncated = models.copy(model, folder / "cut")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "pickled").mkdir()
    shutil.copy(model / "config.json", folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    return {"missing": folder / "missing", "truncated": truncated, "pickled": folder / "pickled"}


def kill(engine: Any) -> None:
    os.kill(engine.pid, signal.SIGKILL)


def children_named(word: str) -> Callable[[], int]:
    return lambda: sum(word in " ".join(child.cmdline()) for child in psutil.Process().children())
