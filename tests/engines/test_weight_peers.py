"""Weights between nodes on different machines: one fetches, the others copy from it; whatever dies, all get there."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.engines.test_weight_cache import BUDGET, fetch, same_files, write_model
from tests.engines.weight_process import LIMITS, DirectorySource, profile
from tidegate.engines.weights.cache import DiskCache
from tidegate.engines.weights.faults import SourceMissing, SourceUnavailable, Stopped
from tidegate.engines.weights.peers import PeerModel, Peers
from tidegate.engines.weights.sharing import Sharing


def dial(address: str) -> socket.socket:
    host, _, port = address.removeprefix("tcp:").rpartition(":")
    return socket.create_connection((host, int(port)), 5)


@dataclass
class Machine:
    """One machine's cache, and what it shares, on a loopback port."""

    root: Path
    address: str
    server: asyncio.Server

    def cache(self, source: DirectorySource, registrar: "Machine") -> DiskCache:
        peers = Peers(dial, registrar.address, self.address)
        return DiskCache(self.root, BUDGET, lambda _: source, LIMITS, peers=peers)


@contextmanager
def machines(folder: Path, count: int) -> Iterator[list[Machine]]:
    """The first gives out turns."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def open_one(root: Path) -> Machine:
        listener = socket.create_server(("127.0.0.1", 0))
        address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        sharing = Sharing(root, address)
        server = await asyncio.get_running_loop().create_server(lambda: sharing.serve(None), sock=listener)
        return Machine(root, address, server)

    try:
        yield [
            asyncio.run_coroutine_threadsafe(open_one(folder / f"machine-{number}"), loop).result(5)
            for number in range(count)
        ]
    finally:
        asyncio.run_coroutine_threadsafe(_end_all(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


async def _end_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_model(tmp_path / "published")


def test_of_many_machines_one_reads_the_source_and_all_have_the_model(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published, pause_s=0.002)
    with machines(tmp_path, 4) as there, ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda m: fetch(m.cache(source, there[0]), profile(published)), there))
    assert len(set(paths)) == 4
    assert all(same_files(path, published) for path in paths)
    spans = [span for span in source.reads if span[0].endswith(".safetensors")]
    assert len(spans) == len(set(spans)), "each byte left the source once"


def test_who_dies_while_fetching_loses_its_turn_and_the_next_one_goes_on(tmp_path: Path, published: Path) -> None:
    dying, source = DirectorySource(published), DirectorySource(published)
    dying.dies_after = 10
    with machines(tmp_path, 2) as (first, second):
        with pytest.raises(SourceUnavailable):
            fetch(first.cache(dying, first), profile(published))
        assert same_files(fetch(second.cache(source, first), profile(published)), published)


def test_one_that_waits_is_told_to_stop_and_waits_no_longer(tmp_path: Path, published: Path) -> None:
    with machines(tmp_path, 1) as (only,):
        holding = Peers(dial, only.address, "tcp:held:1")
        waiting, stop = Peers(dial, only.address, "tcp:waits:1"), threading.Event()
        digest = profile(published).digest
        with holding.turn(digest, threading.Event()) as turn:
            assert turn.peers == []
            threading.Timer(0.1, stop.set).start()
            with pytest.raises(Stopped), waiting.turn(digest, stop):
                raise AssertionError("two have the turn at once")
        began = time.monotonic()
        with waiting.turn(digest, threading.Event()) as turn:
            assert turn.peers == []
        assert time.monotonic() - began < 5, "the turn came back with its holder's connection"


def test_what_the_giver_of_turns_has_itself_is_copied_also_after_its_restart(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published)
    with machines(tmp_path, 1) as (first,):
        fetch(first.cache(source, first), profile(published))
    nowhere = DirectorySource(published)
    nowhere.dies_after = 0
    with machines(tmp_path, 2) as (first, second):
        assert same_files(fetch(second.cache(nowhere, first), profile(published)), published)


def test_a_holder_that_evicted_it_meanwhile_is_passed_over(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published)
    with machines(tmp_path, 2) as (first, second):
        fetch(first.cache(source, first), profile(published))
        (first.root / "models" / profile(published).digest).rename(tmp_path / "gone")
        assert same_files(fetch(second.cache(source, first), profile(published)), published)
        with pytest.raises(SourceMissing):
            PeerModel(dial, first.address, profile(published).digest)


def test_wrong_bytes_of_another_node_are_noticed_and_the_source_is_asked(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published)
    with machines(tmp_path, 2) as (first, second):
        rotten = fetch(first.cache(source, first), profile(published)) / "model-2.safetensors"
        with rotten.open("r+b") as file:
            file.seek(500_000)
            file.write(b"rot")
        assert same_files(fetch(second.cache(source, first), profile(published)), published)


def test_where_nobody_gives_out_turns_the_source_is_read_all_the_same(tmp_path: Path, published: Path) -> None:
    with machines(tmp_path, 1) as (only,):
        alone = Machine(only.root, only.address, only.server)
        nowhere = Machine(tmp_path / "x", "tcp:127.0.0.1:1", only.server)
        assert same_files(fetch(alone.cache(DirectorySource(published), nowhere), profile(published)), published)


@pytest.mark.parametrize(
    "line",
    [
        b"list ../../etc\n",
        b"read %s 0 5 ../../../etc/passwd\n" % (b"0" * 64),
        b"turn nonsense\n",
        b"read %s 5 99999999999 config.json\n",
        b"read x\n",
        b"\xff\xfe\n",
        b"a" * 20_000 + b"\n",
    ],
)
def test_nothing_but_whole_models_is_given_away(tmp_path: Path, published: Path, line: bytes) -> None:
    digest = profile(published).digest.encode()
    with machines(tmp_path, 1) as (only,):
        fetch(only.cache(DirectorySource(published), only), profile(published))
        connection = dial(only.address)
        connection.sendall(line % digest if b"%s" in line else line)
        connection.settimeout(5)
        assert connection.recv(100) in (b"no\n", b""), "refused, or closed"
        connection.close()
        assert PeerModel(dial, only.address, digest.decode()).files, "and others are served on"
