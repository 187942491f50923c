"""Files hashed while they arrive, in whatever order their pieces do; written past the page cache where that can be."""

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from tidegate.engines.weights.disk import ALIGN_BYTES, Sink, staging
from tidegate.engines.weights.sums import Sums

STEP = 2 * ALIGN_BYTES
SIZES = [0, 1, STEP - 1, STEP, 5 * STEP + 17, 40 * STEP]


def write(sink: Sink, piece: bytes, at: int) -> None:
    buffer = staging(STEP)[: len(piece)]
    buffer[:] = piece
    sink.write(buffer, at)


@pytest.mark.parametrize("seed", range(3))
def test_pieces_in_any_order_make_the_right_sums(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    contents = [dice.randbytes(size) for size in SIZES]
    sinks = [Sink(tmp_path / str(number)) for number in range(len(SIZES))]
    pieces = [(i, at) for i, size in enumerate(SIZES) for at in range(0, size, STEP)]
    dice.shuffle(pieces)
    sums = Sums(sinks, SIZES)
    sums.start()
    for number, (index, at) in enumerate(pieces):
        end = min(at + STEP, SIZES[index])
        write(sinks[index], contents[index][at:end], at)
        sums.arrived(index, at, end)
        if number == len(pieces) // 2:
            for sink in sinks:
                sink.sync()
    assert sums.finish(threading.Event()) == [hashlib.sha256(content).hexdigest() for content in contents]
    assert [(tmp_path / str(number)).read_bytes() for number in range(len(SIZES))] == contents


def test_a_stop_ends_what_can_never_be_whole(tmp_path: Path) -> None:
    sums, stop = Sums([Sink(tmp_path / "a")], [STEP]), threading.Event()
    sums.start()
    stop.set()
    assert sums.finish(stop) is None


def test_a_file_that_shrinks_is_an_error_not_a_sum(tmp_path: Path) -> None:
    sums = Sums([Sink(tmp_path / "a")], [STEP])
    sums.start()
    sums.arrived(0, 0, STEP)  # which was never written
    with pytest.raises(OSError, match="became shorter"):
        sums.finish(threading.Event())


def test_where_a_disk_refuses_our_alignment_the_page_cache_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose sectors are larger than a page does."""
    import errno
    import fcntl

    written = os.pwrite

    def picky(descriptor: int, body: memoryview, at: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and len(body):
            raise OSError(errno.EINVAL, "Invalid argument")
        return written(descriptor, body, at)

    monkeypatch.setattr(os, "pwrite", picky)
    sink = Sink(tmp_path / "a")
    write(sink, b"x" * (STEP - 5), 0)
    sink.sync()
    assert (tmp_path / "a").read_bytes() == b"x" * (STEP - 5)
