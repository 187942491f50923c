"""What `tidegate doctor` looks at. Each check says what it found and, where something is in the way, what to do."""

import os
import platform as machine
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from tidegate.assemble.engines import FOREIGN, program
from tidegate.assemble.sockets import StartError, listen_tcp
from tidegate.config import Config, ConfigError, load
from tidegate.domain.errors import Refusal
from tidegate.domain.units import GIB
from tidegate.engines.discover import discover

Verdict = Literal["ok", "warn", "bad"]
DISK_BYTES_MIN = 2 * GIB


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    detail: str


def examine() -> list[Check]:
    """All checks, in the order in which their failure would stop a start."""
    checks = [_python(), _kernel(), _torch()]
    try:
        config = load()
    except ConfigError as error:
        return [*checks, Check("configuration", "bad", str(error))]
    checks.append(Check("configuration", "ok", "tidegate.toml" if Path("tidegate.toml").exists() else "defaults"))
    looks: list[Callable[[Config], Check]] = [_foreign_engines, _accelerators, _memory, _data_dir, _disk, _port]
    return checks + [look(config) for look in looks]


def _python() -> Check:
    version = machine.python_version()
    return Check("python", "ok" if sys.version_info >= (3, 11) else "bad", f"{version} (3.11 or newer is needed)")


def _kernel() -> Check:
    if machine.system() != "Linux" or not hasattr(os, "pidfd_open"):
        return Check(
            "kernel", "bad", f"{machine.system()}: engines are watched through pidfds, which need Linux 5.3 or newer"
        )
    return Check("kernel", "ok", f"Linux {machine.release()}, {os.cpu_count()} cores")


def _torch() -> Check:
    try:
        return Check(
            "built-in engine",
            "ok",
            f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}",
        )
    except metadata.PackageNotFoundError as error:
        return Check("built-in engine", "bad", f"{error.name} is not installed; `make up` installs it")


def _foreign_engines(config: Config) -> Check:
    """Having none is fine; one that was configured and is not there is not."""
    found: list[str] = []
    absent: list[str] = []
    for name, foreign in FOREIGN.items():
        called = program(config, name).argv
        (found if called else absent).append(f"{name} ({' '.join(called) if called else foreign.command})")
    missing = [name for name in config.engine.programs if not program(config, name).argv]
    if missing:
        return Check("other engines", "bad", f"not found as configured: {', '.join(missing)} (engine.programs)")
    detail = f"found: {', '.join(found) or 'none'}; not on PATH: {', '.join(absent) or 'none'}"
    return Check("other engines", "ok", f"{detail}. None of them is needed")


def _accelerators(config: Config) -> Check:
    shape = config.accelerators
    try:
        found = discover(shape.kind, cpu_count=shape.count, cpu_memory_bytes=shape.memory)
    except Refusal as refusal:
        return Check("accelerators", "bad", refusal.message)
    listed = ", ".join(f"{a.id} ({a.kind}, {a.memory_bytes / GIB:.2f} GiB)" for a in found)
    return Check("accelerators", "ok", listed)


def _memory(config: Config) -> Check:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    shape = config.accelerators
    wanted = config.host_memory + (shape.count * shape.memory if shape.kind != "nvidia" else 0)
    detail = f"{available / GIB:.1f} GiB available, up to {wanted / GIB:.1f} GiB for accelerators and host memory"
    if available < wanted:
        return Check("memory", "warn", f"{detail}: lower accelerators.memory, accelerators.count or host_memory")
    return Check("memory", "ok", detail)


def _data_dir(config: Config) -> Check:
    path = config.data_dir.resolve()
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        return Check("data directory", "bad", f"{path} cannot be written; set data_dir")
    return Check("data directory", "ok", str(path))


def _disk(config: Config) -> Check:
    path = config.data_dir.resolve()
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(above).free
    detail = f"{free / GIB:.1f} GiB free for the database, journals and logs"
    return Check("disk", "ok" if free >= DISK_BYTES_MIN else "warn", detail)


def _port(config: Config) -> Check:
    try:
        listen_tcp(config.host, config.port).close()
    except StartError as error:
        return Check("port", "warn", f"{error} (fine if it is the platform itself)")
    return Check("port", "ok", f"{config.port} on {config.host} is free")
