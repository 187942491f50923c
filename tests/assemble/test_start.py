"""What happens around a start: sockets, the data directory, keys that survive, prices that are not undone."""

import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tidegate.assemble.credentials import FILE, Credentials, ensure, write_private
from tidegate.assemble.declared import set_prices
from tidegate.assemble.folders import _File, take
from tidegate.assemble.ground import Ground, prepare
from tidegate.assemble.machine import engine_threads
from tidegate.assemble.settings import core_settings, gateway_limits, node_limits
from tidegate.assemble.sockets import StartError, listen_tcp, listen_unix, public_url
from tidegate.config import Config, load, socket_directory
from tidegate.control.keys import digest
from tidegate.domain.fleet import Accelerator
from tidegate.domain.ports import Change
from tidegate.domain.units import nano_usd_per_token

NOW_MS = 1_800_000_000_000
SECRET = "tg-chosen-by-the-operator"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def configured(tmp_path: Path, toml: str = "") -> Config:
    file = tmp_path / "test.toml"
    file.write_text(toml)
    return load(file, {"data_dir": tmp_path / "data"})


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    with _opened(configured(tmp_path)) as opened:
        yield opened


class _opened:
    """`take` and `prepare` as a plain context manager."""

    def __init__(self, config: Config) -> None:
        self._config, self._stack = config, AsyncExitStack()

    def __enter__(self) -> Ground:
        return prepare(self._config, take(self._config, self._stack, log_name="platform.log"), self._stack)

    def __exit__(self, *_: object) -> None:
        import asyncio

        asyncio.run(self._stack.aclose())


# --- sockets ------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_named() -> None:
    with listen_tcp("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"port {port} on 127.0.0.1 is in use"):
            listen_tcp("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(StartError, match=r"203\.0\.113\.1"):
        listen_tcp("203.0.113.1", 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1"), ("0.0.0.0", "http://127.0.0.1"), ("localhost", "http://localhost")],
)
def test_the_url_a_person_can_open(host: str, url: str) -> None:
    with listen_tcp(host, 0) as listener:
        assert public_url(listener, host) == f"{url}:{listener.getsockname()[1]}"


def test_unix_sockets_are_private_and_replace_dead_ones(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listen_unix(path).close()
    with listen_unix(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


# --- data directory -----------------------------------------------------------------------------------------------


def test_two_platforms_never_share_a_data_directory(ground: Ground, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="another platform uses"), _opened(configured(tmp_path)):
        pass


def test_sockets_of_a_platform_that_was_killed_are_gone(tmp_path: Path) -> None:
    config, elsewhere = configured(tmp_path), tmp_path / f"tidegate-{os.getuid()}-1"
    for run in (socket_directory(config), elsewhere):
        run.mkdir(parents=True, exist_ok=True)
        listen_unix(run / "engine-0123.sock").close()
    link = tmp_path / "data" / "run"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():  # where the path is too long for sockets, as it usually is here
        link.symlink_to(elsewhere)
    with _opened(config) as ground:
        assert not list(ground.run.glob("engine-*"))
        assert link.resolve() == ground.run
        assert link == ground.run or not elsewhere.exists()


def test_a_full_disk_costs_lines_of_the_log_and_one_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    file = _File("/dev/full")
    for number in range(3):
        file.emit(logging.LogRecord("tidegate", logging.INFO, "", 0, "line %d", (number,), None))
    assert capfd.readouterr().err == "lines of /dev/full are lost: No space left on device\n"
    file.stream = None  # what it could not write it would try again on the way out


def test_the_data_directory_is_private(ground: Ground) -> None:
    folders = [ground.data, ground.run, ground.logs, ground.journal]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 4


def test_a_data_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file is in the way")
    with pytest.raises(StartError, match="cannot be used"), _opened(configured(tmp_path)):
        pass


# --- keys ---------------------------------------------------------------------------------------------------------


def secrets_of(made: Credentials) -> set[str]:
    return {made.admin_key, *made.api_keys.values()}


def test_a_first_start_makes_keys_and_a_second_finds_them(ground: Ground, tmp_path: Path) -> None:
    config = configured(tmp_path)
    first = ensure(ground.state, config, ground.data, NOW_MS)
    assert list(first.api_keys) == ["demo"]
    assert first.demo_is_new
    state = ground.state.load()
    assert {key.digest for key in state.keys} == {digest(secret) for secret in secrets_of(first)}
    second = ensure(ground.state, config, ground.data, NOW_MS + 1)
    assert secrets_of(second) == secrets_of(first)
    assert ground.state.load().version == state.version


def test_secrets_are_kept_privately_and_only_there(ground: Ground, tmp_path: Path) -> None:
    made = ensure(ground.state, configured(tmp_path), ground.data, NOW_MS)
    assert stat.S_IMODE((ground.data / FILE).stat().st_mode) == 0o600
    assert not any(secret in repr(made) for secret in secrets_of(made))
    holding = {
        file.name
        for file in ground.data.rglob("*")
        if file.is_file() and any(secret.encode() in file.read_bytes() for secret in secrets_of(made))
    }
    assert holding == {FILE}


def test_a_revoked_key_is_replaced(ground: Ground, tmp_path: Path) -> None:
    config = configured(tmp_path)
    first = ensure(ground.state, config, ground.data, NOW_MS)
    state = ground.state.load()
    key = next(key for key in state.keys if key.tenant == "demo")
    ground.state.commit(state.version, Change(put=(replace(key, revoked_ms=NOW_MS),)))
    second = ensure(ground.state, config, ground.data, NOW_MS + 1)
    assert second.api_keys["demo"] != first.api_keys["demo"]
    assert second.admin_key == first.admin_key


def test_a_damaged_file_costs_new_keys_not_the_start(ground: Ground, tmp_path: Path) -> None:
    config = configured(tmp_path)
    first = ensure(ground.state, config, ground.data, NOW_MS)
    (ground.data / FILE).write_text('{"": "tg-')
    second = ensure(ground.state, config, ground.data, NOW_MS)
    assert not secrets_of(first) & secrets_of(second)


def test_declared_tenants_and_chosen_secrets(ground: Ground, tmp_path: Path) -> None:
    toml = f"admin_key = '{SECRET}-admin'\n[[tenants]]\nid = 'acme'\napi_key = '{SECRET}'\n[[tenants]]\nid = 'zeta'\n"
    made = ensure(ground.state, configured(tmp_path, toml), ground.data, NOW_MS)
    assert made.admin_key == f"{SECRET}-admin"
    assert list(made.api_keys) == ["acme", "zeta"]
    assert made.api_keys["acme"] == SECRET
    assert not made.demo_is_new
    assert [tenant.id for tenant in ground.state.load().tenants] == ["acme", "zeta"]


def test_no_demo_where_it_is_not_wanted(ground: Ground, tmp_path: Path) -> None:
    made = ensure(ground.state, configured(tmp_path, "demo = false"), ground.data, NOW_MS)
    assert made.api_keys == {}
    assert ground.state.load().tenants == ()


def test_private_files_are_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "f.json"
    write_private(target, json.dumps({"a": 1}))
    write_private(target, json.dumps({"a": 2}))
    assert json.loads(target.read_text()) == {"a": 2}
    assert list(tmp_path.iterdir()) == [target]


# --- prices -------------------------------------------------------------------------------------------------------


def test_default_prices_fill_an_empty_book_only(ground: Ground, tmp_path: Path) -> None:
    set_prices(ground.prices, configured(tmp_path), NOW_MS)
    (first,) = ground.prices.versions()
    assert (first.plan, first.effective_ms, first.input_nano_usd) == ("default", 0, nano_usd_per_token("0.20"))
    ground.prices.add(replace(first, effective_ms=NOW_MS, input_nano_usd=7))
    set_prices(ground.prices, configured(tmp_path), NOW_MS + 1)
    assert len(ground.prices.versions()) == 2, "a default undid what an operator had set"


def test_a_changed_price_is_a_new_version(ground: Ground, tmp_path: Path) -> None:
    set_prices(ground.prices, configured(tmp_path), NOW_MS)
    toml = "[prices.default]\ninput_usd_per_million_tokens = '0.30'\n[prices.night]\n"
    for _ in range(2):
        set_prices(ground.prices, configured(tmp_path, toml), NOW_MS + 5)
    versions = ground.prices.versions("default")
    assert [(v.effective_ms, v.input_nano_usd) for v in versions] == [
        (0, nano_usd_per_token("0.20")),
        (NOW_MS + 5, nano_usd_per_token("0.30")),
    ]
    assert len(ground.prices.versions("night")) == 1


def test_declared_terms_are_added_once_and_an_ended_default_stays_ended(ground: Ground, tmp_path: Path) -> None:
    toml = "[[price_terms]]\ntenant = 'acme'\nmodel = 'm'\naccelerator_hours_usd = { h200 = '3.5' }\n"
    for now_ms in (NOW_MS, NOW_MS + 5):
        set_prices(ground.prices, configured(tmp_path, toml), now_ms)
    (agreed, first) = ground.prices.versions()
    assert (agreed.tenant, agreed.model, agreed.plan, agreed.effective_ms) == ("acme", "m", "", NOW_MS)
    assert (agreed.hour_nano_usd("h200"), agreed.hour_nano_usd("a100")) == (3_500_000_000, 2_500_000_000)
    ground.prices.add(replace(first, effective_ms=NOW_MS + 6, ends=True))
    set_prices(ground.prices, configured(tmp_path, toml), NOW_MS + 9)
    assert len(ground.prices.versions()) == 3


# --- settings -----------------------------------------------------------------------------------------------------


def test_the_bounds_of_the_core_enclose_the_nodes(tmp_path: Path) -> None:
    config = configured(
        tmp_path, "[engine]\nstart_ms_max = 5000\ndrain_ms_max = 7000\n[gateway]\nhold_ms_max = 50000\n"
    )
    node, gateway = node_limits(config), gateway_limits(config)
    core = core_settings(config, node, (Accelerator("cpu-0", "cpu", 64 << 20),))
    assert core.slept_accelerator_bytes_max == 1 << 20
    assert core.start_ms_max > node.start_ms_max + node.canary_ms_max
    assert core.wake_ms_max > node.wake_ms_max + node.canary_ms_max
    assert core.sleep_ms_max > node.drain_ms_max + node.sleep_ms_max
    assert core.stop_ms_max > node.stop_ms_max
    assert gateway.hold_ms_max == 50_000


def test_engines_share_the_cores(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert engine_threads(configured(tmp_path), cores * 4) == 1
    assert engine_threads(configured(tmp_path), 1) == cores
    assert engine_threads(configured(tmp_path, "[engine]\nthreads = 3\n"), 1) == 3
