"""Real processes: the template forks engines, engines end with the lifeline, failures have their exit codes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import models
from tidegate.torch_engine import faults

pytestmark = pytest.mark.e2e
WAIT_S_MAX = 120.0


def until(true: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S_MAX
    while True:
        if value := true():
            return value
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def state(path: Path) -> dict[str, Any] | None:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://engine", timeout=30) as client:
            return client.get("/control/state").json()  # type: ignore[no-any-return]
    except httpx.TransportError:
        return None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class Template:
    process: subprocess.Popen[bytes]
    path: Path
    hold: int

    def ask(self, line: bytes) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_S_MAX)
            connection.connect(str(self.path))
            connection.sendall(line)
            return json.loads(connection.makefile().readline())  # type: ignore[no-any-return]

    def fork(self, model: Path, path: Path, **fields: Any) -> int:
        order = {"model": str(model), "socket": str(path), "threads": 1, **fields}
        return int(self.ask(json.dumps(order).encode() + b"\n")["pid"])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Template]:
    path = tmp_path_factory.mktemp("t") / "template.sock"
    lifeline, hold = os.pipe()
    argv = [sys.executable, "-m", "tidegate.torch_engine.template", "--socket", str(path), "--lifeline", str(lifeline)]
    process = subprocess.Popen(argv, pass_fds=[lifeline])
    os.close(lifeline)
    until(lambda: path.exists() or process.poll() is not None)
    yield Template(process, path, hold)
    os.close(hold)
    assert process.wait(WAIT_S_MAX) == 0


def test_forked_engines_serve_and_know_nothing_of_the_template(template: Template, tmp_path: Path) -> None:
    paths = [tmp_path / "a.sock", tmp_path / "b.sock"]
    pids = [
        template.fork(model, path) for model, path in zip((models.llama(), models.bert_embedding()), paths, strict=True)
    ]
    kinds = [until(lambda p=path: (s := state(p)) and s["state"] == "ready" and s)["kind"] for path in paths]
    assert kinds == ["generative", "embedding"]
    sockets = [os.readlink(f"/proc/{pids[0]}/fd/{fd}") for fd in os.listdir(f"/proc/{pids[0]}/fd")]
    template_sockets = {
        os.readlink(f"/proc/{template.process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{template.process.pid}/fd")
    }
    shared = {s for s in sockets if s.startswith("socket:")} & template_sockets
    assert not shared
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        until(lambda p=pid: not alive(p))
    assert not any(path.exists() for path in paths)
    assert len(os.listdir(f"/proc/{template.process.pid}/task")) == 1


@pytest.mark.parametrize("line", [b"{}\n", b"nonsense\n", b"[]\n", b'{"model": "m", "socket": "s", "x": 1}\n'])
def test_bad_orders_are_answered_and_fork_nothing(template: Template, line: bytes) -> None:
    assert "error" in template.ask(line)


def test_a_model_that_cannot_be_served_says_why_and_ends(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    pid = template.fork(tmp_path / "nowhere", path)
    failed = until(lambda: (s := state(path)) and s["state"] == "failed" and s)
    assert failed["reason"] == "the model directory does not exist"
    until(lambda: not alive(pid))


def test_engines_outlive_the_template_but_not_the_lifeline(tmp_path: Path) -> None:
    lifeline, hold = os.pipe()
    path = tmp_path / "template.sock"
    argv = [sys.executable, "-m", "tidegate.torch_engine.template", "--socket", str(path), "--lifeline", str(lifeline)]
    process = subprocess.Popen(argv, pass_fds=[lifeline])
    os.close(lifeline)
    until(lambda: path.exists() or process.poll() is not None)
    own = Template(process, path, hold)
    pid = own.fork(models.llama(), tmp_path / "a.sock")
    until(lambda: (s := state(tmp_path / "a.sock")) and s["state"] == "ready")
    process.kill()
    process.wait(WAIT_S_MAX)
    assert state(tmp_path / "a.sock") is not None
    os.close(hold)
    until(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("model", "extra", "code", "said"),
    [
        ("nowhere", [], faults.EXIT_MODEL, "does not exist"),
        ("llama", ["--memory-bytes", "1000"], faults.EXIT_MEMORY, "does not fit"),
    ],
)
def test_a_direct_start_that_fails(tmp_path: Path, model: str, extra: list[str], code: int, said: str) -> None:
    folder = models.llama() if model == "llama" else tmp_path / model
    argv = [
        sys.executable,
        "-m",
        "tidegate.torch_engine",
        "--model",
        str(folder),
        "--socket",
        str(tmp_path / "s"),
        *extra,
    ]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=WAIT_S_MAX, check=False)
    assert ended.returncode == code
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
