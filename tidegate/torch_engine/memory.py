"""What the kernel says this process holds. Linux only: /proc/self."""

import ctypes
import gc
import os
import re
from collections.abc import Collection
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MAPPING = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) ")
_libc = ctypes.CDLL(None)


def process_bytes() -> int:
    """Resident set of this process (file pages included)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def share_bytes() -> int:
    """This process's share of what it maps (PSS): pages shared with the template count for their part only."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return process_bytes()


def available_bytes() -> int:
    """What the machine could still give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES


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


def give_back() -> None:
    """Returns freed heap pages to the kernel; without it glibc keeps them and nothing was freed for anybody else."""
    gc.collect()
    _libc.malloc_trim(0)
