"""Adapters on a shared base, beside a model whose weights were merged with them (W + alpha ÷ r · B A) beforehand."""

import json
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.torch_engine.generation import Bench, Reference, prompt
from tests.torch_engine.serving import Serving
from tidegate.domain.errors import Refusal
from tidegate.torch_engine.adapter import digest_of, read
from tidegate.torch_engine.faults import ModelFault
from tidegate.torch_engine.lora import Lora

ADAPTERS = 5
ROOM = 8 << 20


def merged(base: Path, adapter: Path, into: Path) -> Path:
    """The base with the adapter's pairs added to its weights."""
    folder = models.copy(base, into / adapter.name)
    weights, pairs = load_file(folder / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, up in pairs.items():
        if name.endswith(".lora_B.weight"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            down = pairs[name.replace("lora_B", "lora_A")]
            weights[f"{layer}.weight"] += config["lora_alpha"] / config["r"] * up @ down
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", [models.llama, models.qwen2])
def test_a_batch_that_mixes_adapters_says_what_each_merged_model_says(family: object, tmp_path: Path) -> None:
    base = family()  # type: ignore[operator]
    adapters = [models.lora(base, seed) for seed in range(ADAPTERS)]
    bench = Bench(base, adapter_bytes_max=ROOM)
    lora = bench.loop.runner.lora
    assert lora is not None
    jobs = []
    for seed, adapter in enumerate([*adapters, None]):
        job = bench.add(prompt(9 + 7 * seed, seed))
        job.adapter = lora.take(digest_of(adapter), adapter) if adapter is not None else None
        jobs.append(job)
        bench.loop.step()  # they join one after the other: decodes and chunks of several adapters share a step
    bench.run()
    said = [bench.tokens(job) for job in jobs]
    wanted = [
        Reference(merged(base, adapter, tmp_path) if adapter is not None else base).greedy(prompt(9 + 7 * s, s), 12)
        for s, adapter in enumerate([*adapters, None])
    ]
    assert said == wanted
    plain = Reference(base)
    assert all(said[s] != plain.greedy(prompt(9 + 7 * s, s), 12) for s in range(ADAPTERS)), "adapters change nothing"
    assert bench.idle


def test_memory_for_adapters_is_bounded_and_those_in_use_stay() -> None:
    base = models.llama()
    adapters = [models.lora(base, seed) for seed in range(4)]
    model = Bench(base).loaded.runner.model  # type: ignore[union-attr]
    one = read(adapters[0], digest_of(adapters[0]), Lora(model, 1, 2)._shapes, torch.float32).nbytes
    model = Bench(base).loaded.runner.model  # type: ignore[union-attr]
    lora = Lora(model, 2 * one, 2)
    first, second = (lora.take(digest_of(a), a) for a in adapters[:2])
    with pytest.raises(Refusal) as refusal:
        lora.take(digest_of(adapters[2]), adapters[2])
    assert refusal.value.code == "capacity"
    lora.give_back(second)
    lora.take(digest_of(adapters[2]), adapters[2])
    assert lora.nbytes == 2 * one
    assert lora.take(digest_of(adapters[0]), adapters[0]) is first
    lora.forget()
    assert lora.nbytes == 0


BAD_CONFIGS = [
    ({"peft_type": "IA3"}, "plain LoRA"),
    ({"bias": "all"}, "plain LoRA"),
    ({"use_dora": True}, "use_dora"),
    ({"rank_pattern": {"q": 2}}, "rank_pattern"),
    ({"r": 0}, "damaged"),
]


@pytest.mark.parametrize(("change", "named"), BAD_CONFIGS)
def test_an_adapter_that_cannot_be_served_is_refused_by_name(
    change: dict[str, object], named: str, tmp_path: Path
) -> None:
    base = models.llama()
    adapter = models.copy(models.lora(base, 0), tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFault, match=named):
        read(adapter, digest_of(adapter), {}, torch.float32)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapter = models.lora(models.llama(hidden=128), 0)
    lora = Lora(Bench(models.llama()).loaded.runner.model, ROOM, 2)  # type: ignore[union-attr]
    with pytest.raises(ModelFault, match="for another base"):
        lora.take(digest_of(adapter), adapter)
    with pytest.raises(ModelFault, match="digest differs"):
        lora.take("0" * 64, adapter)
    shutil.copytree(adapter, tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelFault, match=r"no readable adapter_model\.safetensors"):
        digest_of(tmp_path / "half")


def test_over_the_socket_the_header_chooses_and_the_answer_says_which(tmp_path: Path) -> None:
    base = models.llama()
    adapter = models.copy(models.lora(base, 1), tmp_path / "a folder")
    digest = digest_of(adapter)
    asked = {"x-tidegate-adapter": f"{digest} {quote(str(adapter))}"}
    body = {"model": "m", "prompt": "the water", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with Serving(base, tmp_path, adapter_bytes_max=ROOM) as serving:
        plain = serving.http.post("/v1/completions", json=body)
        first = serving.http.post("/v1/completions", json=body, headers=asked)
        assert "x-tidegate-adapter" not in plain.headers
        assert first.headers["x-tidegate-adapter"] == digest
        assert first.json()["choices"] != plain.json()["choices"]
        serving.control("sleep")
        assert serving.http.post("/v1/completions", json=body, headers=asked).status_code == 503
        serving.control("wake")
        again = serving.http.post("/v1/completions", json=body, headers=asked)
        assert again.json()["choices"] == first.json()["choices"]
        with serving.http.stream("POST", "/v1/completions", json=body | {"stream": True}, headers=asked) as stream:
            stream.read()
            assert stream.headers["x-tidegate-adapter"] == digest
        wrong = serving.http.post("/v1/completions", json=body, headers={"x-tidegate-adapter": f"{'0' * 64} /none"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (503, "endpoint_failed")
        assert serving.state()["live"] == 0


def test_an_engine_without_room_for_adapters_says_so(tmp_path: Path) -> None:
    adapter = models.lora(models.llama(), 1)
    with Serving(models.llama(), tmp_path) as serving:
        answer = serving.http.post(
            "/v1/completions",
            json={"model": "m", "prompt": "the water"},
            headers={"x-tidegate-adapter": f"{digest_of(adapter)} {quote(str(adapter))}"},
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "endpoint_failed")
