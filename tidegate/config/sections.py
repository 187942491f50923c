"""The sections of the configuration, one class each, with what their values may be."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from tidegate.domain.endpoint import Mode
from tidegate.domain.units import GIB, MIB, nano_usd, nano_usd_per_token
from tidegate.wire import webhooks

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": MIB, "gib": GIB, "tib": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]ib|b|)", re.IGNORECASE)
_NAME = r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$"


def parse_size(value: object) -> object:
    """Bytes of ``"96MiB"``, ``"1.5 GiB"`` or a plain integer. ValueError says what is accepted."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes as a number or text such as 512MiB or 1.5GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _exact_price(per_token: bool) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, float):
            raise ValueError(f'write the amount as text, e.g. "{value}", so that it stays exact')
        text = str(value)
        nano_usd_per_token(text) if per_token else nano_usd(text)
        return text

    return BeforeValidator(check)


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
UsdPerMillionTokens = Annotated[str, _exact_price(per_token=True)]
UsdPerHour = Annotated[str, _exact_price(per_token=False)]
Name = Annotated[str, Field(pattern=_NAME)]
HostPort = Annotated[str, Field(pattern=r"^$|^(\[[0-9a-fA-F:]+\]|[^\s/:]+):\d{1,5}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class AcceleratorsConfig(Section):
    """`auto` takes the NVIDIA GPUs it finds and otherwise CPU accelerators; `count` and `memory` shape the latter."""

    kind: Literal["auto", "cpu", "nvidia"] = "auto"
    count: int = Field(default=2, ge=1, le=1024)
    memory: Size = 2 * GIB


ForeignEngine = Literal["llamacpp", "vllm", "sglang", "trtllm"]


class EngineConfig(Section):
    threads: int = Field(default=0, ge=0, le=1024)
    slots: int = Field(default=8, ge=1, le=1024)
    context_tokens_max: int = Field(default=4096, ge=16)
    start_ms_max: int = Field(default=120_000, ge=1_000)
    drain_ms_max: int = Field(default=60_000, ge=100)
    programs: dict[ForeignEngine, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)


class RemoteConfig(Section):
    """An OpenAI-compatible API elsewhere. Its key is named, never written here: a variable or a file gateways read."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s/]+(/[^\s?#]*)?$")]
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    key_file: Path | None = None
    ca_file: Path | None = None
    concurrency_max: int = Field(default=16, ge=1, le=10_000)
    connect_ms_max: int = Field(default=5_000, ge=100)
    first_byte_ms_max: int = Field(default=60_000, ge=100)
    continuous_usage: bool = False
    context_tokens_max: int = Field(default=131_072, ge=16)
    region: Name = "remote"

    @model_validator(mode="after")
    def _keys_stay_secret(self) -> Self:
        if self.key_env and self.key_file:
            raise ValueError("key_env and key_file are both set; accepted is one of them")
        url = urlsplit(self.url)
        if "@" in url.netloc:
            raise ValueError("the URL holds credentials; accepted is a URL without, and key_env or key_file")
        plain = url.scheme == "http" and url.hostname not in ("127.0.0.1", "::1", "localhost")
        if plain and (self.key_env or self.key_file):
            raise ValueError("a key would travel in the clear; accepted with a key is https, or http to this machine")
        return self


class GatewayConfig(Section):
    body_bytes_max: Size = 8 * MIB
    body_ms_max: int = Field(default=30_000, ge=100)
    hold_ms_max: int = Field(default=150_000, ge=0)
    queued_max: int = Field(default=512, ge=1)
    sessions_max: int = Field(default=64, ge=1)
    session_idle_ms_max: int = Field(default=300_000, ge=1_000, le=600_000)  # a drain waits for it, and not for ever


class LinksConfig(Section):
    """Parts of the platform on other machines. `listen` and `address` are ``HOST:PORT``; without `listen` no other
    machine can join, and a joined node takes any free port.
    """

    listen: HostPort = ""
    address: HostPort = ""
    ca_file: Path | None = None
    ca_key_file: Path | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.ca_file is None) != (self.ca_key_file is None):
            raise ValueError("ca_file and ca_key_file belong together; accepted is both, or neither")
        return self


class CapacityConfig(Section):
    """Bounds of the capacity core. Quiet for `keep_alive_ms`, an endpoint gives its accelerator memory back."""

    keep_alive_ms: int = Field(default=600_000, ge=0)
    residency_ms_min: int = Field(default=200, ge=0)
    wait_ms_max: int = Field(default=10_000, ge=100)
    prewarm: bool = True


class WeightsConfig(Section):
    """Where weights come from. Secrets not given here are looked for where each library's users keep them.

    `cache_dir`: the disk cache, which nodes of one machine share; else ``weights`` in the platform's data directory.
    """

    cache_dir: Path | None = None
    hub_url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    hub_token: SecretStr | None = None
    hub_token_file: Path | None = None
    s3_endpoint: Annotated[str, Field(pattern=r"^(https?://.+)?$")] = ""
    s3_region: str = ""
    s3_credentials_file: Path | None = None
    connections: int = Field(default=8, ge=1, le=64)
    fetch_ms_max: int = Field(default=3_600_000, ge=1_000)


class PriceConfig(Section):
    """One price plan in decimal USD, as text so that it stays exact."""

    input_usd_per_million_tokens: UsdPerMillionTokens = "0.20"
    cached_input_usd_per_million_tokens: UsdPerMillionTokens = "0.10"
    output_usd_per_million_tokens: UsdPerMillionTokens = "0.60"
    accelerator_hour_usd: UsdPerHour = "2.50"
    accelerator_hours_usd: dict[str, UsdPerHour] = Field(default_factory=dict)
    minimum_usd: UsdPerHour = "0"
    batch_percent: int = Field(default=50, ge=0, le=100)


class PriceTermsConfig(PriceConfig):
    """A price for what its terms name, ahead of every plan; at least one of them is given."""

    tenant: Name | None = None
    endpoint: str | None = None
    model: str | None = None
    mode: Mode | None = None

    @property
    def terms(self) -> tuple[str, str, str, str]:
        return (self.endpoint or "", self.tenant or "", self.model or "", self.mode.value if self.mode else "")


def _webhook_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{value!r} is not an http or https URL")
    return value


def _webhook_secret(value: SecretStr) -> SecretStr:
    webhooks.secret_bytes(value.get_secret_value())
    return value


class WebhookConfig(Section):
    url: Annotated[str, AfterValidator(_webhook_url)]
    secret: Annotated[SecretStr, AfterValidator(_webhook_secret)]


class BatchConfig(Section):
    """Offline work. `key` or `key_file`: base64 of 32 bytes a line, newest first; neither: a key of our own is made."""

    key: SecretStr | None = None
    key_file: Path | None = None
    retention_s: int = Field(default=30 * 86_400, ge=3_600)
    may_rush: bool = False
    webhooks: dict[Name, WebhookConfig] = Field(default_factory=dict)


class BillingConfig(Section):
    """`record_days`: usage records older than this are removed (sums and entries stay); 0 keeps them for ever.
    `machine_hour_usd`: what the operator pays for an accelerator-hour; `machine_hours_usd`: of kinds that cost another.
    """

    record_days: int = Field(default=0, ge=0)
    machine_hour_usd: UsdPerHour | None = None
    machine_hours_usd: dict[str, UsdPerHour] = Field(default_factory=dict)

    @field_validator("record_days")
    @classmethod
    def _long_enough(cls, days: int) -> int:
        if days == 1:
            raise ValueError("1 is too few; accepted: 0 (for ever), or 2 and more")
        return days


class CollectorConfig(Section):
    """A metering system that is sent an event a request: OpenMeter (``cloudevents``) or Lago (``lago``)."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$")]
    format: Literal["cloudevents", "lago"] = "cloudevents"
    token: SecretStr | None = None


class TenantConfig(Section):
    id: Name
    api_key: SecretStr | None = Field(default=None, min_length=16)


class OverflowConfig(Section):
    """See `overflow` of an endpoint: exactly one threshold, which is checked when the endpoint is applied."""

    to: str = Field(min_length=3)
    above_concurrency: int | None = Field(default=None, ge=1)
    above_queue_ms: int | None = Field(default=None, ge=0)
    above_ttft_ms: int | None = Field(default=None, ge=1)


class ScalingConfig(Section):
    """See `scaling` of an endpoint; what contradicts the rest is refused when the endpoint is applied."""

    headroom_slots: int = Field(default=0, ge=0, le=100_000)
    headroom_percent: int = Field(default=0, ge=0, le=1_000)
    up_window_ms: int = Field(default=0, ge=0, le=3_600_000)
    down_window_ms: int | None = Field(default=None, ge=0, le=86_400_000)
    zero_window_ms: int | None = Field(default=None, ge=0, le=604_800_000)


class EndpointConfig(Section):
    """One endpoint to have from the first start; later changes go through `tidegate endpoints apply`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9._-]+/[a-z0-9._-]+$")]
    model: str = Field(min_length=1)
    mode: Mode = Mode.DEDICATED_SERVERLESS
    min_replicas: int | None = Field(default=None, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    engine: str = "builtin"
    engine_args: dict[str, str] = Field(default_factory=dict)
    profile: str = ""
    slots: int | None = Field(default=None, ge=1, le=1024)
    context_tokens: int | None = Field(default=None, ge=16)
    accelerator_memory: Size | None = None
    price_plan: str = "default"
    regions: tuple[Name, ...] | None = Field(default=None, min_length=1)
    overflow: OverflowConfig | None = None
    fallback: str = ""
    lend: bool = False
    scaling: ScalingConfig = Field(default_factory=ScalingConfig)

    @property
    def tenant(self) -> str:
        return self.name.split("/", 1)[0]
