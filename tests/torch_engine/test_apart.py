"""Devices with memory of their own: weights arrive stage by stage, several devices side by side, and computing follows.

`ApartDevice` does on a CPU what a GPU does; a gate in front of its copies decides what has arrived when.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import models
from tests.torch_engine.generation import Bench, prompt
from tests.torch_engine.serving import Serving
from tidegate.torch_engine import devices, loader
from tidegate.torch_engine.faults import EXIT_MEMORY, ModelFault
from tidegate.torch_engine.model import load
from tidegate.torch_engine.options import Options
from tidegate.torch_engine.stages import divide, stages_of

LAYERS = 6
WAIT_S_MAX = 60.0


def deep() -> Path:
    return models.llama(layers=LAYERS)


class Gate:
    """Lets so many pieces through, then holds every copying thread until it is opened further."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._change = threading.Condition()
        self._open, self.passed, self.fails_at = 1 << 30, 0, -1
        really = devices.move

        def move(target: torch.Tensor, source: torch.Tensor) -> None:
            with self._change:
                assert self._change.wait_for(lambda: self.passed < self._open, WAIT_S_MAX)
                self.passed += 1
                if self.passed == self.fails_at:
                    raise RuntimeError("the link broke")
            really(target, source)

        monkeypatch.setattr(devices, "move", move)

    def hold(self, after: int = 0) -> None:
        """Nothing more than so many pieces, until more are let through."""
        with self._change:
            self._open = self.passed + after

    def let(self, pieces: int) -> None:
        with self._change:
            self._open += pieces
            self._change.notify_all()

    def open(self) -> None:
        with self._change:
            self._open = 1 << 30
            self._change.notify_all()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def answer(bench: Bench) -> tuple[list[list[int]], list[int]]:
    """Two prompts in one batch, greedily; and the canary."""
    jobs = [bench.add(prompt(length, seed)) for seed, length in enumerate((9, 33))]
    bench.run()
    assert bench.idle
    return [bench.tokens(job) for job in jobs], bench.loaded.canary()


def pieces_of(bench: Bench) -> list[int]:
    """How many each stage has."""
    return [len(stage.parameters) for stage in bench.loaded.residency.stages]  # type: ignore[union-attr]


@pytest.mark.parametrize("device", ["apart", "apart:2", "apart:3"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_placement_answers_as_weights_in_place_do(device: str, tied: bool) -> None:
    folder = models.llama(layers=LAYERS, tie=tied)
    wanted = answer(Bench(folder))
    bench = Bench(folder, device=device)
    assert answer(bench) == wanted
    residency = bench.loaded.residency
    assert residency.accelerator_bytes() > 0
    bench.loaded.sleep()
    assert residency.accelerator_bytes() == 0
    residency.wake()
    assert answer(bench) == wanted


def test_encoders_run_apart_too() -> None:
    for make in (models.bert_embedding, models.bert_classifier):
        here, apart = (load(Options(model=make(), socket="", threads=1, device=d)) for d in ("cpu", "apart"))
        apart.sleep()
        apart.residency.wake()
        assert apart.canary() == here.canary()


def test_a_wake_returns_at_once_and_the_forward_follows_the_weights(gate: Gate) -> None:
    bench = Bench(deep(), device="apart")
    wanted, counts = bench.loaded.canary(), pieces_of(bench)
    bench.loaded.sleep()
    gate.hold()
    bench.loaded.residency.wake()  # nothing has been copied, and it is back
    ran = _layers_run(bench)
    found: list[list[int]] = []
    forward = threading.Thread(target=lambda: found.append(bench.loaded.canary()))
    forward.start()
    for arrived in range(1, LAYERS + 1):  # the embeddings, then a layer more each time
        gate.let(counts[arrived - 1])
        ran.until(arrived - 1)
    assert ran.count == LAYERS - 1, "the last layer's weights are not there"
    assert not found
    gate.open()
    forward.join(WAIT_S_MAX)
    assert found == [wanted]


class _Run:
    def __init__(self) -> None:
        self.count, self._more = 0, threading.Condition()

    def one(self, *_: Any) -> None:
        with self._more:
            self.count += 1
            self._more.notify_all()

    def until(self, count: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: self.count >= count, WAIT_S_MAX), f"{self.count} layers of {count}"


def _layers_run(bench: Bench) -> _Run:
    """Counts the layers that forwards have come through from now on."""
    run = _Run()
    for stage in bench.loaded.residency.stages:  # type: ignore[union-attr]
        if stage.layer >= 0:
            stage.module.register_forward_hook(run.one)
    return run


def test_requests_come_in_while_weights_arrive(gate: Gate, tmp_path: Path) -> None:
    with Serving(deep(), tmp_path, device="apart") as engine:
        wanted = [engine.complete(prompt=words, max_tokens=6, temperature=0) for words in ("the water", "long way")]
        engine.control("drain")
        engine.control("sleep")
        gate.hold(after=3)
        engine.control("wake")
        assert engine.state()["state"] == "ready"
        found: dict[str, dict[str, Any]] = {}

        def ask(words: str) -> None:
            found[words] = engine.complete(prompt=words, max_tokens=6, temperature=0)

        asking = [threading.Thread(target=ask, args=(words,)) for words in ("the water", "long way")]
        for thread in asking:
            thread.start()
        engine.until(lambda: engine.state()["live"] == 2)
        assert not found
        gate.open()
        for thread in asking:
            thread.join(WAIT_S_MAX)
        for words, before in zip(("the water", "long way"), wanted, strict=True):
            assert found[words]["choices"] == before["choices"]


def test_told_to_sleep_while_weights_arrive_it_lets_them_go(gate: Gate) -> None:
    bench = Bench(deep(), device="apart:2")
    wanted = bench.loaded.canary()
    bench.loaded.sleep()
    before = gate.passed
    gate.hold(after=4)
    bench.loaded.residency.wake()
    threading.Timer(0.05, gate.open).start()  # the piece under way ends; none after it begins
    bench.loaded.sleep()
    assert gate.passed - before < sum(pieces_of(bench))
    assert bench.loaded.residency.accelerator_bytes() == 0
    bench.loaded.residency.wake()
    assert bench.loaded.canary() == wanted


def test_a_copy_that_fails_fails_the_forward_that_needs_it(gate: Gate) -> None:
    bench = Bench(deep(), device="apart")
    wanted = bench.loaded.canary()
    bench.loaded.sleep()
    gate.fails_at = gate.passed + 20  # in some layer: those before it are there
    bench.loaded.residency.wake()
    ran = _layers_run(bench)
    with pytest.raises(RuntimeError, match="did not arrive"):
        bench.loaded.canary()
    assert 0 < ran.count < LAYERS
    gate.fails_at = -1
    bench.loaded.sleep()
    bench.loaded.residency.wake()
    assert bench.loaded.canary() == wanted


def test_several_devices_fill_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(deep(), device="apart:3")
    wanted = bench.loaded.canary()
    bench.loaded.sleep()
    together, really = threading.Barrier(3), devices.move
    met: set[int] = set()

    def move(target: torch.Tensor, source: torch.Tensor) -> None:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            together.wait(WAIT_S_MAX)  # passes only when all three are copying at once
        really(target, source)

    monkeypatch.setattr(devices, "move", move)
    bench.loaded.residency.wake()
    assert bench.loaded.canary() == wanted
    assert len(met) == 3


@pytest.mark.parametrize(("sides", "layers"), [(1, 6), (2, 6), (3, 6), (6, 6), (2, 2)])
def test_stages_are_divided_into_runs_of_about_equal_bytes(sides: int, layers: int) -> None:
    folder = models.llama(layers=layers, hidden=128, intermediate=512)
    from tidegate.torch_engine.weights import Weights

    model = loader.build(loader.inspect(folder), Weights(folder))
    stages = stages_of(model)
    divide(stages, sides)
    assert [stage.side for stage in stages] == sorted(stage.side for stage in stages)
    assert {stage.side for stage in stages if stage.layer >= 0} == set(range(sides))
    assert sum(stage.nbytes for stage in stages) == sum(p.numel() * p.element_size() for p in model.parameters())
    share = [sum(stage.nbytes for stage in stages if stage.side == side) for side in range(sides)]
    assert max(share) <= sum(share) / sides + max(stage.nbytes for stage in stages)


REFUSED: dict[str, tuple[Callable[[], Path], dict[str, Any], str]] = {
    "more devices than layers": (models.llama, {"device": "apart:4"}, "not enough layers"),
    "an encoder": (models.bert_embedding, {"device": "apart:2"}, "several accelerators"),
    "adapters": (deep, {"device": "apart:2", "adapter_bytes_max": 1 << 20}, "several accelerators"),
    "unknown": (deep, {"device": "cuda:0,tpu"}, "no such device"),
    "unknown alone": (deep, {"device": "mps"}, "no such device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_placed_is_refused(case: str) -> None:
    make, options, words = REFUSED[case]
    with pytest.raises(ModelFault, match=words):
        load(Options(model=make(), socket="", threads=1, **options))


def test_a_wake_without_room_ends_the_engine_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Serving(deep(), tmp_path, device="apart") as engine:
        engine.control("sleep")
        monkeypatch.setattr(devices.memory, "available_bytes", lambda: 1_000)
        answer = engine.http.post("/control/wake")
        assert answer.status_code == 503
        assert "could not be had" in answer.json()["error"]["message"]
        assert engine.state()["state"] == "failed"
        assert engine.life.exit_code == EXIT_MEMORY


class _Cuda:
    """`torch.cuda` as far as ordering copies goes: it writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self._made = 0

    def Stream(self, place: torch.device) -> "_Stream":
        return _Stream("side", self)

    def current_stream(self, place: torch.device) -> "_Stream":
        return _Stream("current", self)

    @contextlib.contextmanager
    def stream(self, stream: "_Stream") -> Iterator[None]:
        self.told.append(("begin", stream.name))
        yield
        self.told.append(("end", stream.name))

    def Event(self) -> Any:
        self._made += 1
        name, told = f"event {self._made}", self.told
        return SimpleNamespace(name=name, record=lambda stream: told.append(("record", name, stream.name)))


class _Stream:
    def __init__(self, name: str, cuda: _Cuda) -> None:
        self.name, self._cuda = name, cuda

    def wait_stream(self, other: "_Stream") -> None:
        self._cuda.told.append(("wait", self.name, other.name))

    def wait_event(self, event: Any) -> None:
        self._cuda.told.append(("wait", self.name, event.name))


def test_cuda_is_told_to_copy_beside_the_kernels_and_to_wait_for_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda()
    for name in ("Stream", "current_stream", "stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    device = devices.CudaDevice(0)
    sources = [torch.full((8,), n, dtype=torch.uint8) for n in range(3)]
    targets = [torch.zeros(8, dtype=torch.uint8) for _ in sources]
    pieces = list(zip(targets, sources, strict=True))
    first, second = device.fill([pieces[:2], pieces[2:]])
    assert cuda.told == [
        ("wait", "side", "current"),  # memory that kernels may still be using is not overwritten
        ("begin", "side"),
        ("record", "event 1", "side"),
        ("record", "event 2", "side"),
        ("end", "side"),
    ]
    assert all(torch.equal(target, source) for target, source in pieces)
    del cuda.told[:]
    second()
    first()
    assert cuda.told == [("wait", "current", "event 2"), ("wait", "current", "event 1")]
