"""Builds the batch service: its vault and keys, and the control plane as it sees it."""

import asyncio
import base64
import secrets
from collections.abc import Mapping
from pathlib import Path

from tidegate.assemble.credentials import write_private
from tidegate.assemble.ground import Ground
from tidegate.assemble.sockets import StartError
from tidegate.batch.ports import BatchSettings, Model, Offer, Webhook
from tidegate.batch.service import BatchService
from tidegate.config import Config
from tidegate.control.batch_lanes import REPLICAS_MAX, SUFFIX
from tidegate.control.catalog import model_name
from tidegate.control.service import Control
from tidegate.domain.endpoint import Mode
from tidegate.domain.errors import Refusal
from tidegate.domain.money_ports import PriceBook
from tidegate.domain.ports import Clock
from tidegate.money.prices import PriceTable, Sold
from tidegate.money.rating import percent_half_even, token_cost_nano_usd
from tidegate.stores.vault import KEY_BYTES, Keyring, Vault
from tidegate.wire.batch import StoredBatch

KEY_FILE = "batch.key"
VAULT = "batch"


def runner_secret() -> str:
    """The runner's key: new at each start, known to gateways by its digest, never stored."""
    return secrets.token_urlsafe(32)


async def batch_service(
    config: Config, ground: Ground, control: Control, url: str, secret: str, clock: Clock
) -> BatchService:
    """Raises StartError for a key that cannot be used, StoreFault for files that cannot be rewrapped."""
    vault = Vault(ground.data / VAULT, await asyncio.to_thread(_keyring, config, ground.data))
    await asyncio.to_thread(vault.rewrap)
    settings = BatchSettings(
        gateway_url=url,
        runner_secret=secret,
        retention_s=config.batch.retention_s,
        may_rush=config.batch.may_rush,
        line_bytes_max=config.gateway.body_bytes_max,
        webhooks={
            tenant: Webhook(hook.url, hook.secret.get_secret_value()) for tenant, hook in config.batch.webhooks.items()
        },
    )
    return BatchService(
        store=ground.batches, vault=vault, fleet=_Fleet(control, ground.prices, clock), clock=clock, settings=settings
    )


def _keyring(config: Config, data: Path) -> Keyring:
    """From the environment or the configuration, a named file, or a file of our own made at the first start."""
    batch = config.batch
    if batch.key is not None:
        where, text = "batch.key", batch.key.get_secret_value()
    else:
        path = batch.key_file or data / KEY_FILE
        where = str(path)
        if batch.key_file is None and not path.exists():
            write_private(path, base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode() + "\n")
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"{where}: the key of stored files cannot be read ({type(error).__name__})") from error
    try:
        return Keyring.parse(text)
    except ValueError as error:
        raise StartError(f"{where}: {error}; one base64 key of {KEY_BYTES} bytes a line, newest first") from None


class _Fleet:
    """Implements `batch.ports.Fleet` on the control plane in this process."""

    def __init__(self, control: Control, prices: PriceBook, clock: Clock) -> None:
        self._control = control
        self._prices = prices
        self._clock = clock

    def model(self, tenant: str, name: str) -> Model:
        found = self._control.desired.deployment(name if "/" in name else f"{tenant}/{name}")
        if found is None or not (found.tenant == tenant or (found.mode is Mode.SERVERLESS and not found.base)):
            raise Refusal("model_not_found", f"no such model: {name[:200]}", param="model")
        if found.engine == "remote":
            message = f"{name[:200]} is served by another provider: a batch runs on idle accelerators of this platform"
            raise Refusal("invalid_request", message, param="model")
        return Model(found.endpoint, found.model.kind)

    def offer(self, endpoint: str) -> Offer:
        desired = self._control.desired
        deployment = desired.deployment(endpoint)
        owner = desired.deployment(deployment.base) if deployment is not None and deployment.base else deployment
        if owner is None:
            return Offer(0, 1, 1)
        lane = owner.endpoint if owner.mode is Mode.BATCH else owner.endpoint + SUFFIX
        route = self._control.loop.route(lane)
        ready = len(route.targets) if route is not None else 0
        most = owner.max_replicas if owner.mode is Mode.BATCH else REPLICAS_MAX
        return Offer(ready, owner.slots, most)

    def cost_nano_usd(self, batch: StoredBatch) -> int | None:
        deployment = self._control.desired.deployment(batch.model)
        if deployment is None:
            return None
        sold = Sold(batch.tenant, batch.model, model_name(deployment.model), Mode.BATCH.value)
        table = PriceTable(self._prices.versions())
        price = table.in_force(deployment.price_plan, self._clock.now_ms(), sold)
        if price is None:
            return None
        tokens = token_cost_nano_usd(batch.input_tokens, batch.cached_tokens, batch.output_tokens, price)
        return percent_half_even(tokens, price.batch_percent)

    async def work(self, wanted: Mapping[str, bool]) -> None:
        await self._control.batch_work(wanted)
