"""The disk cache that nodes of one machine share: within one budget, the platform's."""

from pathlib import Path

from tidegate.assemble.weights import BUDGET_FILE, cache_folder, node_weights
from tidegate.config import Config


def test_a_guest_keeps_to_the_platforms_budget(tmp_path: Path) -> None:
    platform, guest = Config(disk=5 << 30), Config(disk=1 << 20)
    node_weights(platform, tmp_path)
    shared = node_weights(guest, tmp_path, guest=True)
    assert shared._cache._budget_bytes == 5 << 30
    assert (cache_folder(platform, tmp_path) / BUDGET_FILE).read_text() == f"{5 << 30}\n"
    node_weights(Config(disk=6 << 30), tmp_path)
    assert node_weights(guest, tmp_path, guest=True)._cache._budget_bytes == 6 << 30, "as the platform last started"


def test_a_cache_of_ones_own_has_ones_own_budget(tmp_path: Path) -> None:
    own = Config.model_validate({"disk": 1 << 20, "weights": {"cache_dir": tmp_path / "fast"}})
    assert node_weights(own, tmp_path / "platform", guest=True)._cache._budget_bytes == 1 << 20
