"""A PostgreSQL server of our own for tests and benchmarks, where PostgreSQL is installed."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text

USER = "postgres"


def find_pg_ctl() -> Path | None:
    """Debian keeps the server's programs off PATH."""
    programs = map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    found = shutil.which("pg_ctl", path=os.pathsep.join([*programs, os.environ.get("PATH", "")]))
    return Path(found).resolve() if found else None


@dataclass(frozen=True, slots=True)
class Server:
    """`socket` is the directory of its Unix socket; `kill` ends all its processes at once (SIGKILL)."""

    socket: Path
    kill: Callable[[], None]
    start: Callable[[], None]

    def crash(self) -> None:
        """Dies and recovers."""
        self.kill()
        self.start()


@contextmanager
def server(pg_ctl: Path, *, fsync: bool = False) -> Iterator[Server]:
    """A server that listens on a Unix socket and nowhere else. `fsync` False is for tests only."""
    home = Path(tempfile.mkdtemp(prefix="tidegate-pg-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["runuser", "-u", USER, "--"]
        os.chown(home, pwd.getpwnam(USER).pw_uid, -1)
    data = home / "data"

    def run(*command: str) -> None:
        quiet = subprocess.DEVNULL  # the server's own log is in `home`
        subprocess.run([*as_user, *command], cwd=home, check=True, stdout=quiet, stderr=quiet, timeout=60)

    try:
        run(str(pg_ctl.parent / "initdb"), "-D", str(data), "-A", "trust", "-U", USER, "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync={'on' if fsync else 'off'}"
        control = (str(pg_ctl), "-D", str(data), "-l", str(home / "log"), "-o", options, "-m", "immediate", "-w")
        run(*control, "start")
        try:

            def kill() -> None:
                _kill(int((data / "postmaster.pid").read_text().split()[0]))

            yield Server(home, kill, lambda: run(*control, "start"))
        finally:
            run(*control, "stop")
    finally:
        shutil.rmtree(home)


def _kill(postmaster: int) -> None:
    """The server and every process of it, at once, and waits until they are gone."""
    server = psutil.Process(postmaster)
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def new_database(at: Server) -> str:
    """URL of a new, empty database on the server."""
    url = f"postgresql+psycopg://{USER}@/{{}}?host={at.socket}"
    name = f"tidegate_{os.urandom(6).hex()}"
    admin = create_engine(url.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return url.format(name)
