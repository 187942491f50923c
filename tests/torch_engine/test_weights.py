"""A model directory is checked before a byte of it is used, mapped without a copy, and refused with a reason."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import models
from tidegate.torch_engine import kv, memory
from tidegate.torch_engine.faults import EXIT_MEMORY, EXIT_MODEL, EngineError, MemoryFault, ModelFault
from tidegate.torch_engine.model import load
from tidegate.torch_engine.options import Options, from_order
from tidegate.torch_engine.weights import Weights


def reason(folder: Path, **options: int) -> str:
    with pytest.raises(EngineError) as caught:
        load(Options(model=folder, socket="", threads=1, **options))  # type: ignore[arg-type]
    assert caught.value.exit_code == (EXIT_MEMORY if isinstance(caught.value, MemoryFault) else EXIT_MODEL)
    assert str(folder) not in caught.value.reason
    return caught.value.reason


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate(size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def bad_offsets(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"][1] += 4
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length :])


def without_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no header": (truncate(5), "truncated"),
    "half a header": (truncate(500), "truncated"),
    "half the data": (truncate(300_000), "truncated"),
    "zeros": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 4096) and None, "not a safetensors file"),
    "huge header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4096) and None, "not a safetensors"),
    "offsets": (bad_offsets, "impossible offsets"),
    "pickled": (pickle_only, "pickled weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]") and None, "not a JSON object"),
    "broken config": (lambda f: (f / "config.json").write_text("{") and None, "not valid JSON"),
    "custom code": (lambda f: edit_json(f / "config.json", auto_map={"AutoModel": "x.Y"}), "custom code"),
    "custom tokenizer": (lambda f: edit_json(f / "tokenizer_config.json", auto_map={"A": "x.Y"}), "custom code"),
    "quantized": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), "quantization_config"),
    "unknown kind": (lambda f: edit_json(f / "config.json", architectures=["T5ForVision"]), "T5ForVision"),
    "unknown model": (lambda f: edit_json(f / "config.json", architectures=["FooForCausalLM"]), "FooForCausalLM"),
    "other shape": (lambda f: edit_json(f / "config.json", intermediate_size=64), "shape"),
    "missing tensor": (without_a_tensor, "missing from the safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}') and None,
        "b.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_its_reason(damage: str, tmp_path: Path) -> None:
    folder = models.copy(models.llama(), tmp_path)
    act, wanted = DAMAGES[damage]
    act(folder)
    assert wanted in reason(folder)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in reason(tmp_path / "nowhere")


def test_weights_too_big_for_the_memory() -> None:
    assert "its weights have" in reason(models.llama(), memory_bytes=100_000)


def test_no_room_for_the_least_cache() -> None:
    assert "KV cache" in reason(models.llama(), memory_bytes=Weights(models.llama()).tensor_bytes + 1000)


def test_parameters_are_the_mapping_itself_and_its_pages_can_go() -> None:
    loaded = load(Options(model=models.llama(dtype="bfloat16"), socket="", threads=1))
    weights = loaded.residency._weights  # type: ignore[attr-defined]
    (file,) = weights.files
    parameters = list(loaded.runner.model.parameters())
    assert all(file.address <= p.data_ptr() < file.address + file.buffer.numel() for p in parameters)
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    before = [p.sum().item() for p in parameters]
    assert memory.mapped_bytes([file.address]) >= loaded.weight_bytes
    file.drop_pages()
    assert memory.mapped_bytes([file.address]) == memory.resident_bytes(file.address, file.buffer.numel()) == 0
    _ = file.buffer[0].item()  # one page, and what the kernel maps around it
    some = memory.mapped_bytes([file.address])
    assert 0 < some == memory.resident_bytes(file.address, file.buffer.numel())
    file.prefault(threads=3)
    assert memory.mapped_bytes([file.address]) >= loaded.weight_bytes
    assert memory.mapped_bytes([file.address]) == memory.resident_bytes(file.address, file.buffer.numel())
    assert [p.sum().item() for p in parameters] == before


def test_reading_ahead_maps_every_page_of_a_cold_file() -> None:
    folder = models.llama(hidden=256, layers=2, intermediate=512)
    file = folder / "model.safetensors"
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    weights = Weights(folder)
    assert memory.mapped_bytes([weights.files[0].address]) < file.stat().st_size // 2
    weights.read_ahead().join(30)
    assert memory.mapped_bytes([weights.files[0].address]) >= file.stat().st_size


def test_a_released_row_gives_its_pages_back() -> None:
    shape = kv.KvShape(layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)
    plan = kv.plan(shape, bytes_max=1 << 30, slots=4, context_tokens_max=1024, backed=False)
    store = kv.KvStore(shape, plan, [kv.KvPart(torch.device("cpu"), range(2))])
    assert memory.mapped_bytes(store.addresses) == 0  # room for four contexts, not a page of it backed
    row = store.take()
    store.grow(0, 1000)
    store.parts[0].data[row, :, :, :1000] = 1.0
    assert memory.mapped_bytes(store.addresses) == pytest.approx(store.used_bytes, rel=0.05)
    store.release(row, 1000)
    assert memory.mapped_bytes(store.addresses) < store.shape.row_bytes(100)
    assert store.used_bytes == 0


@pytest.mark.parametrize(
    ("bytes_max", "backed", "rows", "context"),
    [
        (1 << 30, False, 8, 1024),
        (1 << 30, True, 8, 1024),
        (3 * 2048 * 1024, True, 3, 1024),  # three whole contexts
        (3 * 2048 * 1024, False, 8, 1024),
        (2048 * 512, False, 8, 512),  # a shorter context
        (2048 * 512, True, 1, 512),
    ],
)
def test_what_fits(bytes_max: int, backed: bool, rows: int, context: int) -> None:
    shape = kv.KvShape(layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)  # 2048 bytes a token
    plan = kv.plan(shape, bytes_max=bytes_max, slots=8, context_tokens_max=1024, backed=backed)
    assert (plan.rows, plan.context_tokens_max) == (rows, context)
    assert plan.bytes_max <= bytes_max


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    shape = kv.KvShape(layers=2, kv_heads=2, head_dim=64, dtype=torch.float32)
    with pytest.raises(MemoryFault, match="1000 are left"):
        kv.plan(shape, bytes_max=1000, slots=8, context_tokens_max=1024, backed=False)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [
        ({}, "'model'"),
        ({"model": "m"}, "'socket'"),
        ({"model": "m", "socket": "s", "gpu": 1}, "'gpu'"),
        ({"model": "m", "socket": "s", "threads": "2"}, "'threads'"),
        ({"model": "m", "socket": "s", "memory_bytes": -1}, "'memory_bytes'"),
        ({"model": "m", "socket": "s", "slots": True}, "'slots'"),
    ],
)
def test_orders_are_checked(order: dict[str, object], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        from_order(order)


def test_a_pooling_we_do_not_have_is_named(tmp_path: Path) -> None:
    folder = models.copy(models.bert_embedding(), tmp_path)
    edit_json(
        folder / "1_Pooling" / "config.json", pooling_mode_mean_tokens=False, pooling_mode_weightedmean_tokens=True
    )
    assert "pooling" in reason(folder)
    with pytest.raises(ModelFault):
        load(Options(model=folder, socket=""))
