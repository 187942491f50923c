"""How foreign engines are started: their programs found, their command line and environment made, a guarded process."""

import hashlib
import os
import re
import shutil
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tidegate.domain.errors import EngineFault
from tidegate.domain.ports import StartOrder
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Lifeline, Process
from tidegate.engines.served import ServedEngine, ServedLimits, SleepWorth

TAIL_LINES_MAX = 50
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Program:
    """How an engine's program is called: `argv` begins the command line. Empty where it was not found."""

    argv: tuple[str, ...] = ()

    @classmethod
    def find(cls, command: Sequence[str]) -> "Program":
        """`command` with its first word found on PATH; not found: an empty one."""
        path = shutil.which(command[0]) if command else None
        return cls((path, *command[1:]) if path else ())


class ServedDriver(ABC):
    """Implements `EngineDriver`. `directory` is for sockets and must be this user's alone."""

    name = ""

    def __init__(
        self,
        program: Program,
        *,
        directory: Path,
        lifeline: Lifeline,
        threads: int = 1,
        logs: LogRing | None = None,
        limits: ServedLimits = ServedLimits(),
    ) -> None:
        self.program, self.directory, self.threads, self.limits = program, directory, threads, limits
        self.worth = SleepWorth()
        self._lifeline, self._logs = lifeline, logs

    @property
    def sleeps(self) -> bool:
        """Until it was tried, yes: the first engine tries before it serves."""
        return self.worth.proven is not False

    @property
    def why_not(self) -> str:
        return self.worth.why

    @abstractmethod
    def command(self, order: StartOrder, address: str) -> list[str]: ...

    @abstractmethod
    def engine(self, order: StartOrder, process: Process, address: str, tail: deque[str]) -> ServedEngine: ...

    def environment(self, order: StartOrder) -> dict[str, str]:
        """Added to this process's own, from which everything that looks like a secret is left out."""
        return {}

    def address(self, order: StartOrder) -> str:
        """A Unix socket only this user can open: an engine's control API must not be reachable by anyone else."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"engine-{hashlib.sha256(order.replica.encode()).hexdigest()[:16]}.sock"
        path.unlink(missing_ok=True)
        return f"unix:{path}"

    async def start(self, order: StartOrder) -> ServedEngine:
        if not self.program.argv:
            raise EngineFault(f"{self.name} is not installed on this node")
        address = self.address(order)
        tail: deque[str] = deque(maxlen=TAIL_LINES_MAX)
        process = Process.start(
            [*self.program.argv, *self.command(order, address)],
            logs=self._logs,
            environment=child_environment(self.environment(order), order),
            lifeline=self._lifeline,
            tail=tail,
        )
        return self.engine(order, process, address, tail)

    async def close(self) -> None:
        """Nothing to end: its engines are the supervisor's to stop."""
        return


def free_port() -> int:
    """A loopback port nobody listens on, for engines that cannot listen on a Unix socket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def arguments_of(order: StartOrder, leave_out: Collection[str] = ()) -> list[str]:
    """An endpoint's `engine_args` as command-line options: ``{"max_num_seqs": "8"}`` → ``--max-num-seqs 8``."""
    options: list[str] = []
    for name, value in order.deployment.engine_args:
        if name not in leave_out:
            options += ["--" + name.replace("_", "-"), *([] if value == "true" else [value])]
    return options


def child_environment(added: Mapping[str, str], order: StartOrder) -> dict[str, str]:
    """Ours without what looks like a secret, plus `added`, plus which GPUs are the replica's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_") and not _SECRET.search(k)}
    gpus = [a.id.removeprefix("gpu-") for a in order.accelerators if a.kind != "cpu"]
    return kept | {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}) | dict(added)
