"""Files die with their retention, are spared while a batch reads them, and leave no strays."""

import asyncio
from pathlib import Path

import pytest

from tests.batch.test_job import Clock
from tidegate.batch.files import Files
from tidegate.domain.errors import Refusal
from tidegate.stores.batches import SqlBatchStore
from tidegate.stores.database import migrate, open_database
from tidegate.stores.vault import Keyring, Vault
from tidegate.wire.batch import StoredFile


class Place:
    def __init__(self, folder: Path) -> None:
        engine = open_database(f"sqlite:///{folder / 'db'}")
        migrate(engine)
        self.store, self.vault = SqlBatchStore(engine), Vault(folder / "vault", Keyring([b"k" * 32]))
        self.clock, self.used = Clock(), set[str]()
        self.files = Files(self.store, self.vault, self.clock, 3_600, lambda file_id: file_id in self.used)

    def add(self, file_id: str, expires_ms: int | None = None, tenant: str = "acme", at_ms: int = 1) -> StoredFile:
        writer = self.vault.create(file_id)
        writer.append(b"content of " + file_id.encode())
        writer.finish()
        file = StoredFile(
            id=file_id,
            tenant=tenant,
            purpose="batch",
            filename="x.jsonl",
            bytes=9,
            created_ms=at_ms,
            expires_ms=expires_ms,
        )
        self.store.add_file(file)
        return file


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_has_expired_is_gone_from_list_and_disk_unless_a_batch_reads_it(place: Place) -> None:
    place.add("file-old", expires_ms=place.clock.ms)
    place.add("file-read", expires_ms=place.clock.ms)
    place.add("file-new", expires_ms=place.clock.ms + 1)
    place.add("file-kept")
    place.used.add("file-read")
    with pytest.raises(Refusal, match="No such File"):
        asyncio.run(place.files.get("acme", "file-old"))  # also before it is swept
    asyncio.run(place.files.sweep())
    assert place.vault.names() == ["file-kept", "file-new", "file-read"]
    place.used.clear()
    asyncio.run(place.files.sweep())
    assert place.vault.names() == ["file-kept", "file-new"]
    assert {file.id for file in place.store.list_files("acme", after=None, limit=9)} == {"file-kept", "file-new"}


def test_another_tenants_file_does_not_exist(place: Place) -> None:
    place.add("file-1")
    for asked in (place.files.get, place.files.content, place.files.delete):
        with pytest.raises(Refusal) as refused:
            asyncio.run(asked("other", "file-1"))
        assert (refused.value.code, refused.value.message) == ("not_found", "No such File object: file-1")
    assert place.vault.names() == ["file-1"]


def test_strays_go_at_a_start_and_what_open_batches_write_stays(place: Place) -> None:
    place.add("file-1")
    for name in ("file-stray", "file-open"):
        place.vault.create(name).close()
    asyncio.run(place.files.remove_strays(frozenset({"file-open"})))
    assert place.vault.names() == ["file-1", "file-open"]


def test_pages_follow_each_other_in_both_orders(place: Place) -> None:
    for number in range(7):
        place.add(f"file-{number}", at_ms=number // 2)  # two at an instant: the id decides

    def pages(newest_first: bool) -> list[str]:
        found: list[str] = []
        while page := place.store.list_files(
            "acme", after=found[-1] if found else None, limit=3, newest_first=newest_first
        ):
            found += [file.id for file in page]
        return found

    assert pages(False) == [f"file-{number}" for number in range(7)]
    assert pages(True) == [f"file-{number}" for number in reversed(range(7))]
