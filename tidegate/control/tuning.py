"""Tuning profiles on their way into a deployment: what an owner did not set is taken from the profile he names.

A profile with a curve decides how many requests a replica takes at once, and so where the core wants another one: as
many as served most tokens a second within the SLO of the very endpoint.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from tidegate.control.refusals import refused
from tidegate.domain.endpoint import ModelProfile
from tidegate.wire import profiles
from tidegate.wire.admin import EndpointApply

SHIPPED = Path(__file__).parent / "profiles"
Profiles = Callable[[], Mapping[str, str]]
"""The text of each profile there is, by name."""


def shipped() -> dict[str, str]:
    return texts(SHIPPED)


def texts(folder: Path) -> dict[str, str]:
    """``NAME.toml`` of a folder; none where there is no folder."""
    return {path.stem: path.read_text(errors="replace") for path in sorted(folder.glob("*.toml"))}


def filled(body: EndpointApply, model: ModelProfile, known: Profiles) -> EndpointApply:
    """`body` with what its profile says. Raises Refusal invalid_configuration naming the profile."""
    if not body.profile:
        return body
    texts, wrong = known(), partial(refused, "profile", body.profile)
    if body.profile not in texts:
        raise wrong(f"one of {', '.join(sorted(texts))}, or a file NAME.toml in `profiles` of the data directory")
    try:
        profile = profiles.parse(texts[body.profile])
    except ValueError as error:
        raise wrong(f"a profile that can be read; {body.profile}.toml: {error}") from error
    if profile.engine != body.engine:
        raise wrong(f"a profile of engine {body.engine}; this one is of {profile.engine}")
    if profile.model not in ("", model.digest):
        raise wrong("a profile of this model; this one was measured on another")
    slots = profile.slots
    if profile.curve:
        if profile.percentile < body.slo.percentile:
            raise wrong(f"one measured at p{body.slo.percentile} or above; it is at p{profile.percentile}")
        point = profiles.best(profile, body.slo.ttft_ms, body.slo.tpot_ms)
        if point is None and body.slots is None:
            kept = f"ttft_ms {body.slo.ttft_ms} and tpot_ms {body.slo.tpot_ms}"
            raise wrong(f"a curve on which something keeps the SLO of {kept}; nothing on this one does")
        slots = point.slots if point else None
    arguments = {**profile.engine_args, **body.engine_args}
    return msgspec.structs.replace(body, slots=body.slots or slots, engine_args=arguments)
