"""What the kernel says this process holds. Linux only: /proc/self."""

import contextlib
import ctypes
import gc
import mmap
import os
import re
import threading
from collections.abc import Collection
from pathlib import Path

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; not named in Python 3.11's mmap
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_HUGE_BYTES = 2 << 20
_PRESENT = bytes(value >> 7 for value in range(256))  # the top byte of a page's entry -> whether it is resident
_MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ")
_libc = ctypes.CDLL(None)


def process_bytes() -> int:
    """Resident set of this process (file pages included)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def available_bytes() -> int:
    """What the machine could still give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES


def resident_bytes(address: int, size: int) -> int:
    """Resident bytes of one range, page by page from /proc/self/pagemap (bit 63 of each page's eight bytes).

    It costs by the range. `mapped_bytes` walks the page tables of the whole process: tens of ms beside torch, which
    whoever waits for the memory would wait for, too.
    """
    first, last = address // _PAGE_BYTES, -(-(address + size) // _PAGE_BYTES)
    with open("/proc/self/pagemap", "rb") as pages:
        pages.seek(first * 8)
        return pages.read((last - first) * 8)[7::8].translate(_PRESENT).count(1) * _PAGE_BYTES


def mapped_bytes(addresses: Collection[int]) -> int:
    """Resident bytes of the mappings that contain `addresses` (kernel's Rss per mapping)."""
    if not addresses:
        return 0
    total, inside = 0, False
    with open("/proc/self/smaps", "rb") as smaps:
        for line in smaps:
            if match := _MAPPING.match(line):
                low, high = int(match[1], 16), int(match[2], 16)
                inside = any(low <= address < high for address in addresses)
            elif inside and line.startswith(b"Rss:"):
                total += int(line.split()[1]) << 10
    return total


def populate(address: int, size: int, threads: int) -> None:
    """Maps every page of a range now: 0.2 µs a page, split over threads (1 GB: 47 ms of CPU time).

    Through ctypes because `mmap.madvise` keeps the interpreter's lock, and nothing else would run meanwhile.
    """
    step = -(-size // threads // _HUGE_BYTES) * _HUGE_BYTES  # no two threads in one huge page
    pieces = [(address + at, min(step, size - at)) for at in range(0, size, step)]
    workers = [threading.Thread(target=_populate, args=piece) for piece in pieces[1:]]
    for worker in workers:
        worker.start()
    _populate(*pieces[0])
    for worker in workers:
        worker.join()


def _populate(address: int, size: int) -> None:
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_READ) != 0:
        # A kernel before 5.14: pages then come one fault at a time, during the first step.
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_WILLNEED)


def prefer_huge_pages(area: mmap.mmap) -> None:
    """Before its first page is touched: what is read for it from a disk then comes, and stays in the page cache, in
    pages of 2 MiB (ext4, xfs), and mapping it again is far less work (docs/weights.md). Pages that are in the
    cache already stay as they are.
    """
    with contextlib.suppress(OSError):  # a kernel without them: all goes on as it would
        area.madvise(mmap.MADV_HUGEPAGE)


def give_back() -> None:
    """Returns freed heap pages to the kernel; without it glibc keeps them and nothing was freed for anybody else."""
    gc.collect()
    _libc.malloc_trim(0)
