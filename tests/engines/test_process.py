"""Real child processes: watching, ending, adopting, restarting, measuring."""

import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from tests.loop import until
from tidegate.domain.errors import EngineFault
from tidegate.engines.logs import LogRing
from tidegate.engines.process import Child, Lifeline, Process, Restart, held_by_session, memory_of, resident_of_files

PYTHON = (sys.executable, "-I", "-S", "-c")
SLEEPER = (*PYTHON, "import time; time.sleep(60)")


@contextlib.asynccontextmanager
async def started(*argv: str, **options: object) -> AsyncIterator[Process]:
    process = Process.start(argv, **options)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        await process.stop(grace_ms_max=0)


def test_exit_code_and_signal_are_told() -> None:
    async def main() -> None:
        async with started(*PYTHON, "raise SystemExit(7)") as process:
            assert str(await process.exited()) == "ended with exit code 7"
            assert not process.running
        async with started(*SLEEPER) as process:
            os.kill(process.pid, signal.SIGKILL)
            assert str(await process.exited()) == "killed by SIGKILL"

    asyncio.run(main())


def test_stop_asks_first_then_kills() -> None:
    async def main() -> None:
        async with started(*SLEEPER) as process:
            assert (await process.stop(grace_ms_max=10_000)).code == -signal.SIGTERM
            assert (await process.stop(grace_ms_max=10_000)).code == -signal.SIGTERM
        deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        async with started(*PYTHON, deaf) as process:
            await until(lambda: _ignores(process.pid))
            assert (await process.stop(grace_ms_max=50)).code == -signal.SIGKILL

    asyncio.run(main())


def _ignores(pid: int) -> bool:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(line.split()[1], 16) & (1 << (signal.SIGTERM - 1)))


def test_works_on_uvloop_too() -> None:
    async def main() -> None:
        async with started(*PYTHON, "raise SystemExit(3)") as process:
            assert (await asyncio.wait_for(process.exited(), 20)).code == 3

    uvloop.run(main())


def test_a_program_that_is_not_there_is_a_fault() -> None:
    async def main() -> None:
        with pytest.raises(EngineFault, match="cannot start no-such-program: No such file"):
            Process.start(["/nowhere/no-such-program"])

    asyncio.run(main())


def test_adopts_a_process_it_did_not_start(tmp_path: Path) -> None:
    """As an engine forked by the template: a grandchild, of which only the pid is known."""

    async def main() -> None:
        pid_file = tmp_path / "pid"
        fork = f"import os, time; p = os.fork(); p and open({str(pid_file)!r}, 'w').write(str(p)); time.sleep(60)"
        async with started(*PYTHON, fork) as parent:
            await until(lambda: pid_file.exists() and pid_file.read_text() != "")
            grandchild = Process.adopt(int(pid_file.read_text()))
            assert grandchild.running
            await grandchild.stop(grace_ms_max=5_000)
            assert not grandchild.running
            assert parent.running

    asyncio.run(main())


def test_adopting_what_is_gone_is_a_fault() -> None:
    async def main() -> None:
        async with started(*PYTHON, "") as process:
            await process.exited()
            with pytest.raises(EngineFault, match="ended at once"):
                Process.adopt(process.pid)

    asyncio.run(main())


def test_output_is_kept_within_bounds(tmp_path: Path) -> None:
    async def main() -> None:
        logs = LogRing(tmp_path / "logs" / "engine.log", file_bytes_max=4_000, lines_max=3)
        async with started(*PYTHON, "for i in range(1000): print('line', i)", logs=logs) as process:
            await process.exited()
            await until(lambda: logs.tail[-1:] == ("line 999",))
        assert logs.tail == ("line 997", "line 998", "line 999")
        sizes = [file.stat().st_size for file in (tmp_path / "logs").iterdir()]
        assert len(sizes) <= 2
        assert all(size <= 4_000 + 65_536 for size in sizes)
        assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "logs").iterdir())
        logs.close()

    asyncio.run(main())


def test_who_holds_the_lifeline_sees_its_end() -> None:
    async def main() -> None:
        lifeline = Lifeline()
        watch = f"import os; os.read({lifeline.read_fd}, 1); raise SystemExit(5)"
        async with started(*PYTHON, watch, pass_fds=(lifeline.read_fd,)) as process:
            await asyncio.sleep(0.05)
            assert process.running
            lifeline.close()
            assert (await process.exited()).code == 5
        lifeline.close()

    asyncio.run(main())


def test_a_child_is_started_again_with_growing_waits(tmp_path: Path) -> None:
    async def main() -> None:
        child = Child("short", [*PYTHON, "raise SystemExit(1)"], restart=Restart(wait_ms_min=10, wait_ms_max=40))
        running = asyncio.create_task(child.run())
        await until(lambda: child.starts >= 4)
        await child.stop()
        await asyncio.wait_for(running, 10)
        assert child.process is not None
        assert not child.process.running

    asyncio.run(main())


def test_a_child_stopped_while_running_is_not_started_again() -> None:
    async def main() -> None:
        child = Child("long", SLEEPER)
        running = asyncio.create_task(child.run())
        await until(lambda: child.process is not None)
        await child.stop()
        await asyncio.wait_for(running, 10)
        assert child.starts == 1

    asyncio.run(main())


def test_a_child_that_never_could_start_says_so() -> None:
    async def main() -> None:
        with pytest.raises(EngineFault, match="cannot start"):
            await Child("absent", ["/nowhere/absent"]).run()

    asyncio.run(main())


def test_memory_is_the_kernels_count(tmp_path: Path) -> None:
    """A mapping's resident bytes grow when it is touched and fall to zero when it is given back."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\1" * (8 << 20))
    touch = (
        "import mmap, sys\n"
        f"f = open({str(weights)!r}, 'rb')\n"
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "for line in sys.stdin:\n"
        "    given = {'touch': 0, 'half': 4 << 20, 'give back': 8 << 20}[line.strip()]\n"
        "    m.madvise(mmap.MADV_DONTNEED, 0, given) if given else sum(m[::4096])\n"
        "    print('done', flush=True)\n"
    )

    async def main() -> None:
        child = await asyncio.create_subprocess_exec(*PYTHON, touch, stdin=-1, stdout=-1)
        assert child.stdin is not None
        assert child.stdout is not None
        seen = []
        for word in (b"touch\n", b"half\n", b"give back\n"):
            child.stdin.write(word)
            await child.stdout.readline()
            seen.append(memory_of(child.pid, [weights]))
            assert resident_of_files(child.pid, [weights]) == seen[-1].of_files, "two ways to ask the kernel"
        child.kill()
        await child.wait()
        assert [memory.of_files for memory in seen] == [8 << 20, 4 << 20, 0]
        assert seen[0].resident - seen[2].resident > 7 << 20
        assert 0 < seen[2].private < seen[2].resident
        with pytest.raises(EngineFault, match="gone"):
            memory_of(child.pid)
        with pytest.raises(EngineFault, match="gone"):
            resident_of_files(child.pid, [weights])

    asyncio.run(main())


FAMILY = (
    "import subprocess, sys, time\n"
    "code = 'import time; held = bytearray(b\"x\" * (8 << 20)); time.sleep(60)'\n"
    "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', code])\n"
    "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(60)"
)


@pytest.mark.parametrize("end", ["killed", "stopped", "lifeline"])
def test_a_foreign_program_and_all_it_started_end_with_it_and_with_us(tmp_path: Path, end: str) -> None:
    """It knows no lifeline: a guard kills its whole group when we are gone, or when it alone is."""

    async def main() -> None:
        lifeline, pid_file = Lifeline(), tmp_path / "pid"
        os.set_blocking(lifeline.read_fd, False)  # as another child that watches it does
        process = Process.start([*PYTHON, FAMILY, str(pid_file)], lifeline=lifeline)
        await until(lambda: pid_file.exists() and pid_file.read_text() != "")
        child = os.pidfd_open(int(pid_file.read_text()))
        await until(lambda: held_by_session(process.pid).own > 8 << 20)
        assert pid_file.stat().st_mode & 0o077 == 0
        match end:
            case "killed":
                process.send(signal.SIGKILL)
            case "stopped":
                await process.stop(grace_ms_max=5_000)
            case _:
                lifeline.close()
        await asyncio.wait_for(process.exited(), 20)
        await until(lambda: bool(select.select([child], [], [], 0)[0]))
        os.close(child)
        lifeline.close()

    asyncio.run(main())


def _stands_still(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat[stat.rfind(b")") + 2 :].split()[0] == b"T"


def test_a_pause_stops_all_a_program_started_and_it_can_be_ended_meanwhile(tmp_path: Path) -> None:
    async def main() -> None:
        lifeline, pid_file = Lifeline(), tmp_path / "pid"
        process = Process.start([*PYTHON, FAMILY, str(pid_file)], lifeline=lifeline)
        await until(lambda: pid_file.exists() and pid_file.read_text() != "")
        family = (process.pid, int(pid_file.read_text()))
        for on in (True, True, False, True):
            process.pause(on)
            await until(lambda on=on: all(_stands_still(pid) is on for pid in family))
        ended = await process.stop(grace_ms_max=20_000)
        assert ended.code == -signal.SIGTERM, "it heard that it was asked to end, and needed no kill"
        process.pause(True)
        lifeline.close()

    asyncio.run(main())


def test_what_was_adopted_and_stands_still_ends_with_the_lifeline(tmp_path: Path) -> None:
    """It cannot see for itself that we are gone."""

    async def main() -> None:
        lifeline, pid_file = Lifeline(), tmp_path / "pid"
        watch = f"os.setsid(); open({str(pid_file)!r}, 'w').write(str(os.getpid())); os.read({lifeline.read_fd}, 1)"
        fork = f"import os\nif os.fork() == 0: {watch}\nelse: os.wait()"
        async with started(*PYTHON, fork, pass_fds=(lifeline.read_fd,)):
            await until(lambda: pid_file.exists() and pid_file.read_text() != "")
            engine = Process.adopt(int(pid_file.read_text()), lifeline)
            engine.pause(True)
            await until(lambda: _stands_still(engine.pid))
            lifeline.close()
            await asyncio.wait_for(engine.exited(), 20)

    asyncio.run(main())
