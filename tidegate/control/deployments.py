"""A request body → a Deployment: defaults filled in; contradictions refused by field, value and what is accepted."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from tidegate.control import remotes, tuning
from tidegate.control.engines import ADAPTER_ROOM, EngineTraits
from tidegate.control.refusals import refused
from tidegate.control.settings import ControlSettings
from tidegate.domain.endpoint import Deployment, Mode, ModelProfile, Overflow, Scaling, ScheduleEntry, Slo
from tidegate.domain.errors import Refusal
from tidegate.domain.units import GIB, MIB
from tidegate.policy import schedule
from tidegate.wire.admin import NAME_PATTERN, EndpointApply

_NAME = re.compile(NAME_PATTERN)
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*([kmgt]ib|b|)", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": MIB, "gib": GIB, "tib": 1 << 40}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the fleet can hold and has measured. Empty mappings: no node has joined, nothing to check against.

    `accelerator_bytes`: region → bytes of its largest accelerator; `accelerators`: region → most of them on one node;
    `start_ms`: model digest → longest start measured.
    """

    price_plans: Collection[str] = ("default",)
    accelerator_bytes: Mapping[str, int] = field(default_factory=dict)
    accelerators: Mapping[str, int] = field(default_factory=dict)
    start_ms: Mapping[str, int] = field(default_factory=dict)


def split_name(endpoint: str) -> tuple[str, str]:
    """(tenant, name) of ``tenant/name``. Raises Refusal invalid_request."""
    tenant, slash, name = endpoint.partition("/")
    if not slash or not _NAME.match(tenant) or not _NAME.match(name):
        raise Refusal(
            "invalid_request",
            "an endpoint is called tenant/name, each 1 to 63 of a-z 0-9 . _ - with a letter or digit at both ends",
            param="name",
        )
    return tenant, name


def deployment(
    endpoint: str, body: EndpointApply, model: ModelProfile, facts: Facts, settings: ControlSettings, now_ms: int
) -> Deployment:
    """The first generation of `endpoint` as `body` asks. Raises Refusal invalid_configuration naming the field."""
    tenant, _ = split_name(endpoint)
    body = tuning.filled(body, model, settings.profiles)
    traits = _engine(body, model, settings)
    if traits.remote:
        _check_price_plan(body, facts)
        found = settings.providers[remotes.provider_of(model)]
        return remotes.deployment(endpoint, tenant, body, model, found, now_ms)
    regions = tuple(dict.fromkeys(body.regions or [settings.region]))
    _check_regions(regions, facts)
    low, high = _replicas(body)
    _check_price_plan(body, facts)
    model = _with_context(body, model, settings)
    _check_accelerators(body, traits, regions, facts)
    slots, accelerator_bytes = _footprint(body, model, regions, facts, settings, traits)
    _check_times(model, facts, settings)
    overflow = _overflow(body)
    return Deployment(
        endpoint=endpoint,
        tenant=tenant,
        model=model,
        mode=body.mode,
        min_replicas=low,
        max_replicas=high,
        concurrency_target=_concurrency_target(body, slots),
        slots=slots,
        accelerators_per_replica=body.accelerators_per_replica,
        accelerator_bytes=accelerator_bytes,
        host_bytes=model.weight_bytes,
        one_copy=traits.one_copy,
        slo=Slo(body.slo.ttft_ms, body.slo.tpot_ms, body.slo.percentile),
        regions=regions,
        engine=body.engine,
        engine_args=tuple(sorted(body.engine_args.items())),
        price_plan=body.price_plan,
        paused=body.paused,
        created_ms=now_ms,
        movable=traits.movable,
        overflow=overflow,
        fallback=body.fallback.to if body.fallback else overflow.to if overflow else "",
        lend=body.lend,
        schedule=_schedule(body),
        scaling=_scaling(body, settings),
    )


def succeed(previous: Deployment | None, wanted: Deployment) -> Deployment:
    """`wanted` as the next generation of `previous`; `previous` itself where nothing differs."""
    if wanted.canary is not None:
        wanted = replace(wanted, canary=succeed(previous.canary if previous else None, wanted.canary))
    if previous is None:
        return wanted
    same = replace(wanted, generation=previous.generation, created_ms=previous.created_ms, previous=previous.previous)
    if same == previous:
        return previous
    return replace(same, generation=previous.generation + 1, previous=replace(previous, previous=None))


def rolled_back(present: Deployment) -> Deployment:
    """The generation after `present` that is as things were before: without its canary, or as the one before it.

    Raises Refusal conflict when there is nothing to go back to.
    """
    if present.canary is not None:
        return succeed(present, replace(present, canary=None, canary_permille=0))
    if present.previous is None:
        raise Refusal("conflict", f"{present.endpoint} has no canary and was never changed: nothing to go back to")
    return succeed(present, replace(present.previous, canary=None, canary_permille=0))


def _words(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"


def _engine(body: EndpointApply, model: ModelProfile, settings: ControlSettings) -> EngineTraits:
    traits = settings.engines.get(body.engine)
    usable = [name for name, known in settings.engines.items() if not known.missing]
    if traits is None or traits.missing:
        because = f" ({traits.missing})" if traits else ""
        raise refused("engine", body.engine, f"one of {_words(usable)}{because}")
    for name in sorted(body.engine_args):
        pattern = traits.arguments.get(name)
        if pattern is None:
            raise refused(f"engine_args.{name}", body.engine_args[name], f"arguments {_words(traits.arguments)}")
        if not re.fullmatch(pattern, body.engine_args[name]):
            raise refused(f"engine_args.{name}", body.engine_args[name], f"values like {pattern}")
    if traits.remote != model.source.startswith(remotes.SCHEME):
        raise refused("engine", body.engine, "remote with a model remote://PROVIDER/MODEL, and only with one")
    if traits.gguf != model.source.lower().endswith(".gguf"):
        fits = "a GGUF file (a path that ends in .gguf)" if traits.gguf else "a model directory with safetensors files"
        raise refused("engine", body.engine, f"with this model another engine; {body.engine} loads {fits}")
    return traits


def _overflow(body: EndpointApply) -> Overflow | None:
    if body.overflow is None:
        return None
    wanted = body.overflow
    thresholds = (wanted.above_concurrency, wanted.above_queue_ms, wanted.above_ttft_ms)
    given = sum(threshold is not None for threshold in thresholds)
    if given != 1:
        accepted = "exactly one of above_concurrency, above_queue_ms, above_ttft_ms"
        raise refused("overflow", f"{given or 'no'} threshold{'s' * (given != 1)}", accepted)
    return Overflow(wanted.to, *thresholds)


def _check_price_plan(body: EndpointApply, facts: Facts) -> None:
    if body.price_plan not in facts.price_plans:
        raise refused("price_plan", body.price_plan, f"one of {_words(facts.price_plans)}")


def _check_regions(regions: tuple[str, ...], facts: Facts) -> None:
    known = facts.accelerator_bytes
    if known and not any(region in known for region in regions):
        raise refused("regions", ", ".join(regions), f"at least one region with nodes: {_words(known.keys())}")


def _replicas(body: EndpointApply) -> tuple[int, int]:
    dedicated = body.mode is Mode.DEDICATED
    low = body.min_replicas if body.min_replicas is not None else min(body.max_replicas or 1, 1) if dedicated else 0
    high = body.max_replicas if body.max_replicas is not None else max(low, 1)
    if dedicated and low == 0:
        raise refused("min_replicas", 0, "at least 1 with mode dedicated, whose replicas are always resident")
    if body.lend and not dedicated:
        raise refused("lend", True, f"mode dedicated only: what is idle in mode {body.mode.value} is always lent")
    if body.mode is Mode.BATCH and low > 0:
        raise refused("min_replicas", low, "0 with mode batch, which only uses capacity nobody else is using")
    if low > high:
        raise refused("min_replicas", low, f"at most max_replicas = {high}")
    return low, high


def _schedule(body: EndpointApply) -> tuple[ScheduleEntry, ...]:
    for number, entry in enumerate(body.schedule):
        key = f"schedule[{number}]"
        try:
            schedule.parse(entry.cron)
        except ValueError as error:
            raise refused(f"{key}.cron", entry.cron, f"minute hour day month weekday; {error}") from None
        if entry.min_replicas > entry.max_replicas:
            raise refused(f"{key}.min_replicas", entry.min_replicas, f"at most max_replicas = {entry.max_replicas}")
        if body.mode is Mode.BATCH and entry.min_replicas:
            raise refused(f"{key}.min_replicas", entry.min_replicas, "0 with mode batch")
    return tuple(ScheduleEntry(e.cron, e.min_replicas, e.max_replicas, e.utc_offset_minutes) for e in body.schedule)


def _scaling(body: EndpointApply, settings: ControlSettings) -> Scaling:
    wanted = body.scaling
    headroom = wanted.headroom_slots or wanted.headroom_percent
    if body.mode is Mode.BATCH and (wanted.up_window_ms or headroom):
        name = "headroom" if headroom else "up_window_ms"
        given = headroom or wanted.up_window_ms
        raise refused(f"scaling.{name}", given, "0 with mode batch, whose work waits for room")
    if settings.hold_ms_max and wanted.up_window_ms > settings.hold_ms_max:
        accepted = f"at most gateway.hold_ms_max = {settings.hold_ms_max}: nothing is held for longer"
        raise refused("scaling.up_window_ms", wanted.up_window_ms, accepted)
    return Scaling(
        wanted.headroom_slots, wanted.headroom_percent,
        wanted.up_window_ms, wanted.down_window_ms, wanted.zero_window_ms,
    )  # fmt: skip


def _with_context(body: EndpointApply, model: ModelProfile, settings: ControlSettings) -> ModelProfile:
    most = min(model.context_tokens_max, settings.context_tokens_max)
    if body.context_tokens is None:
        return replace(model, context_tokens_max=most)
    if body.context_tokens > most:
        limit = "the model's own" if most == model.context_tokens_max else "this installation's"
        raise refused("context_tokens", body.context_tokens, f"at most {most}, {limit} context")
    return replace(model, context_tokens_max=body.context_tokens)


def _check_accelerators(body: EndpointApply, traits: EngineTraits, regions: tuple[str, ...], facts: Facts) -> None:
    wanted, engine_most = body.accelerators_per_replica, traits.accelerators_per_replica_max
    if wanted > engine_most:
        raise refused("accelerators_per_replica", wanted, f"at most {engine_most} with engine {body.engine}")
    most = max((facts.accelerators.get(region, 0) for region in regions), default=0)
    if facts.accelerators and wanted > most:
        raise refused("accelerators_per_replica", wanted, f"at most {most}, all that one node has")


def _footprint(
    body: EndpointApply, model: ModelProfile, regions: tuple[str, ...], facts: Facts, settings: ControlSettings,
    traits: EngineTraits,
) -> tuple[int, int]:  # fmt: skip
    """(slots, bytes on each accelerator): weights + KV of `slots` whole contexts + workspace.

    Slots that were not asked for by number are as many as fit, up to the default; at least one must.
    """
    shards, context = body.accelerators_per_replica, model.context_tokens_max
    workspace = traits.workspace_bytes or settings.workspace_bytes
    adapters = 2 * int(body.engine_args.get(ADAPTER_ROOM, "0"))
    fixed = -(-model.weight_bytes // shards) + workspace + adapters
    slot = -(-model.kv_bytes_per_token * context // shards)
    largest = max((facts.accelerator_bytes.get(region, 0) for region in regions), default=0)
    asked = None if body.accelerator_memory is None else _size(body.accelerator_memory)
    if asked is not None and largest and asked > largest:
        raise refused("accelerator_memory", asked, f"at most {largest} bytes, the largest accelerator of these regions")
    room = asked if asked is not None else largest or fixed + slot * (body.slots or settings.slots)
    if fixed + slot > room:
        what, where = ("accelerator_memory", "what was asked") if asked else ("model", "the largest accelerator")
        raise Refusal(
            "invalid_configuration",
            f"`{what}`: {where} has {room} bytes; a replica needs {fixed + slot} on each of {shards}: weights "
            f"{model.weight_bytes}, one context of {context} tokens {model.kv_bytes_per_token * context}, workspace; "
            "accepted: a smaller model, fewer context_tokens, more accelerator memory",
            param=what,
        )
    fitting = (room - fixed) // slot if slot else settings.slots
    if body.slots is not None and slot and body.slots > fitting:
        raise refused("slots", body.slots, f"at most {fitting}, with contexts of {context} tokens in {room} bytes")
    slots = body.slots if body.slots is not None else min(settings.slots, fitting)
    return slots, asked if asked is not None else fixed + slot * slots


def _concurrency_target(body: EndpointApply, slots: int) -> int:
    if body.concurrency_target is not None and body.concurrency_target > slots:
        raise refused("concurrency_target", body.concurrency_target, f"at most slots = {slots}")
    return body.concurrency_target or slots


def _check_times(model: ModelProfile, facts: Facts, settings: ControlSettings) -> None:
    """One timeout chain: a start must fit its timeout, and a request must be held long enough to see it end."""
    measured = facts.start_ms.get(model.digest)
    estimate = settings.start_ms_base + model.weight_bytes * 1_000 // settings.load_bytes_per_s
    start_ms, how = (measured, "measured") if measured is not None else (estimate, "estimated")
    for name, bound in (("engine.start_ms_max", settings.start_ms_max), ("gateway.hold_ms_max", settings.hold_ms_max)):
        if start_ms > bound and not (name.startswith("gateway") and bound == 0):
            raise Refusal(
                "invalid_configuration",
                f"`model`: its start takes {start_ms} ms ({how}), longer than the setting {name} = {bound}; "
                "accepted: a smaller model, or a larger setting", param="model",
            )  # fmt: skip


def _size(value: int | str) -> int:
    if isinstance(value, int):
        return value
    match = _SIZE.fullmatch(value.strip())
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size <= 0:
        raise refused("accelerator_memory", value, "bytes as a number, or text such as 512MiB or 1.5GiB")
    return size
