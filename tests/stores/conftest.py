"""Databases to run the same tests on: SQLite always, PostgreSQL on a server of our own where it is installed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text

from tidegate.stores.database import migrate, open_database

POSTGRES_USER = "postgres"


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[Path]:
    """Directory of the socket of a PostgreSQL server started for this run, listening nowhere else."""
    programs = [Path(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which("pg_ctl", path=os.pathsep.join([*map(str, programs), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip("PostgreSQL is not installed: the same tests run on SQLite only")
    pg_ctl = Path(found).resolve()
    home = Path(tempfile.mkdtemp(prefix="tidegate-pg-"))
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["runuser", "-u", POSTGRES_USER, "--"]
        os.chown(home, pwd.getpwnam(POSTGRES_USER).pw_uid, -1)
    data = home / "data"

    def run(*command: str) -> None:
        subprocess.run([*as_user, *command], cwd=home, check=True, stdout=subprocess.DEVNULL, timeout=60)

    try:
        run(str(pg_ctl.parent / "initdb"), "-D", str(data), "-A", "trust", "-U", POSTGRES_USER, "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync=off"
        run(str(pg_ctl), "-D", str(data), "-l", str(home / "log"), "-o", options, "-w", "start")
        try:
            yield home
        finally:
            run(str(pg_ctl), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home)


@pytest.fixture(params=["sqlite", "postgresql"])
def sql_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An empty, migrated database of each kind."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'tidegate.db'}"
    else:
        socket = request.getfixturevalue("postgres_socket")
        server = f"postgresql+psycopg://{POSTGRES_USER}@/{{}}?host={socket}"
        name = f"test_{os.urandom(6).hex()}"
        admin = create_engine(server.format("postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        url = server.format(name)
    engine = open_database(url)
    migrate(engine)
    yield engine
    engine.dispose()
