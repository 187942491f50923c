"""Starts the whole platform for a test: real processes and sockets, its own data directory; ends what it started."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from typer.testing import CliRunner

from tidegate.cli.app import app

START_S_MAX = 60.0


@dataclass
class Platform:
    """A running `tidegate up`. `admin` and `api` are HTTP clients with the two keys it printed."""

    process: subprocess.Popen[bytes]
    directory: Path
    ready: dict[str, Any]

    @property
    def base_url(self) -> str:
        return str(self.ready["base_url"])

    def admin(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.base_url, headers={"authorization": f"Bearer {self.ready['admin_key']}"}, timeout=60
        )

    def gateways(self) -> list[psutil.Process]:
        return [p for p in self.children() if "tidegate.assemble.gateway" in _command(p)]

    def engines(self) -> list[psutil.Process]:
        """Forked from the template, so they carry its command line; it is a child of ours, they are not."""
        return [
            p
            for p in self.children()
            if "tidegate.torch_engine.template" in _command(p) and _parent(p) != self.process.pid
        ]

    def children(self) -> list[psutil.Process]:
        """Every process this platform started: only ever its own."""
        return sorted(psutil.Process(self.process.pid).children(recursive=True), key=lambda p: p.pid)

    def crash(self) -> None:
        """SIGKILL of `up` itself, which takes everything with it; then the same command again, on the same data."""
        mine = self.children()
        self.process.kill()
        self.process.wait(10)
        _, alive = psutil.wait_procs(mine, 30)
        assert not alive, "children must end with the platform"
        (self.directory / "ready.json").unlink(missing_ok=True)
        with (self.directory / "up.log").open("ab") as log:
            self.process = subprocess.Popen(self.process.args, stdout=log, stderr=subprocess.STDOUT, env=_environment())
        wait_until(lambda: (self.directory / "ready.json").exists(), "the ready file again")

    def stop(self) -> int:
        """Ctrl-C, as a person does; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
                raise
        return self.process.returncode


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


def _parent(process: psutil.Process) -> int:
    try:
        return int(process.ppid())
    except psutil.NoSuchProcess:
        return 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(check: Any, what: str, seconds: float = START_S_MAX) -> Any:
    """Polls `check` until it returns something true; fails naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := check():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


@contextlib.contextmanager
def running(directory: Path, *arguments: str, config: str = "", port: int | None = None) -> Iterator[Platform]:
    """`tidegate up` on a free port with `config` as its TOML; everything it wrote is under `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    ready_file = directory / "ready.json"
    ready_file.unlink(missing_ok=True)
    toml = directory / "tidegate.toml"
    toml.write_text(config)
    log = (directory / "up.log").open("ab")
    command = [
        sys.executable, "-m", "tidegate", "up", "--config", str(toml), "--data-dir", str(directory / "data"),
        "--port", str(port or free_port()), "--ready-file", str(ready_file), *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
    platform = Platform(process, directory, {})
    try:

        def is_ready() -> bool:
            assert process.poll() is None, (
                f"up ended with {process.returncode}: {(directory / 'up.log').read_text()[-2000:]}"
            )
            return ready_file.exists()

        wait_until(is_ready, "the ready file")
        platform.ready = json.loads(ready_file.read_text())
        yield platform
    finally:
        log.close()
        if platform.process.poll() is None:
            platform.stop()


def joined(platform: Platform, *arguments: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """`tidegate join …` on the platform's machine, as a process of its own."""
    return joining(platform, *arguments, "--join", str(platform.directory / "data"))


def join_token(platform: Platform, role: str, name: str, region: str) -> str:
    """What `tidegate join token` prints."""
    words = ["join", "token", role, name, "--region", region, "--join", str(platform.directory / "data")]
    printed = CliRunner().invoke(app, words)
    assert printed.exit_code == 0, printed.output
    return printed.output.strip()


@contextlib.contextmanager
def joining(platform: Platform, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`tidegate join …` as a process of its own; what it prints goes to `join.log`."""
    log = (platform.directory / "join.log").open("ab")
    command = [sys.executable, "-m", "tidegate", "join", *arguments]
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=platform.directory, env=_environment()
    )
    try:
        yield process
    finally:
        log.close()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(30)
