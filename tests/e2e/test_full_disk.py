"""The disk of a running platform is really full: what was answered is billed, what is new is refused meanwhile."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.exactness import ledger_rows
from tests.e2e.platform import Platform, running, wait_until

pytestmark = pytest.mark.e2e


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _ask(platform: Platform) -> httpx.Response:
    model = next(e for e in platform.ready["endpoints"] if not e.endswith("embed"))
    headers = {"authorization": f"Bearer {platform.ready['api_key']}"}
    body = {"model": model, "prompt": "the water", "max_tokens": 4}
    return httpx.post(f"{platform.base_url}/v1/completions", json=body, headers=headers, timeout=60)


def _fill(disk: Path) -> Path:
    """Takes every byte that is left."""
    filler = disk / "filler"
    fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(fd, b"x" * 4_096):
            continue
    os.close(fd)
    assert os.statvfs(disk).f_bfree == 0
    return filler


def test_nothing_that_was_answered_is_lost_and_nothing_new_is_let_in(small_disk: Path) -> None:
    with running(small_disk) as platform:
        answered = {_ask(platform).headers["x-request-id"]}
        filler = _fill(small_disk)

        def refused() -> bool:
            answer = _ask(platform)
            if answer.status_code == 200:
                answered.add(answer.headers["x-request-id"])
                return False
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "journal_unavailable"), answer.text
            return True

        wait_until(refused, "new work to be refused")
        assert httpx.get(f"{platform.base_url}/readyz").status_code == 503
        filler.unlink()
        wait_until(lambda: not refused(), "room to be found again")
        wait_until(lambda: answered <= {row["id"] for row in ledger_rows(platform)}, "every answer in the ledger")
        rows = [row["id"] for row in ledger_rows(platform)]
        assert len(rows) == len(set(rows))
