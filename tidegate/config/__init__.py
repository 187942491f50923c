"""One TOML file + ``TIDEGATE_*`` environment → one frozen `Config`, all of it validated at start.

Nobody below `assemble` reads configuration: services get plain dataclasses. What contradicts itself is refused here
with the key's name and the reason, before anything is started. Every key is described in docs/configuration.md.
"""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from tidegate.config.sections import (
    AcceleratorsConfig,
    BatchConfig,
    BillingConfig,
    CapacityConfig,
    CollectorConfig,
    EndpointConfig,
    EngineConfig,
    ForeignEngine,
    GatewayConfig,
    LinksConfig,
    Name,
    OverflowConfig,
    PriceConfig,
    PriceTermsConfig,
    RemoteConfig,
    Size,
    TenantConfig,
    WeightsConfig,
    parse_size,
)
from tidegate.domain.endpoint import Mode
from tidegate.domain.units import GIB, nano_usd_per_token

__all__ = [
    "BatchConfig",
    "Config",
    "ConfigError",
    "EndpointConfig",
    "ForeignEngine",
    "OverflowConfig",
    "PriceConfig",
    "PriceTermsConfig",
    "WeightsConfig",
    "load",
    "parse_size",
    "socket_directory",
]


class ConfigError(Exception):
    """Configuration that is wrong or contradicts itself. `problems` are (key, reason), safe to show, never a secret."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{key}: {reason}" for key, reason in problems))
        self.problems = problems


class Config(BaseSettings):
    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="TIDEGATE_",
        env_nested_delimiter="__",
        env_parse_none_str="none",
        hide_input_in_errors=True,
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    data_dir: Path = Path(".tidegate")
    region: Name = "local"
    database_url: SecretStr | None = None
    admin_key: SecretStr | None = Field(default=None, min_length=16)
    demo: bool = True
    host_memory: Size = 2 * GIB
    disk: Size = 64 * GIB
    accelerators: AcceleratorsConfig = Field(default_factory=AcceleratorsConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    links: LinksConfig = Field(default_factory=LinksConfig)
    capacity: CapacityConfig = Field(default_factory=CapacityConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    weights: WeightsConfig = Field(default_factory=WeightsConfig)
    billing: BillingConfig = Field(default_factory=BillingConfig)
    collectors: dict[Name, CollectorConfig] = Field(default_factory=dict)
    prices: dict[str, PriceConfig] = Field(default_factory=lambda: {"default": PriceConfig()})
    price_terms: tuple[PriceTermsConfig, ...] = ()
    remotes: dict[Name, RemoteConfig] = Field(default_factory=dict)
    tenants: tuple[TenantConfig, ...] = ()
    endpoints: tuple[EndpointConfig, ...] = ()

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(f"{key}\t{reason}" for key, reason in problems))
        return self


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads `path` (or ``tidegate.toml`` here, if there is one), then the environment, then `overrides` (options).

    Later sources win. Raises ConfigError naming each wrong key.
    """
    file = path if path is not None else Path("tidegate.toml")
    if path is not None and not path.is_file():
        raise ConfigError([(str(path), "no such file")])

    class Loaded(Config):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=file)

    try:
        return Loaded(**{key: value for key, value in (overrides or {}).items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_problems(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([(str(file), f"not valid TOML: {error}")]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([(str(file), str(error))]) from None


def socket_directory(config: Config) -> Path:
    """Where Unix sockets live: in the data directory unless its path is too long for one (Linux allows 107 bytes)."""
    preferred = config.data_dir.resolve() / "run"
    if len(os.fsencode(preferred)) <= _SOCKET_DIRECTORY_BYTES_MAX:
        return preferred
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp")
    return base / f"tidegate-{os.getuid()}-{os.getpid()}"


_SOCKET_DIRECTORY_BYTES_MAX = 64


def _contradictions(config: Config) -> list[tuple[str, str]]:
    return [*_contradicting_timeouts(config), *_contradicting_prices(config), *_contradicting_endpoints(config)]


def _contradicting_timeouts(config: Config) -> list[tuple[str, str]]:
    """One chain: residency < wait bound ≤ hold, a hold outlasts the longest start."""
    gateway, engine, capacity = config.gateway, config.engine, config.capacity
    problems = []
    if 0 < gateway.hold_ms_max < engine.start_ms_max:
        problems.append(
            (
                "gateway.hold_ms_max",
                f"{gateway.hold_ms_max} is shorter than engine.start_ms_max = {engine.start_ms_max}: a request to a "
                "cold endpoint would be given up while its engine still starts (0 means never hold)",
            )
        )
    if gateway.hold_ms_max and capacity.wait_ms_max > gateway.hold_ms_max:
        problems.append(
            (
                "capacity.wait_ms_max",
                f"{capacity.wait_ms_max} is longer than gateway.hold_ms_max = {gateway.hold_ms_max}: "
                "no request would live long enough to see the bound kept",
            )
        )
    if capacity.residency_ms_min >= capacity.wait_ms_max:
        problems.append(
            (
                "capacity.residency_ms_min",
                f"{capacity.residency_ms_min} is not shorter than capacity.wait_ms_max = {capacity.wait_ms_max}: "
                "a waiting endpoint could not be served within its bound",
            )
        )
    return problems


def _contradicting_prices(config: Config) -> list[tuple[str, str]]:
    terms = [price.terms for price in config.price_terms]
    named = [(f"prices.{plan}", price) for plan, price in config.prices.items()]
    named += [(f"price_terms.{index}", price) for index, price in enumerate(config.price_terms)]
    problems = [
        (f"price_terms.{index}", "names nothing; accepted: any of tenant, endpoint, model, mode (or [prices.<plan>])")
        for index, names in enumerate(terms)
        if not any(names)
    ]
    problems += [
        (f"price_terms.{index}", "the same terms are declared twice")
        for index, names in enumerate(terms)
        if names in terms[:index]
    ]
    return problems + [
        (
            f"{key}.cached_input_usd_per_million_tokens",
            f"{price.cached_input_usd_per_million_tokens} is dearer than the input price "
            f"{price.input_usd_per_million_tokens}; cached tokens cost at most what fresh ones do",
        )
        for key, price in named
        if nano_usd_per_token(price.cached_input_usd_per_million_tokens)
        > nano_usd_per_token(price.input_usd_per_million_tokens)
    ]


def _contradicting_endpoints(config: Config) -> list[tuple[str, str]]:
    problems, seen = [], set()
    tenants = [tenant.id for tenant in config.tenants]
    problems += [
        ("tenants", f"{twice!r} is declared twice") for twice in sorted({t for t in tenants if tenants.count(t) > 1})
    ]
    for index, endpoint in enumerate(config.endpoints):
        key = f"endpoints.{index}"
        if endpoint.name in seen:
            problems.append((f"{key}.name", f"{endpoint.name!r} is declared twice"))
        seen.add(endpoint.name)
        if endpoint.tenant not in tenants:
            problems.append((f"{key}.name", f"tenant {endpoint.tenant!r} is not declared under [[tenants]]"))
        if endpoint.price_plan not in config.prices:
            problems.append((f"{key}.price_plan", f"{endpoint.price_plan!r} is not one of {sorted(config.prices)}"))
        if endpoint.min_replicas is not None and endpoint.min_replicas > endpoint.max_replicas:
            problems.append(
                (f"{key}.min_replicas", f"{endpoint.min_replicas} is more than max_replicas = {endpoint.max_replicas}")
            )
        if endpoint.mode is Mode.DEDICATED and endpoint.min_replicas == 0:
            problems.append(
                (f"{key}.min_replicas", "0 contradicts mode = dedicated, which is always resident; at least 1")
            )
    return problems


_NAMES = "a name of a to z, 0 to 9 and . _ - inside, at most 63 characters"
_PATTERNS = {
    "url": "a URL, http:// or https://",
    "hub_url": "a URL, http:// or https://",
    "s3_endpoint": "a URL, http:// or https://",
    "key_env": "the name of an environment variable",
    "name": "TENANT/NAME of a to z, 0 to 9 and . _ -",
    "listen": "HOST:PORT",
    "address": "HOST:PORT",
}


def _problems(error: ValidationError) -> list[tuple[str, str]]:
    """pydantic's findings as (key, reason). Values are left out: a mistyped secret must not end up on a screen."""
    found = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        key, message = ".".join(str(part) for part in item["loc"]), item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "unknown key; docs/configuration.md lists them all"
        if item["type"] == "too_short":
            message = "too short: a secret has at least 16 characters"
        if item["type"] == "string_pattern_mismatch":
            message = f"expected {_PATTERNS.get(str(item['loc'][-1]), _NAMES)}"
        if not key:
            found += [(k, reason) for k, _, reason in (line.partition("\t") for line in message.split("\n"))]
        else:
            found.append((key, message))
    return found
