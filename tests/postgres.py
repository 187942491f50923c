"""A PostgreSQL server of our own for tests and benchmarks, where PostgreSQL is installed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

USER = "postgres"


def find_pg_ctl() -> Path | None:
    """Debian keeps the server's programs off PATH."""
    programs = map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    found = shutil.which("pg_ctl", path=os.pathsep.join([*programs, os.environ.get("PATH", "")]))
    return Path(found).resolve() if found else None


@contextmanager
def server(pg_ctl: Path, *, fsync: bool = False) -> Iterator[Path]:
    """Directory of the Unix socket of a server that listens nowhere else. `fsync` False is for tests only."""
    home = Path(tempfile.mkdtemp(prefix="tidegate-pg-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["runuser", "-u", USER, "--"]
        os.chown(home, pwd.getpwnam(USER).pw_uid, -1)
    data = home / "data"

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], cwd=home, check=True, stdout=subprocess.DEVNULL, timeout=60)

    try:
        run(str(pg_ctl.parent / "initdb"), "-D", str(data), "-A", "trust", "-U", USER, "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync={'on' if fsync else 'off'}"
        run(str(pg_ctl), "-D", str(data), "-l", str(home / "log"), "-o", options, "-w", "start")
        try:
            yield home
        finally:
            run(str(pg_ctl), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home)


def new_database(socket: Path) -> str:
    """URL of a new, empty database on the server."""
    url = f"postgresql+psycopg://{USER}@/{{}}?host={socket}"
    name = f"tidegate_{os.urandom(6).hex()}"
    admin = create_engine(url.format("postgres"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return url.format(name)
