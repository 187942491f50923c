"""Where an endpoint may send what it does not serve itself: `overflow` and `fallback`, checked against all others."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tidegate.control.refusals import refused
from tidegate.domain.endpoint import Deployment, Mode
from tidegate.domain.errors import Refusal

MODES = (Mode.SERVERLESS, Mode.DEDICATED_SERVERLESS)


def resolved(wanted: Deployment, others: Mapping[str, Deployment]) -> Deployment:
    """`wanted` with an endpoint wherever a mode was named: the first, by name, of that mode that serves the same model
    and may take its requests. Raises Refusal invalid_configuration when there is none.
    """
    named = {to: _of_mode(param, Mode(to), wanted, others) for param, to in _edges(wanted) if to in MODES}
    if not named:
        return wanted
    over = wanted.overflow
    return replace(
        wanted,
        overflow=replace(over, to=named.get(over.to, over.to)) if over is not None else None,
        fallback=named.get(wanted.fallback, wanted.fallback),
    )


def _of_mode(param: str, mode: Mode, wanted: Deployment, others: Mapping[str, Deployment]) -> str:
    every, why_not = {**others, wanted.endpoint: wanted}, "none of that mode serves this model"
    for target in sorted(others.values(), key=lambda other: other.endpoint):
        ours = target.tenant == wanted.tenant or target.mode is Mode.SERVERLESS
        if target.mode is not mode or not ours or target.model.digest != wanted.model.digest:
            continue
        if (mismatch := _mismatch(wanted, target)) is None and not _way_back(target.endpoint, wanted.endpoint, every):
            return target.endpoint
        why_not = f"{target.endpoint} is one, but " + (mismatch[1] if mismatch else "it leads back here")
    accepted = f"a mode that another endpoint with this model has, or an endpoint tenant/name ({why_not})"
    raise refused(param, mode.value, accepted)


def check(wanted: Deployment, others: Mapping[str, Deployment]) -> None:
    """Raises Refusal when `wanted` points where it must not, or is changed so that another may no longer point to it.

    `others` is every other deployment by endpoint. Regions are checked here once for all: an endpoint is only ever
    served in its own regions, so one whose regions are all allowed can take a request without breaking residency.
    """
    every = {**others, wanted.endpoint: wanted}
    for param, to in _edges(wanted):
        _check_edge(param, wanted, to, every)
    for other in others.values():
        for param, to in _edges(other):
            if to == wanted.endpoint and (why := _mismatch(other, wanted)):
                raise Refusal(
                    "conflict", f"{other.endpoint} has it as `{param}`, and {why[1]}; change that endpoint first"
                )


def users(endpoint: str, others: Mapping[str, Deployment]) -> list[str]:
    """Endpoints that send requests to `endpoint`."""
    return sorted(d.endpoint for d in others.values() if endpoint in {to for _, to in _edges(d)} - {d.endpoint})


def _edges(deployment: Deployment) -> Iterator[tuple[str, str]]:
    if deployment.overflow is not None:
        yield "overflow.to", deployment.overflow.to
    if deployment.fallback:
        yield "fallback.to", deployment.fallback


def _check_edge(param: str, wanted: Deployment, to: str, every: Mapping[str, Deployment]) -> None:
    if to == wanted.endpoint:
        raise refused(param, to, "another endpoint than this one")
    target = every.get(to)
    if target is None or not (target.tenant == wanted.tenant or target.mode is Mode.SERVERLESS):
        mine = sorted(d.endpoint for d in every.values() if d.tenant == wanted.tenant and d is not wanted)
        shown = ", ".join(mine[:10]) or "(this tenant has no other)"
        raise refused(param, to, f"an endpoint of this tenant or a serverless one: {shown}")
    if path := _way_back(to, wanted.endpoint, every):
        raise refused(param, to, f"an endpoint that does not lead back here ({' → '.join([wanted.endpoint, *path])})")
    if why := _mismatch(wanted, target):
        raise Refusal(why[0], f"`{param}`: {to!r} is not accepted: {why[1]}", param=param)


def _way_back(start: str, goal: str, every: Mapping[str, Deployment]) -> list[str]:
    """A path along overflow and fallback from `start` to `goal`, both included; empty when there is none."""
    paths, seen = [[start]], {start}
    while paths:
        path = paths.pop()
        deployment = every.get(path[-1])
        for _, to in _edges(deployment) if deployment is not None else ():
            if to == goal:
                return [*path, goal]
            if to not in seen:
                seen.add(to)
                paths.append([*path, to])
    return []


def _mismatch(sender: Deployment, target: Deployment) -> tuple[str, str] | None:
    """(code, why) `target` cannot stand in for `sender`."""
    outside = [region for region in target.regions if region not in sender.regions]
    if outside:
        allowed = ", ".join(sender.regions)
        return "residency_denied", f"it may run in {', '.join(outside)}; requests here may be served in {allowed} only"
    if target.model.kind is not sender.model.kind:
        return "invalid_configuration", f"it serves a {target.model.kind} model, not a {sender.model.kind} one"
    if 0 < target.model.context_tokens_max < sender.model.context_tokens_max:
        most, needed = target.model.context_tokens_max, sender.model.context_tokens_max
        return "invalid_configuration", f"its context is {most} tokens, accepted are {needed} or more"
    if target.mode is Mode.BATCH:
        return "invalid_configuration", "batch endpoints have no capacity of their own"
    return None
