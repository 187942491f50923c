"""The disk cache of a node: whole models or none, whatever dies whenever; within its budget; one download."""

import asyncio
import contextlib
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines import hub_server
from tests.engines.test_inspect import LLAMA, write_safetensors
from tests.engines.weight_process import LIMITS, DirectorySource, profile
from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import WeightFault
from tidegate.engines.inspect import FileInspector
from tidegate.engines.weights import cache as cache_module
from tidegate.engines.weights.access import Access, open_remote
from tidegate.engines.weights.cache import DiskCache
from tidegate.engines.weights.disk import disk_bytes
from tidegate.engines.weights.download import DownloadLimits
from tidegate.engines.weights.eviction import Kept, faded, victims
from tidegate.engines.weights.faults import Corrupt, DiskFull, SourceChanged, SourceDenied, SourceUnavailable, Stopped
from tidegate.engines.weights.node_weights import NodeWeights

MIB = 1 << 20
SEED = 20261121
BUDGET = 64 * MIB


def write_model(folder: Path, *, mib: int = 2, fill: int = 1) -> Path:
    """`mib` of weights in two shards, every block of them different."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text(json.dumps({"fill": fill}))
    names = ["model-1.safetensors", "model-2.safetensors"]
    for i, name in enumerate(names):
        write_safetensors(folder / name, {f"t{i}": [mib * MIB // 4]})
        noise = random.Random(f"{fill}-{i}").randbytes(mib * MIB // 2)
        with (folder / name).open("r+b") as file:
            file.seek(-len(noise), os.SEEK_END)
            file.write(noise)
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def same_files(held: Path, published: Path) -> bool:
    names = [p.name for p in published.iterdir()]
    equal, differing, missing = filecmp.cmpfiles(published, held, names, shallow=False)
    return sorted(equal) == sorted(names) == sorted(p.name for p in held.iterdir()) and not differing + missing


def fetch(cache: DiskCache, model: ModelProfile, progress: Callable[[int], None] = lambda _: None) -> Path:
    held = cache.hold(model, progress, threading.Event())
    held.release()
    return Path(held.path)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_model(tmp_path / "published")


def cache_of(tmp_path: Path, source: DirectorySource, budget: int = BUDGET) -> DiskCache:
    return DiskCache(tmp_path / "cache", budget, lambda _: source, LIMITS)


def test_a_model_comes_whole_once_and_is_found_again(tmp_path: Path, published: Path) -> None:
    source, seen = DirectorySource(published), list[int]()
    path = fetch(cache_of(tmp_path, source), profile(published), seen.append)
    assert same_files(path, published)
    assert seen == sorted(seen)
    assert seen[-1] == 100
    reads = len(source.reads)
    again = cache_of(tmp_path, source)
    assert fetch(again, profile(published)) == path
    assert len(source.reads) == reads
    assert again.present() == (profile(published).digest,)


def test_a_source_that_dies_halfway_is_resumed(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published)
    source.dies_after = 12
    cache = cache_of(tmp_path, source)
    with pytest.raises(SourceUnavailable, match="away"):
        fetch(cache, profile(published))
    assert cache.present() == ()
    before = Counter(source.reads)
    source.dies_after = None
    assert same_files(fetch(cache, profile(published)), published)
    twice = [span for span in (Counter(source.reads) - before) & before if not span[0].endswith(".json")]
    assert len(twice) <= LIMITS.connections, "only what was in flight may be fetched again"


def test_a_short_outage_is_waited_out(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published)
    failing = iter([True, False, True, True, False])
    read = source.read

    def flaky(name: str, start: int, end: int) -> bytes:
        if name.endswith(".safetensors") and next(failing, False):
            raise SourceUnavailable("briefly away")
        return read(name, start, end)

    source.read = flaky  # type: ignore[method-assign]
    assert same_files(fetch(cache_of(tmp_path, source), profile(published)), published)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_instant_it_leaves_a_whole_model_or_none(tmp_path: Path, seed: int) -> None:
    """SIGKILL at random instants until it gets through: never a wrong byte, nothing finished is fetched again."""
    dice, published = random.Random(SEED + seed), write_model(tmp_path / "published", mib=6)
    arguments = [str(tmp_path / "cache"), str(published), str(BUDGET), "0.02"]
    command = [sys.executable, "-m", "tests.engines.weight_process", *arguments]
    digest, reads, kills = profile(published).digest, Counter[str](), 0
    models = tmp_path / "cache" / "models"
    for attempt in range(60):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = []
        if attempt % 2 == 0 and attempt < 8:  # in the middle of its reads and writes
            lines = [process.stdout.readline() for _ in range(dice.randint(1, 15))]
            process.kill()
        elif attempt < 12:  # anywhere at all: while it starts, resumes, verifies, publishes
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0.05, 0.5))
            process.kill()
        lines += process.stdout.readlines()
        kills += process.wait(30) == -signal.SIGKILL
        reads.update(line for line in lines if ".safetensors" in line)
        assert not models.exists() or [p.name for p in models.iterdir()] in ([], [digest])
        if process.returncode == 0:
            break
    assert kills >= 3
    assert same_files(models / digest / "files", published)
    again = sum(count - 1 for count in reads.values())
    assert again <= kills * 2 * LIMITS.connections, f"{again} ranges fetched again after {kills} kills"


def test_a_torn_or_foreign_journal_line_is_not_believed(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published)
    source.dies_after = 10
    cache = cache_of(tmp_path, source)
    with pytest.raises(SourceUnavailable):
        fetch(cache, profile(published))
    journal = tmp_path / "cache" / "partial" / profile(published).digest / "journal"
    whole = journal.read_bytes()
    journal.write_bytes(b"0 0 999 00000000\n\xff\xfe garbage\n" + whole[:-5])
    source.dies_after = None
    assert same_files(fetch(cache, profile(published)), published)


def test_processes_and_threads_of_one_node_share_one_download(tmp_path: Path, published: Path) -> None:
    arguments = [str(tmp_path / "cache"), str(published), str(BUDGET), "0.002"]
    command = [sys.executable, "-m", "tests.engines.weight_process", *arguments]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert all(output[-1].startswith("DONE") for output in outputs)
    fetched = [out for out in outputs if any("model-1.safetensors" in line for line in out[:-1])]
    assert len(fetched) == 1, "one of them downloads, the others wait for it"
    source = DirectorySource(published, pause_s=0.001)
    shutil.rmtree(tmp_path / "cache")
    cache = cache_of(tmp_path, source)
    with ThreadPoolExecutor(6) as pool:
        paths = set(pool.map(lambda _: fetch(cache, profile(published)), range(6)))
    assert len(paths) == 1
    assert max(Counter(r for r in source.reads if r[0].endswith(".safetensors")).values()) == 1


# --- wrong bytes ------------------------------------------------------------------------------------------------------


def test_a_checksum_that_does_not_match_is_named_and_quarantined(tmp_path: Path, published: Path) -> None:
    with hub_server.serving() as hub:
        hub.put("acme/tide", published)
        access = Access(hub_url=hub.url, hub_token="t")
        cache = DiskCache(tmp_path / "cache", BUDGET, lambda source: open_remote(source, access), LIMITS)
        model = replace(profile(published), source="hf://acme/tide@main")
        hub.corrupt = "model-2.safetensors"
        with pytest.raises(Corrupt, match=r"model-2\.safetensors does not match the checksum"):
            fetch(cache, model)
        assert cache.present() == ()
        assert (tmp_path / "cache" / "quarantine" / model.digest).is_dir()
        hub.corrupt = "tokenizer.json"  # small files are git blobs: checked as such
        with pytest.raises(Corrupt, match=r"tokenizer\.json does not match"):
            fetch(cache, model)
        hub.corrupt = ""
        assert same_files(fetch(cache, model), published)


def test_a_source_that_changed_since_the_apply_is_refused(tmp_path: Path, published: Path) -> None:
    model = profile(published)
    other = write_model(tmp_path / "other", fill=2)
    with pytest.raises(SourceChanged, match="apply the endpoint again"):
        fetch(cache_of(tmp_path, DirectorySource(other)), model)


def test_other_bytes_than_at_the_first_load_are_refused_even_where_no_sample_sees_them(
    tmp_path: Path, published: Path
) -> None:
    cache = cache_of(tmp_path, DirectorySource(published))
    digest = profile(published).digest
    big = write_model(tmp_path / "big", mib=8)
    fetch(cache_of(tmp_path, DirectorySource(big)), profile(big))
    shutil.rmtree(tmp_path / "cache" / "models" / profile(big).digest)
    with (big / "model-1.safetensors").open("r+b") as file:
        file.seek(70_000)  # between the first sample and the second
        file.write(b"\x99")
    assert FileInspector().inspect(str(big)).digest != digest
    with pytest.raises(Corrupt, match="other bytes than at the first load"):
        fetch(cache_of(tmp_path, DirectorySource(big)), profile(big))
    assert cache.present() == ()


@pytest.mark.parametrize("harm", ["altered", "truncated", "deleted", "manifest"])
def test_what_rots_on_the_disk_is_quarantined_and_fetched_again(tmp_path: Path, published: Path, harm: str) -> None:
    cache = cache_of(tmp_path, DirectorySource(published))
    path = fetch(cache, profile(published))
    victim = path / "model-2.safetensors"
    match harm:
        case "altered":
            with victim.open("r+b") as file:
                file.seek(500_000)
                file.write(b"rot")
        case "truncated":
            os.truncate(victim, 100)
        case "deleted":
            victim.unlink()
        case "manifest":
            (path.parent / "manifest").write_bytes(b'{"files": ')
    assert same_files(fetch(cache, profile(published)), published)
    assert (tmp_path / "cache" / "quarantine" / profile(published).digest).is_dir()


# --- room -------------------------------------------------------------------------------------------------------------


def three_models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / f"m{i}", fill=i) for i in range(3)]


def test_the_least_recently_used_leaves_and_what_is_in_use_stays(tmp_path: Path) -> None:
    folders = three_models(tmp_path)
    digests = [profile(folder).digest for folder in folders]
    budget = 5 * MIB
    held = cache_of(tmp_path, DirectorySource(folders[0]), budget).hold(
        profile(folders[0]), lambda _: None, threading.Event()
    )
    fetch(cache_of(tmp_path, DirectorySource(folders[1]), budget), profile(folders[1]))
    old = time.time() - 1_000  # the first one was not used for long, but it is in use
    os.utime(tmp_path / "cache" / "models" / digests[0] / "manifest", (old, old))
    cache = cache_of(tmp_path, DirectorySource(folders[2]), budget)
    fetch(cache, profile(folders[2]))
    assert cache.present() == tuple(sorted([digests[0], digests[2]]))
    held.release()
    fetch(cache_of(tmp_path, DirectorySource(folders[1]), budget), profile(folders[1]))
    assert digests[1] in cache.present()
    assert disk_bytes(tmp_path / "cache") <= budget


def test_a_model_that_cannot_fit_is_refused_with_figures_and_evicts_nobody(tmp_path: Path) -> None:
    small, large = write_model(tmp_path / "s", mib=2), write_model(tmp_path / "l", mib=8, fill=3)
    fetch(cache_of(tmp_path, DirectorySource(small), 6 * MIB), profile(small))
    cache = cache_of(tmp_path, DirectorySource(large), 6 * MIB)
    with pytest.raises(DiskFull, match=r"need \d+ bytes more; the disk cache may have 6291456 bytes"):
        fetch(cache, profile(large))
    assert cache.present() == (profile(small).digest,)
    assert not list((tmp_path / "cache" / "partial").iterdir())


def test_a_full_disk_is_a_named_fault_and_gives_its_room_back(
    tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the file system refuses to allocate, and once it fails in the middle, as one without reservations does."""
    import errno

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = cache_of(tmp_path, DirectorySource(published))
    for call in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, full)
            with pytest.raises(DiskFull, match="disk of the weight cache is full"):
                fetch(cache, profile(published))
        assert not list((tmp_path / "cache" / "partial").iterdir())
    assert same_files(fetch(cache, profile(published)), published)


def test_a_file_system_that_is_really_full(tmp_path: Path, published: Path) -> None:
    """A tmpfs of 1 MiB: noticed beforehand, and by the kernel's own word where the look beforehand saw room."""
    (tmp_path / "cache").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "cache")]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system can be mounted by root only")
    try:
        for pretended, says in ((0, r"the disk has \d+ to give"), (-BUDGET, "disk of the weight cache is full")):
            source = DirectorySource(published)
            cache = DiskCache(tmp_path / "cache", BUDGET, lambda _, s=source: s, LIMITS, free_bytes_min=pretended)
            with pytest.raises(DiskFull, match=says):
                fetch(cache, profile(published))
            assert disk_bytes(tmp_path / "cache") < MIB // 4, "what was taken is given back"
    finally:
        subprocess.run(["umount", str(tmp_path / "cache")], check=True)


def test_the_disks_own_limit_counts_too(tmp_path: Path, published: Path) -> None:
    """Journals and databases live on the same disk: the cache never takes the last of it."""
    greedy = DiskCache(tmp_path / "cache", BUDGET, lambda _: DirectorySource(published), LIMITS, free_bytes_min=1 << 60)
    with pytest.raises(DiskFull, match="the disk has 0 to give"):
        fetch(greedy, profile(published))


def test_leftovers_go_before_models_do(tmp_path: Path) -> None:
    folders = three_models(tmp_path)
    budget = 5 * MIB
    fetch(cache_of(tmp_path, DirectorySource(folders[0]), budget), profile(folders[0]))
    dying = DirectorySource(folders[1])
    dying.dies_after = 5
    with pytest.raises(SourceUnavailable):
        fetch(cache_of(tmp_path, dying, budget), profile(folders[1]))
    cache = cache_of(tmp_path, DirectorySource(folders[2]), budget)
    fetch(cache, profile(folders[2]))
    assert cache.present() == tuple(sorted([profile(folders[0]).digest, profile(folders[2]).digest]))


def test_what_is_used_often_stays_for_what_was_used_last(tmp_path: Path) -> None:
    often, once, new = three_models(tmp_path)
    budget = 5 * MIB
    cache = cache_of(tmp_path, DirectorySource(often), budget)
    for _ in range(5):
        fetch(cache, profile(often))
    fetch(cache_of(tmp_path, DirectorySource(once), budget), profile(once))
    models = tmp_path / "cache" / "models"
    for folder, seconds in ((often, 3_600), (once, 60)):
        then = time.time() - seconds
        os.utime(models / profile(folder).digest / "manifest", (then, then))
    (models / profile(once).digest / "uses").write_text("torn by a cra")  # counts as one
    fetch(cache_of(tmp_path, DirectorySource(new), budget), profile(new))
    assert cache.present() == tuple(sorted([profile(often).digest, profile(new).digest]))


@pytest.mark.parametrize(
    ("kept_one", "dropped"),
    [
        (Kept("slow source", 100, 1.0, 9_000), Kept("quick source", 100, 1.0, 1_000)),
        (Kept("used yesterday, ten times", 100, faded(10, 86_400), 1_000), Kept("used once, now", 100, 1.0, 1_000)),
        (Kept("small", 100, 1.0, 1_000), Kept("ten times as large, no slower", 1_000, 1.0, 1_000)),
        (Kept("fetch was timed", 10**6, 1.0, 1_000), Kept("not timed: counts as quick", 10**6, 1.0)),
    ],
    ids=lambda kept: kept.digest,
)
def test_the_least_regretted_byte_goes_first(kept_one: Kept, dropped: Kept) -> None:
    assert victims([kept_one, dropped], 100) == [dropped.digest]


def test_a_use_is_worth_half_after_a_day() -> None:
    assert faded(4.0, 0) == 4.0
    assert faded(4.0, 86_400) == 2.0
    assert faded(4.0, -5) == 4.0, "a clock that was set back adds nothing"


kept = st.builds(Kept, st.uuids().map(str), st.integers(1, 10**12), st.floats(0, 10**4), st.integers(0, 10**7))


@given(st.lists(kept, max_size=12, unique_by=lambda k: k.digest), st.integers(1, 10**13))
def test_victims_free_enough_and_none_is_needless(models: list[Kept], need: int) -> None:
    chosen = victims(models, need)
    sizes = {model.digest: model.size for model in models}
    if chosen is None:
        assert sum(sizes.values()) < need
        return
    freed = sum(sizes[digest] for digest in chosen)
    assert freed >= need
    assert all(freed - sizes[digest] < need for digest in chosen)


# --- the node's view --------------------------------------------------------------------------------------------------


def test_a_fetch_nobody_wants_any_more_stops_and_can_be_resumed(tmp_path: Path, published: Path) -> None:
    source = DirectorySource(published, pause_s=0.01)
    weights = NodeWeights(cache_of(tmp_path, source))

    async def give_up() -> None:
        fetching = asyncio.create_task(weights.hold(profile(published), lambda _: None))
        while len(source.reads) < 8:  # noqa: ASYNC110 - the reads happen on other threads
            await asyncio.sleep(0.002)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        held = await weights.hold(profile(published), lambda _: None)
        assert same_files(Path(held.path), published)
        held.release()

    asyncio.run(give_up())
    assert weights.present() == (profile(published).digest,)


def test_a_source_that_hangs_holds_nobody_up(tmp_path: Path, published: Path) -> None:
    """Given up in the middle of a read that does not return: the fetch ends at once, and the next one gets through."""
    hanging, source = threading.Event(), DirectorySource(published)
    read = source.read

    def hang(name: str, start: int, end: int) -> bytes:
        if name.endswith(".safetensors"):
            hanging.wait(30)
        return read(name, start, end)

    source.read = hang  # type: ignore[method-assign]
    weights = NodeWeights(cache_of(tmp_path, source))

    async def give_up() -> float:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(weights.hold(profile(published), lambda _: None), 0.5)
        source.read = read  # type: ignore[method-assign]
        began = time.monotonic()
        (await weights.hold(profile(published), lambda _: None)).release()
        return time.monotonic() - began

    assert asyncio.run(give_up()) < 15
    hanging.set()
    assert same_files(
        Path(cache_of(tmp_path, source)._root / "models" / profile(published).digest / "files"), published
    )


def test_credentials_taken_back_halfway_are_named_and_not_tried_again(tmp_path: Path, published: Path) -> None:
    with hub_server.serving() as hub:
        hub.put("acme/tide", published)
        access = Access(hub_url=hub.url, hub_token="good")
        cache = DiskCache(tmp_path / "cache", BUDGET, lambda source: open_remote(source, access), LIMITS)
        hub.slow_s = 0.01

        def revoke(percent: int) -> None:
            if percent > 30:
                hub.token = "another"

        model = replace(profile(published), source="hf://acme/tide@main")
        with pytest.raises(SourceDenied, match="the Hub refuses the credentials for model-"):
            fetch(cache, model, revoke)
        assert hub.seen_tokens["good"] < 80
        hub.token = "good"
        assert same_files(fetch(cache, model), published)


def test_a_signed_address_is_used_until_it_runs_out_and_never_sees_the_token(tmp_path: Path, published: Path) -> None:
    with hub_server.serving() as hub:
        hub.put("acme/tide", published)
        hub.token, hub.elsewhere, hub.slow_s = "good", True, 0.005
        access = Access(hub_url=hub.url, hub_token="good")
        cache = DiskCache(tmp_path / "cache", BUDGET, lambda source: open_remote(source, access), LIMITS)

        def run_out(percent: int) -> None:
            if percent > 50:
                hub.signature = "s2"

        path = fetch(cache, replace(profile(published), source="hf://acme/tide@main"), run_out)
        assert same_files(path, published)
        ranges = sum(name.endswith(".safetensors") for name, _, _ in hub.ranges)
        assert hub.resolved <= 2 * 2 * LIMITS.connections < ranges, "the Hub is not asked for each range"
        assert set(hub.signed_tokens) == {""}


def test_everybody_who_waits_hears_how_far_it_is(tmp_path: Path, published: Path) -> None:
    weights = NodeWeights(cache_of(tmp_path, DirectorySource(published, pause_s=0.005)))
    heard: list[list[int]] = [[], []]

    async def both() -> None:
        for held in await asyncio.gather(*(weights.hold(profile(published), each.append) for each in heard)):
            held.release()

    asyncio.run(both())
    assert heard[0] == heard[1]
    assert heard[0][-1] == 100


def test_a_local_model_is_read_in_place_and_refused_once_it_changed(tmp_path: Path, published: Path) -> None:
    weights = NodeWeights(cache_of(tmp_path, DirectorySource(published)))
    model = FileInspector().inspect(str(published))

    async def hold() -> str:
        return (await weights.hold(model, lambda _: None)).path

    assert asyncio.run(hold()) == str(published)
    (published / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceChanged, match="changed since it was applied"):
        asyncio.run(hold())
    shutil.rmtree(published)
    with pytest.raises(WeightFault, match="cannot be used any more: model: no such directory"):
        asyncio.run(hold())


def test_a_lock_given_up_is_let_go(tmp_path: Path, published: Path) -> None:
    cache = cache_of(tmp_path, DirectorySource(published))
    blocker = cache_module.FileLock(tmp_path / "cache" / "locks" / profile(published).digest)
    assert blocker.try_acquire()
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        cache.hold(profile(published), lambda _: None, stop)
    blocker.close()
    assert same_files(fetch(cache, profile(published)), published)


def test_limits_are_sane() -> None:
    limits = DownloadLimits()
    assert limits.connections * limits.range_bytes <= 128 * MIB, "ranges in flight are held in memory"
