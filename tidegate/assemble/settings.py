"""Configuration → the plain settings each service is built with. Nothing below this floor sees a Config."""

from collections.abc import Callable
from pathlib import Path

from tidegate.assemble.engines import providers, traits
from tidegate.billing.delivery import Collector, Shape
from tidegate.config import Config, EndpointConfig
from tidegate.control import tuning
from tidegate.control.settings import ControlSettings
from tidegate.domain.fleet import Accelerator, Node
from tidegate.gateway.limits import GatewayLimits
from tidegate.node.limits import NodeLimits
from tidegate.policy.reconcile import CoreSettings

DEMO_PERCENT = 60  # of an accelerator: two never fit
OWN_NODE = "node-0"  # on the platform's own machine
SLEPT_SHARE = 64
SLACK_MS = 10_000  # the core waits this much longer than the node before it takes a step for lost


def control_settings(config: Config, accelerators: tuple[Accelerator, ...]) -> ControlSettings:
    return ControlSettings(
        region=config.region,
        engines=traits(config, accelerators),
        providers=providers(config),
        slots=config.engine.slots,
        context_tokens_max=config.engine.context_tokens_max,
        start_ms_max=config.engine.start_ms_max,
        hold_ms_max=config.gateway.hold_ms_max,
        queued_max=config.gateway.queued_max,
        profiles=lambda: {**tuning.shipped(), **tuning.texts(config.data_dir / "profiles")},
    )


def node_limits(config: Config) -> NodeLimits:
    return NodeLimits(
        fetch_ms_max=config.weights.fetch_ms_max,
        start_ms_max=config.engine.start_ms_max,
        drain_ms_max=config.engine.drain_ms_max,
    )


def gateway_limits(config: Config) -> GatewayLimits:
    gateway = config.gateway
    return GatewayLimits(
        body_bytes_max=gateway.body_bytes_max,
        body_ms_max=gateway.body_ms_max,
        hold_ms_max=gateway.hold_ms_max,
        queued_max=gateway.queued_max,
        sessions_max=gateway.sessions_max,
        session_idle_ms_max=gateway.session_idle_ms_max,
    )


def core_settings(config: Config, limits: NodeLimits, accelerators: tuple[Accelerator, ...]) -> CoreSettings:
    """The core's bounds enclose the node's: a step is reported failed by the node before the core gives it up.

    What an engine may keep of an accelerator asleep (a context, a few pages) is a small share of the smallest one.
    """
    return CoreSettings(
        slept_accelerator_bytes_max=min(a.memory_bytes for a in accelerators) // SLEPT_SHARE,
        wait_ms_max=config.capacity.wait_ms_max,
        residency_ms_min=config.capacity.residency_ms_min,
        idle_ms_max=config.capacity.keep_alive_ms,
        prewarm=config.capacity.prewarm,
        start_ms_max=limits.fetch_ms_max + limits.start_ms_max + limits.canary_ms_max + SLACK_MS,
        wake_ms_max=limits.wake_ms_max + limits.canary_ms_max + SLACK_MS,
        sleep_ms_max=limits.drain_ms_max + limits.sleep_ms_max + SLACK_MS,
        stop_ms_max=limits.stop_ms_max + SLACK_MS,
    )


def node_of(config: Config, accelerators: tuple[Accelerator, ...], name: str = OWN_NODE) -> Node:
    """This machine. Its name is fixed so that a restart finds its own replicas' history again."""
    return Node(name, config.region, accelerators, config.host_memory, config.disk)


def demo_endpoints(
    node: Node, path: Callable[[str], Path], names: tuple[str, ...], tenant: str
) -> list[EndpointConfig]:
    """Tiny models that reserve more than half of an accelerator each: so they share it as large ones would."""
    memory = min(accelerator.memory_bytes for accelerator in node.accelerators) * DEMO_PERCENT // 100
    return [EndpointConfig(name=f"{tenant}/{name}", model=str(path(name)), accelerator_memory=memory) for name in names]


def collectors(config: Config) -> list[Collector]:
    """Who is sent usage events. What each has taken is kept under its name in the configuration."""
    return [
        Collector(name, wanted.url, Shape(wanted.format), wanted.token.get_secret_value() if wanted.token else "")
        for name, wanted in config.collectors.items()
    ]
