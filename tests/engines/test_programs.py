"""How foreign engines are called: their command lines, what of our environment they see, vLLM's adapters and levels."""

import asyncio
import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.subjects import SHAPE, standin_driver
from tidegate.domain.endpoint import Deployment, Mode, ModelKind, ModelProfile
from tidegate.domain.errors import EngineFault
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import StartOrder
from tidegate.engines.llamacpp import LlamaDriver
from tidegate.engines.process import Lifeline, Process
from tidegate.engines.programs import Program, ServedDriver, child_environment
from tidegate.engines.sglang import SglangDriver
from tidegate.engines.trtllm import TrtllmDriver
from tidegate.engines.vllm import VllmDriver, VllmEngine

GIB = 1 << 30
GPUS = tuple(Accelerator(f"gpu-{n}", "NVIDIA H100", 79 * GIB) for n in (2, 3))
PROFILE = ModelProfile("/models/m", "d", ModelKind.GENERATIVE, 16 * GIB, 131_072, 8_192)


def order(*accelerators: Accelerator, **more: Any) -> StartOrder:
    made = Deployment("acme/chat", "acme", PROFILE, Mode.DEDICATED_SERVERLESS, slots=12)
    return StartOrder("acme/chat-1", replace(made, **more), accelerators or GPUS, 40 * GIB)


def command(kind: type[ServedDriver], tmp_path: Path, *accelerators: Accelerator, **more: Any) -> list[str]:
    lifeline = Lifeline()
    driver = kind(Program((str(tmp_path / "bin" / "program"),)), directory=tmp_path / "run", lifeline=lifeline)
    made = order(*accelerators, **more)
    words = driver.command(made, driver.address(made))
    lifeline.close()
    return words


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_vllm_on_gpus(tmp_path: Path) -> None:
    words = command(VllmDriver, tmp_path, engine_args=(("max_num_seqs", "64"), ("sleep_level", "2")))
    assert words[:2] == ["serve", "/models/m"]
    assert value(words, "--served-model-name") == "acme/chat"
    assert value(words, "--tensor-parallel-size") == "2"
    assert value(words, "--gpu-memory-utilization") == "0.5000"
    assert "--enable-sleep-mode" in words
    assert words.count("--max-num-seqs") == 1
    assert value(words, "--max-num-seqs") == "64"
    assert "--sleep-level" not in words, "ours, not vLLM's"
    assert value(words, "--uds").startswith(str(tmp_path))


def test_vllm_guesses_ahead_when_asked(tmp_path: Path) -> None:
    words = command(VllmDriver, tmp_path, engine_args=(("speculative_tokens", "4"),))
    assert json.loads(value(words, "--speculative-config")) == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 4,
    }
    assert "--speculative-tokens" not in words
    assert "--speculative-config" not in command(VllmDriver, tmp_path)


def test_vllm_loads_by_what_is_installed_beside_it(tmp_path: Path) -> None:
    assert value(command(VllmDriver, tmp_path), "--load-format") == "auto"
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    (packages / "fastsafetensors").mkdir(parents=True)
    assert value(command(VllmDriver, tmp_path), "--load-format") == "fastsafetensors"
    (packages / "runai_model_streamer").mkdir()
    assert value(command(VllmDriver, tmp_path), "--load-format") == "runai_streamer"


def test_vllm_on_a_cpu_is_not_asked_for_what_it_refuses(tmp_path: Path) -> None:
    words = command(VllmDriver, tmp_path, Accelerator("cpu-0", "cpu", 64 * GIB))
    assert "--enable-sleep-mode" not in words
    assert "--gpu-memory-utilization" not in words


def test_sglang_and_trtllm_listen_on_loopback_only(tmp_path: Path) -> None:
    for kind in (SglangDriver, TrtllmDriver):
        words = command(kind, tmp_path)
        assert value(words, "--host") == "127.0.0.1"
        assert 1024 < int(value(words, "--port")) < 65_536
    assert "--enable-memory-saver" in command(SglangDriver, tmp_path)


def test_trtllm_sleeps_only_where_its_version_can(tmp_path: Path) -> None:
    def driver() -> TrtllmDriver:
        lifeline = Lifeline()
        lifeline.close()
        program = Program((str(tmp_path / "bin" / "trtllm-serve"),))
        return TrtllmDriver(program, directory=tmp_path / "run", lifeline=lifeline)

    assert not driver().sleeps
    assert "no sleep" in driver().why_not or not driver().sleeps
    arguments = tmp_path / "lib" / "python3.12" / "site-packages" / "tensorrt_llm" / "llmapi" / "llm_args.py"
    arguments.parent.mkdir(parents=True)
    arguments.write_text("    enable_sleep: bool = False\n")
    assert driver().sleeps
    assert '"enable_sleep": true' in Path(value(command(TrtllmDriver, tmp_path), "--extra_llm_api_options")).read_text()


def test_llama_server_gets_a_context_for_each_slot(tmp_path: Path) -> None:
    words = command(LlamaDriver, tmp_path, engine_args=(("flash_attn", "on"),))
    assert value(words, "--ctx-size") == str(8_192 * 12)
    assert value(words, "--parallel") == "12"
    assert value(words, "--gpu-layers") == "all"
    assert value(words, "--flash-attn") == "on"


def test_secrets_of_ours_stay_here_and_the_right_gpus_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "TIDEGATE_DATABASE_URL", "DB_PASSWORD"):
        monkeypatch.setenv(name, "xyzzy")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/cuda/lib64")
    seen = child_environment({"VLLM_SERVER_DEV_MODE": "1"}, order())
    assert "xyzzy" not in seen.values()
    assert seen["LD_LIBRARY_PATH"] == "/opt/cuda/lib64"
    assert seen["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert seen["VLLM_SERVER_DEV_MODE"] == "1"


def test_a_program_that_is_not_there_is_a_fault_with_its_name(tmp_path: Path) -> None:
    async def main() -> None:
        lifeline = Lifeline()
        driver = VllmDriver(Program.find(["no-such-vllm"]), directory=tmp_path, lifeline=lifeline)
        with pytest.raises(EngineFault, match="vLLM is not installed"):
            await driver.start(order())
        lifeline.close()

    asyncio.run(main())


@pytest.mark.e2e
def test_vllm_level_2_reloads_weights(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests import models
    from tidegate.engines.inspect import FileInspector

    async def main() -> None:
        lifeline = Lifeline()
        driver = standin_driver("vllm", tmp_path, lifeline)
        profile = FileInspector().inspect(str(models.llama(**SHAPE, dtype="bfloat16")))
        cpu = Accelerator("cpu-0", "cpu", GIB)
        engine = await driver.start(order(cpu, model=profile, engine_args=(("sleep_level", "2"),)))
        assert isinstance(engine, VllmEngine)
        try:
            await engine.ready()
            first = await engine.canary()
            await engine.sleep()
            await engine.wake()
            assert await engine.canary() == first
        finally:
            await engine.stop()
            lifeline.close()

    asyncio.run(main())


def test_on_a_gpu_an_engine_that_holds_nothing_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that does not see the host's process numbers: awake and 0 bytes cannot both be."""
    from tidegate.engines import served

    monkeypatch.setattr(served, "gpu_held_by", lambda _pids: 0)

    async def main() -> None:
        lifeline = Lifeline()
        process = Process.start(["/bin/sh", "-c", "sleep 30"], lifeline=lifeline)
        driver = VllmDriver(Program(("/bin/sh",)), directory=tmp_path, lifeline=lifeline)
        engine = driver.engine(order(), process, f"unix:{tmp_path / 's'}", deque())
        with pytest.raises(EngineFault, match="process ids"):
            await engine.memory()
        await engine.stop()
        lifeline.close()

    asyncio.run(main())


def test_the_reason_of_a_failed_start_is_its_complaint_without_paths(tmp_path: Path) -> None:
    async def main() -> None:
        lifeline = Lifeline()
        script = 'echo "loading"; echo "ERROR: cannot open /srv/tenants/acme/model.gguf: bad magic"; exit 3'
        tail: deque[str] = deque(maxlen=5)
        from tidegate.engines.logs import LogRing

        logs = LogRing(tmp_path / "log")
        process = Process.start(["/bin/sh", "-c", script], logs=logs, lifeline=lifeline, tail=tail)
        driver = VllmDriver(Program(("/bin/sh",)), directory=tmp_path, lifeline=lifeline)
        engine = driver.engine(order(), process, f"unix:{tmp_path / 's'}", tail)
        await process.exited()
        await asyncio.sleep(0.05)  # its last words are read by the loop
        with pytest.raises(EngineFault) as fault:
            await engine.ready()
        assert "exit code 3 before it was ready: ERROR: cannot open model.gguf: bad magic" in fault.value.reason
        await engine.stop()
        logs.close()
        lifeline.close()

    asyncio.run(main())
