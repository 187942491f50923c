"""Files at rest: nothing in the clear, nothing altered unseen, nothing lost that was synced, keys that rotate."""

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.domain.errors import StoreFault
from tidegate.stores.vault import Keyring, Vault

OLD, NEW = os.urandom(32), os.urandom(32)


def vault(folder: Path, *keys: bytes) -> Vault:
    return Vault(folder / "vault", Keyring(list(keys or (OLD,))))


def written(at: Vault, name: str, *frames: bytes) -> None:
    writer = at.create(name)
    for frame in frames:
        writer.append(frame)
    writer.finish()


def test_frames_come_back_in_order_and_by_number(tmp_path: Path) -> None:
    at = vault(tmp_path)
    frames = [b"one", b"", b"secret" * 100_000]
    written(at, "file-a", *frames)
    reader = at.open("file-a")
    assert list(reader.frames()) == frames
    assert [reader.frame(number) for number in (2, 0)] == [frames[2], b"one"]
    assert b"secret" not in (tmp_path / "vault" / "file-a").read_bytes()
    assert (tmp_path / "vault" / "file-a").stat().st_mode & 0o777 == 0o600


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), flip=st.integers(0, 399))
def test_no_byte_can_be_lost_or_changed_unseen(tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int) -> None:
    at = vault(folder := tmp_path_factory.mktemp("v"))
    written(at, "f", b"a" * 100, b"b" * 100)
    path = folder / "vault" / "f"
    whole = path.read_bytes()
    for bad in (whole[: min(cut, len(whole) - 1)], _flipped(whole, flip % len(whole))):
        path.write_bytes(bad)
        with pytest.raises(StoreFault):
            list(at.open("f").frames())


def _flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


@settings(max_examples=60, deadline=None)
@given(torn=st.integers(0, 200))
def test_a_crash_costs_only_what_was_not_whole(tmp_path_factory: pytest.TempPathFactory, torn: int) -> None:
    at = vault(folder := tmp_path_factory.mktemp("v"))
    writer = at.create("f")
    for frame in (b"first", b"second"):
        writer.append(frame)
    writer.sync()
    path = folder / "vault" / "f"
    kept = path.stat().st_size
    writer.append(b"third" * 20)
    writer.sync()
    writer.close()
    path.write_bytes(path.read_bytes()[: kept + torn])
    found: list[bytes] = []
    again = at.resume("f", found.append)
    assert found[:2] == [b"first", b"second"]
    again.append(b"fourth")
    again.finish()
    assert list(at.open("f").frames()) == [*found, b"fourth"]


def test_a_file_finished_before_the_crash_is_finished_again(tmp_path: Path) -> None:
    at = vault(tmp_path)
    written(at, "f", b"only")
    found: list[bytes] = []
    writer = at.resume("f", found.append)
    assert found == [b"only"]
    writer.finish()
    assert list(at.open("f").frames()) == [b"only"]


def test_one_file_cannot_be_passed_off_as_another(tmp_path: Path) -> None:
    at = vault(tmp_path)
    written(at, "mine", b"mine")
    (tmp_path / "vault" / "yours").write_bytes((tmp_path / "vault" / "mine").read_bytes())
    with pytest.raises(StoreFault):
        at.open("yours")


def test_keys_rotate(tmp_path: Path) -> None:
    written(vault(tmp_path, OLD), "old", b"kept")
    both = vault(tmp_path, NEW, OLD)
    written(both, "new", b"fresh")
    assert both.rewrap() == 1
    assert both.rewrap() == 0
    only_new = vault(tmp_path, NEW)
    assert [list(only_new.open(name).frames()) for name in only_new.names()] == [[b"fresh"], [b"kept"]]
    with pytest.raises(StoreFault, match="not in the keyring"):
        vault(tmp_path, OLD).open("old")


def test_a_keyring_says_which_line_is_wrong() -> None:
    good = base64.b64encode(OLD).decode()
    assert Keyring.parse(f"{good}\n\n").newest
    for text, why in (("", "no key"), (f"{good}\nnonsense", "line 2"), ("YWJj", "line 1")):
        with pytest.raises(ValueError, match=why):
            Keyring.parse(text)
