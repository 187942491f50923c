"""Which engine an endpoint may ask for, and with which arguments: refused by name, value and what is accepted."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tidegate.assemble.engines import FOREIGN, traits
from tidegate.config import load
from tidegate.control.catalog import entry
from tidegate.control.deployments import Facts, deployment
from tidegate.control.engines import BUILTIN, ENGINES, LLAMACPP, REMOTE, VLLM
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Deployment, ModelKind, ModelProfile
from tidegate.domain.errors import Refusal
from tidegate.domain.fleet import Accelerator
from tidegate.wire.admin import EndpointApply

SETTINGS = ControlSettings(
    engines={
        "builtin": BUILTIN,
        "llamacpp": LLAMACPP,
        "vllm": VLLM,
        "sglang": replace(ENGINES["sglang"], missing="sglang is not on PATH: install SGLang"),
        "remote": REMOTE,
    }
)
CPU = (Accelerator("cpu-0", "cpu", 1 << 34),)


def make(engine: str, source: str = "/models/m", **arguments: str) -> Deployment:
    model = ModelProfile(source, "d", ModelKind.GENERATIVE, 1 << 30, 1 << 10, 4_096)
    body = EndpointApply(model=source, engine=engine, engine_args=arguments)
    return deployment("acme/chat", body, model, Facts(), SETTINGS, 1)


@pytest.mark.parametrize(
    ("engine", "source", "arguments", "param", "words"),
    [
        ("sglang", "/m", {}, "engine", "sglang is not on PATH: install SGLang"),
        ("magic", "/m", {}, "engine", "one of builtin, llamacpp, remote, vllm"),
        ("llamacpp", "/m", {}, "engine", "a GGUF file"),
        ("vllm", "/m.gguf", {}, "engine", "safetensors"),
        ("builtin", "/m.GGUF", {}, "engine", "safetensors"),
        ("vllm", "/m", {"trust_remote_code": "true"}, "engine_args.trust_remote_code", "arguments block_size"),
        ("vllm", "/m", {"host": "0.0.0.0"}, "engine_args.host", "arguments"),
        ("vllm", "/m", {"max_num_seqs": "0"}, "engine_args.max_num_seqs", "values like"),
        ("vllm", "/m", {"max_num_seqs": "8 --host 0.0.0.0"}, "engine_args.max_num_seqs", "values like"),
        ("vllm", "/m", {"sleep_level": "3"}, "engine_args.sleep_level", "values like"),
        ("llamacpp", "/m.gguf", {"model": "/etc/passwd"}, "engine_args.model", "arguments"),
    ],
)
def test_what_is_refused(engine: str, source: str, arguments: dict[str, str], param: str, words: str) -> None:
    with pytest.raises(Refusal) as refused:
        make(engine, source, **arguments)
    assert refused.value.param == param
    assert words in refused.value.message


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_no_argument_opens_ports_reads_files_or_runs_code(name: str) -> None:
    """Values are counts, shares and words of a list: no pattern lets a slash, a space or an option through."""
    for argument, pattern in ENGINES[name].arguments.items():
        assert not re.search("host|port|path|file|dir|trust|remote|url|key|template|plugin", argument), argument
        for hostile in ("/etc/passwd", "8 --port 1", "--port", "a,b", "http://x", "$(id)", ""):
            assert not re.fullmatch(pattern, hostile), (argument, hostile)


def test_workspace_and_metering_are_the_engines() -> None:
    assert make("llamacpp", "/m.gguf").accelerator_bytes - make("builtin").accelerator_bytes > 200 << 20
    told: dict[str, Any] = {e: entry(make(e, s), SETTINGS) for e, s in (("vllm", "/m"), ("llamacpp", "/m.gguf"))}
    assert (told["vllm"].metering, told["vllm"].cache_salt) == ("usage_continuous", True)
    assert (told["llamacpp"].metering, told["llamacpp"].cache_salt) == ("timings", False)


def test_programs_are_found_by_name_or_as_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nowhere = traits(load(), CPU)
    assert all("not on PATH" in nowhere[name].missing for name in FOREIGN)
    assert not nowhere["builtin"].missing
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "llama-server").chmod(0o700)
    assert not traits(load(), CPU)["llamacpp"].missing
    wrong = traits(load(overrides={"engine": {"programs": {"vllm": "/opt/none/bin/vllm"}}}), CPU)
    assert "/opt/none/bin/vllm" in wrong["vllm"].missing
