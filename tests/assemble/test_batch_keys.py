"""Where the keys of stored files come from, and what is said of ones that are none."""

import base64
import os
from pathlib import Path

import pytest

from tidegate.assemble.batch import KEY_FILE, _keyring
from tidegate.assemble.sockets import StartError
from tidegate.config import Config, load
from tidegate.stores.vault import Vault

ONE, TWO = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))


def config(folder: Path, text: str = "") -> Config:
    file = folder / "t.toml"
    file.write_text(text)
    return load(file)


def test_a_key_of_our_own_is_made_once_and_kept_private(tmp_path: Path) -> None:
    first = _keyring(config(tmp_path), tmp_path)
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert _keyring(config(tmp_path), tmp_path).newest == first.newest


def test_a_rotated_key_opens_what_the_old_one_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_BATCH__KEY", ONE)
    writer = Vault(tmp_path / "v", _keyring(config(tmp_path), tmp_path)).create("f")
    writer.append(b"kept")
    writer.finish()
    assert not (tmp_path / KEY_FILE).exists()
    monkeypatch.delenv("TIDEGATE_BATCH__KEY")
    keys = tmp_path / "keys"
    keys.write_text(f"{TWO}\n{ONE}\n")
    text = f"[batch]\nkey_file = '{keys}'\n"
    assert Vault(tmp_path / "v", _keyring(config(tmp_path, text), tmp_path)).rewrap() == 1
    keys.write_text(f"{TWO}\n")
    vault = Vault(tmp_path / "v", _keyring(config(tmp_path, text), tmp_path))
    assert list(vault.open("f").frames()) == [b"kept"]


@pytest.mark.parametrize(
    ("text", "why"), [("", "no key"), ("nonsense", "line 1"), (f"{ONE}\nYWJj", "line 2"), (None, "cannot be read")]
)
def test_keys_that_are_none_stop_the_start_without_being_shown(tmp_path: Path, text: str | None, why: str) -> None:
    keys = tmp_path / "keys"
    if text is not None:
        keys.write_text(text)
    with pytest.raises(StartError, match=why) as refused:
        _keyring(config(tmp_path, f"[batch]\nkey_file = '{keys}'\n"), tmp_path)
    assert ONE not in str(refused.value)
    assert os.listdir(tmp_path).count(KEY_FILE) == 0
