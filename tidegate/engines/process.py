"""The only place that starts programs: processes watched through pidfds, a lifeline, restart with backoff.

A pidfd (Linux ≥ 5.3, `man pidfd_open`) names one process for good: it becomes readable when that process ends, whoever
its parent is, and a signal sent through it can never hit a stranger that got the same pid.
"""

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tidegate.domain.errors import EngineFault
from tidegate.engines.logs import LogRing

log = logging.getLogger(__name__)

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: its exit code (negative = signal), None when only its parent could know."""

    code: int | None

    def __str__(self) -> str:
        if self.code is None:
            return "ended"
        if self.code < 0:
            return f"killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


class Lifeline:
    """A pipe whose write end only this process holds. Who inherits `read_fd` sees end-of-file once we are gone."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()

    def close(self) -> None:
        for fd in (self.read_fd, self._write_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.read_fd = self._write_fd = -1


class Process:
    """One running process: a program started here, or one adopted by pid. The sole owner of its pidfd."""

    def __init__(
        self,
        pid: int,
        pidfd: int,
        child: subprocess.Popen[bytes] | None,
        guard: subprocess.Popen[bytes] | None = None,
        lifeline: Lifeline | None = None,
    ) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._child = child
        self._guard = guard
        self._lifeline = lifeline
        self._paused = False
        self._exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._ended)

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        logs: LogRing | None = None,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        lifeline: Lifeline | None = None,
        tail: deque[str] | None = None,
    ) -> "Process":
        """Starts `argv` in a session of its own, so that Ctrl-C reaches only us and we end things in order.

        Output goes to `logs`, and its lines to `tail`. With a `lifeline` the program knows nothing of ours: it and all
        it started are killed when we are gone, and what it leaves behind when it ends is killed with it. What it
        creates is this user's only. Raises EngineFault when the program cannot be started.
        """
        output = logs.open_pipe(tail) if logs is not None else subprocess.DEVNULL
        try:
            child = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(environment) if environment is not None else None,
                pass_fds=tuple(pass_fds),
                start_new_session=True,
                umask=-1 if lifeline is None else 0o077,
            )
        except OSError as error:
            raise EngineFault(f"cannot start {Path(argv[0]).name}: {error.strerror}") from error
        finally:
            if output >= 0:
                os.close(output)
        guard = None if lifeline is None else _guard(child.pid, lifeline)
        return cls(child.pid, os.pidfd_open(child.pid), child, guard)

    @classmethod
    def adopt(cls, pid: int, lifeline: Lifeline | None = None) -> "Process":
        """Watches a process somebody else started, which ends with `lifeline` by itself. Raises EngineFault when it is
        already gone.
        """
        try:
            return cls(pid, os.pidfd_open(pid), None, lifeline=lifeline)
        except ProcessLookupError as error:
            raise EngineFault("the process ended at once") from error

    @property
    def running(self) -> bool:
        return not self._exit.done()

    async def exited(self) -> Exit:
        """Waits for the end; returns at once when it is past."""
        return await asyncio.shield(self._exit)

    def send(self, number: signal.Signals) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):  # ended this instant: the reader is about to say so
                signal.pidfd_send_signal(self._pidfd, number)

    def pause(self, on: bool) -> None:
        """SIGSTOP, or SIGCONT, to it and, where it was started here, to all of its group. Idempotent."""
        if not self.running or on is self._paused:
            return
        self._paused = on
        if self._guard is None and self._lifeline is not None:
            self._guard = _guard(self.pid, self._lifeline)  # standing still it would not see the lifeline end
        number = signal.SIGSTOP if on else signal.SIGCONT
        if self._child is None:
            self.send(number)
            return
        with contextlib.suppress(ProcessLookupError):  # ended this instant: the reader is about to say so
            os.killpg(self.pid, number)

    async def stop(self, *, grace_ms_max: int, kill_ms_max: int = 5_000) -> Exit:
        """SIGTERM, then SIGKILL after `grace_ms_max` (at once when 0); waits until it is gone. Idempotent.

        Raises EngineFault when the kernel does not end it within `kill_ms_max` more (a process stuck in the kernel).
        """
        try:
            if grace_ms_max > 0:
                self.send(signal.SIGTERM)
                self.pause(False)  # what stands still hears nothing
                return await asyncio.wait_for(self.exited(), grace_ms_max / 1000)
        except TimeoutError:
            log.warning("process %d did not end within %d ms of being asked; killing it", self.pid, grace_ms_max)
        self.send(signal.SIGKILL)
        try:
            return await asyncio.wait_for(self.exited(), kill_ms_max / 1000)
        except TimeoutError as error:
            raise EngineFault(f"process {self.pid} does not end, even when killed") from error

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if self._guard is not None:
            if self._child is not None:  # not reaped yet, so that its number cannot be another group's
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._guard.kill()
            self._guard.wait()
        code = self._child.wait() if self._child is not None else _reap(self._pidfd)
        os.close(self._pidfd)
        self._exit.set_result(Exit(code))


def _guard(group: int, lifeline: Lifeline) -> subprocess.Popen[bytes]:
    """A shell that waits for the end of the lifeline, then kills the group. It sleeps in a read until then."""
    # Opened anew: whoever inherited the pipe may have made it non-blocking, and then a read would not wait.
    reader = os.open(f"/proc/self/fd/{lifeline.read_fd}", os.O_RDONLY)
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", 'read -r _; kill -s KILL -- "-$1"', "tidegate-guard", str(group)],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    finally:
        os.close(reader)


def _reap(pidfd: int) -> int | None:
    """Exit code of an adopted process that became our child because its parent died first; None for another's child."""
    try:
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


@dataclass(frozen=True, slots=True)
class Restart:
    """How fast a program that ended is started again: doubling waits, forgotten after it lived for `stable_ms_min`."""

    wait_ms_min: int = 100
    wait_ms_max: int = 5_000
    stable_ms_min: int = 10_000


class Child:
    """A program that shall always run: started again, with backoff, whenever it ends, until `stop`.

    The gateway process and the template process are both kept this way.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        logs: LogRing | None = None,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        restart: Restart = Restart(),
        grace_ms_max: int = 5_000,
        on_start: Callable[[Process], None] | None = None,
    ) -> None:
        self.name = name
        self.starts = 0
        self.process: Process | None = None
        self.last_end = ""
        self._argv, self._logs, self._environment, self._pass_fds = list(argv), logs, environment, tuple(pass_fds)
        self._restart, self._grace_ms_max, self._on_start = restart, grace_ms_max, on_start
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keeps the program running until `stop`; then it is gone. EngineFault only when it never could start."""
        loop = asyncio.get_running_loop()
        wait_ms = self._restart.wait_ms_min
        while not self._stopping.is_set():
            started = loop.time()
            ended = await self._live()
            self.last_end = str(ended)
            if self._stopping.is_set():
                return
            if (loop.time() - started) * 1000 >= self._restart.stable_ms_min:
                wait_ms = self._restart.wait_ms_min
            log.warning("%s: %s; starting it again in %d ms", self.name, ended, wait_ms)
            with contextlib.suppress(TimeoutError):  # the wait running out is the normal case: start again
                await asyncio.wait_for(self._stopping.wait(), wait_ms / 1000)
            wait_ms = min(wait_ms * 2, self._restart.wait_ms_max)

    async def _live(self) -> Exit | EngineFault:
        """One life of the program, from its start to its end."""
        try:
            process = Process.start(self._argv, logs=self._logs, environment=self._environment, pass_fds=self._pass_fds)
        except EngineFault as fault:
            if self.starts == 0:
                raise  # wrong from the beginning: trying again would only hide it
            return fault
        self.process = process
        self.starts += 1
        if self._on_start is not None:
            self._on_start(process)
        return await process.exited()

    async def stop(self) -> None:
        """Ends the program for good. Idempotent."""
        self._stopping.set()
        if self.process is not None:
            await self.process.stop(grace_ms_max=self._grace_ms_max)


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of one process as the kernel counts them: all resident, only its own outside some files, and what it holds
    of those files.

    `of_files` counts pages that others map too: each of two engines that map one file holds it, as far as giving it
    back is concerned.
    """

    resident: int
    private: int
    of_files: int


# A mapping's first line (range perms offset device inode path), and the three of its figures that matter.
_SMAPS = re.compile(
    rb"^(?:[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)|(Rss|Private_Clean|Private_Dirty): +(\d+) kB)$", re.M
)


def memory_of(pid: int, files: Iterable[Path] = ()) -> ProcessMemory:
    """One pass over /proc/PID/smaps (`man proc_pid_smaps`), some ms. EngineFault when the process is gone."""
    wanted, inside = {os.fsencode(file.resolve()) for file in files}, False
    resident = private = of_files = 0
    for path, figure, kib in _SMAPS.findall(_read(pid, "smaps")):
        if not figure:
            inside = path in wanted
        elif figure == b"Rss":
            resident += int(kib) * 1024
            of_files += int(kib) * 1024 * inside
        else:
            private += int(kib) * 1024 * (not inside)
    return ProcessMemory(resident, private, of_files)


_RANGE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)$", re.M)
_PRESENT = bytes(value >> 7 for value in range(256))  # the top byte of a page's entry -> whether it is resident


def resident_of_files(pid: int, files: Iterable[Path]) -> int:
    """Bytes of `files` that are resident in the process, page by page (`man proc_pid_pagemap`: bit 63 is "present").

    The same as `memory_of(...).of_files`, without the walk through everything else the process maps.
    """
    wanted, resident = {os.fsencode(file.resolve()) for file in files}, 0
    for low, high, path in _RANGE.findall(_read(pid, "maps")):
        if path in wanted:
            first, last = int(low, 16) // _PAGE_BYTES, int(high, 16) // _PAGE_BYTES
            entries = _read(pid, "pagemap", first * 8, (last - first) * 8)
            resident += entries[7::8].translate(_PRESENT).count(1) * _PAGE_BYTES
    return resident


def file_resident_of(pid: int) -> int:
    """Resident bytes of all files the process maps: a counter of the kernel's, read in microseconds."""
    return int(_read(pid, "statm").split()[2]) * _PAGE_BYTES


def _read(pid: int, what: str, start: int = 0, size: int = -1) -> bytes:
    try:
        with open(f"/proc/{pid}/{what}", "rb") as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            raise EngineFault("the process is gone") from error
        raise EngineFault(f"cannot measure the process: {error.strerror}") from error


# The rollup of one process: anonymous and shared memory as its share of what is there (`man proc_pid_smaps`).
_ROLLUP = re.compile(rb"^Pss_(?:Anon|Shmem): +(\d+) kB$", re.M)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes a session holds: anonymous and shared memory of its own, and resident pages of some files."""

    own: int
    of_files: int

    @property
    def total(self) -> int:
        return self.own + self.of_files


def held_by_session(leader: int, files: Iterable[Path] = ()) -> Held:
    """What all processes of the session `leader` began hold.

    Program text is left out: it is the same for every engine on the machine. EngineFault when the leader is gone.
    """
    files = tuple(files)
    found = [_held(leader, files)]
    for pid in session_of(leader):
        with contextlib.suppress(EngineFault):  # a worker that ended while we looked holds nothing
            found.append(_held(pid, files))
    return Held(sum(held.own for held in found), sum(held.of_files for held in found))


def _held(pid: int, files: tuple[Path, ...]) -> Held:
    own = sum(int(kib) for kib in _ROLLUP.findall(_read(pid, "smaps_rollup"))) * 1024
    return Held(own, memory_of(pid, files).of_files if files else 0)


def session_of(leader: int) -> list[int]:
    """Everybody of the session but its leader."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != leader:
            with contextlib.suppress(OSError):  # gone between the two looks
                stat = Path(entry.path, "stat").read_bytes()
                if int(stat[stat.rfind(b")") + 2 :].split()[3]) == leader:
                    found.append(int(entry.name))
    return found
