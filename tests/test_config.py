"""Configuration: sources and their order, refusals name their key, no secret is printed, every key is documented."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tidegate import config as module
from tidegate.config import Config, ConfigError, load, parse_size, socket_directory

ROOT = Path(__file__).parent.parent
SECRET = "tg-planted-secret-0123456789"


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("TIDEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_defaults_need_no_file() -> None:
    config = load()
    assert (config.host, config.port, config.demo) == ("127.0.0.1", 8000, True)


def test_later_sources_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text(
        "port = 1\nregion = 'north'\n[gateway]\nqueued_max = 3\nbody_bytes_max = '1MiB'\n"
    )
    monkeypatch.setenv("TIDEGATE_PORT", "2")
    monkeypatch.setenv("TIDEGATE_GATEWAY__QUEUED_MAX", "4")
    config = load(overrides={"port": 5, "host": None})
    assert (config.port, config.region, config.host) == (5, "north", "127.0.0.1")
    assert (config.gateway.queued_max, config.gateway.body_bytes_max) == (4, 1 << 20)
    assert load().port == 2


def test_config_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        load().port = 1  # type: ignore[misc]


CONTRADICTIONS: list[tuple[str, str, str]] = [
    ("port = 99999", "port", "65535"),
    ("prot = 1", "prot", "unknown key"),
    ("[gateway]\nhold = 1", "gateway.hold", "unknown key"),
    ("[gateway]\nqueued_max = 0", "gateway.queued_max", "greater than or equal to 1"),
    ("[gateway]\nqueued_max = 'many'", "gateway.queued_max", "integer"),
    ("[accelerators]\nmemory = 'lots'", "accelerators.memory", "512MiB"),
    ("[accelerators]\nmemory = '0'", "accelerators.memory", "greater than 0"),
    ("[accelerators]\nkind = 'tpu'", "accelerators.kind", "'auto', 'cpu' or 'nvidia'"),
    ("[gateway]\nhold_ms_max = 20000", "gateway.hold_ms_max", "engine.start_ms_max"),
    ("[capacity]\nwait_ms_max = 200000", "capacity.wait_ms_max", "gateway.hold_ms_max"),
    ("[capacity]\nresidency_ms_min = 10000", "capacity.residency_ms_min", "capacity.wait_ms_max"),
    ("[prices.default]\ninput_usd_per_million_tokens = 0.2", "prices.default.input_usd_per_million_tokens", "as text"),
    (
        "[prices.default]\noutput_usd_per_million_tokens = '-1'",
        "prices.default.output_usd_per_million_tokens",
        "non-negative",
    ),
    (
        "[prices.default]\noutput_usd_per_million_tokens = 'NaN'",
        "prices.default.output_usd_per_million_tokens",
        "finite",
    ),
    ("[[price_terms]]\nmodel = 'm'\n[[price_terms]]\nmodel = 'm'", "price_terms.1", "declared twice"),
    ("[[price_terms]]\nminimum_usd = '1'", "price_terms.0", "names nothing"),
    ("[prices.x]\ncached_input_usd_per_million_tokens = '9'", "prices.x.cached_input_usd_per_million_tokens", "dearer"),
    ("[[endpoints]]\nname = 'a/b'\nmodel = 'm'", "endpoints.0.name", "not declared"),
    ("[[tenants]]\nid = 'a'\n[[tenants]]\nid = 'a'", "tenants", "twice"),
    ("[[tenants]]\nid = 'a'\n" + "[[endpoints]]\nname = 'a/b'\nmodel = 'm'\n" * 2, "endpoints.1.name", "twice"),
    (
        "[[tenants]]\nid = 'a'\n[[endpoints]]\nname = 'a/b'\nmodel = 'm'\nmode = 'dedicated'\nmin_replicas = 0",
        "endpoints.0.min_replicas",
        "dedicated",
    ),
    (
        "[[tenants]]\nid = 'a'\n[[endpoints]]\nname = 'a/b'\nmodel = 'm'\nmin_replicas = 2",
        "endpoints.0.min_replicas",
        "max_replicas",
    ),
    (
        "[[tenants]]\nid = 'a'\n[[endpoints]]\nname = 'a/b'\nmodel = 'm'\nprice_plan = 'q'",
        "endpoints.0.price_plan",
        "default",
    ),
    ("[remotes.x]\nurl = 'ftp://h/v1'", "remotes.x.url", "expected a URL"),
    ("[remotes.x]\nurl = 'https://h/v1'\nkey_env = 'A'\nkey_file = 'b'", "remotes.x", "one of them"),
    ("[remotes.x]\nurl = 'https://u:p@h/v1'", "remotes.x", "credentials"),
    ("[remotes.x]\nurl = 'http://h/v1'\nkey_env = 'A'", "remotes.x", "in the clear"),
    ("[[tenants]]\nid = 'a'\n[[endpoints]]\nname = 'bare'\nmodel = 'm'", "endpoints.0.name", "expected TENANT/NAME"),
]


@pytest.mark.parametrize(("toml", "key", "reason"), CONTRADICTIONS)
def test_refused_with_key_and_reason(toml: str, key: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text(toml)
    with pytest.raises(ConfigError) as refused:
        load()
    assert key in [named for named, _ in refused.value.problems]
    assert reason in dict(refused.value.problems)[key]


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text("port = -1\n[engine]\nthreads = -1\n")
    with pytest.raises(ConfigError) as refused:
        load()
    assert {key for key, _ in refused.value.problems} == {"port", "engine.threads"}


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("port = = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load(broken)


@pytest.mark.parametrize(
    "bad", ["admin_key = '{0}'\nport = -1", "admin_key = ['{0}']", "database_url = 7\nadmin_key = '{0}'"]
)
def test_secrets_are_masked_also_in_refusals(bad: str, tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text(bad.format(SECRET))
    with pytest.raises(ConfigError) as refused:
        load()
    assert SECRET not in str(refused.value)
    assert SECRET not in repr(refused.value.problems)


def test_secrets_are_masked_in_repr(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text(
        f"admin_key = '{SECRET}'\ndatabase_url = 'postgresql://u:{SECRET}@h/d'\n"
        f"[[tenants]]\nid = 'a'\napi_key = '{SECRET}'\n"
    )
    config = load()
    assert SECRET not in repr(config)
    assert SECRET not in str(config)
    assert config.admin_key is not None
    assert config.admin_key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("text", "size"),
    [("96MiB", 96 << 20), ("1.5 GiB", 3 << 29), ("7", 7), ("8b", 8), ("2kib", 2048), ("1TiB", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_socket_directory_is_short_enough_for_a_unix_socket(tmp_path: Path) -> None:
    deep = load(overrides={"data_dir": tmp_path / ("d" * 120)})
    assert len(str(socket_directory(deep))) <= 64
    near = load(overrides={"data_dir": Path("/tmp/x")})
    assert socket_directory(near) == Path("/tmp/x/run")


def _keys(model: type[BaseModel]) -> list[str]:
    return [name for name in model.model_fields]


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    documented = set(re.findall(r"^\| `([a-z0-9_.<>]+)` \|", page, re.MULTILINE))
    sections = {"accelerators", "engine", "gateway", "capacity", "weights", "prices", "price_terms"}
    sections |= {"tenants", "endpoints", "billing", "collectors", "remotes", "batch", "links"}
    expected = set(_keys(Config)) - sections
    for section in ("Accelerators", "Engine", "Gateway", "Capacity", "Weights", "Price", "Remote", "Batch", "Links"):
        expected |= set(_keys(getattr(module, f"{section}Config")))
    assert "`webhooks.<tenant>.url`" in page
    expected -= {"webhooks"}  # one row for its two keys
    assert set(_keys(module.PriceTermsConfig)) - expected == {"tenant", "endpoint", "model", "mode"}
    expected |= {f"tenants.{key}" for key in _keys(module.TenantConfig)} | {
        f"endpoints.{key}" for key in _keys(module.EndpointConfig)
    }
    for prefix, section in (("billing", module.BillingConfig), ("collectors.<name>", module.CollectorConfig)):
        expected |= {f"{prefix}.{key}" for key in _keys(section)}
    assert documented == expected


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    (tmp_path / "tidegate.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    loaded: Any = load()
    assert loaded.endpoints[0].tenant == "acme"
