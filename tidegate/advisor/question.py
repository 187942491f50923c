"""From options, as the command line and the REST API have them, to a Question."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tidegate.advisor.advise import Question
from tidegate.advisor.columns import refuse
from tidegate.advisor.costs import Need
from tidegate.advisor.hardware import Measured, model_named
from tidegate.advisor.read import shortness
from tidegate.advisor.traffic import Traffic

ENDPOINTS_SHOWN = 8


def build(options: Mapping[str, Any]) -> Question:
    """Options left out have the defaults of Need and Question. Raises Refusal naming the option."""
    measured = options.get("profile")
    if measured is not None and not isinstance(measured, Measured):  # the REST API passes on what it was sent
        raise refuse("profile: a measured curve is a file of `tidegate advise`")
    plain = Need(model=replace(model_named(str(options.get("model", "llama-8b"))), measured=measured))
    need = replace(
        plain,
        slo_ttft_ms=_above_zero(options, "slo_ttft_ms", plain.slo_ttft_ms),
        tpot_ms=_above_zero(options, "tpot_ms", plain.tpot_ms),
        private=bool(options.get("private", False)),
        promised=bool(options.get("promised", False)),
        apart=bool(options.get("models_apart", False)),
        side_by_side=max(1, int(options.get("side_by_side", 1))),
        exhaustive=bool(options.get("exhaustive", False)),
    )
    return Question(
        need, float(options.get("async_share", 0.0)), tuple(options.get("provider", ())), options.get("current")
    )


def only(traffic: Traffic, endpoint: str | None) -> Traffic:
    """One endpoint of it, or all. Raises Refusal naming the endpoints there are."""
    if endpoint is None:
        return traffic
    if endpoint not in traffic.endpoints:
        names = ", ".join(traffic.endpoints[:ENDPOINTS_SHOWN])
        more = (
            f" and {len(traffic.endpoints) - ENDPOINTS_SHOWN} more" if len(traffic.endpoints) > ENDPOINTS_SHOWN else ""
        )
        raise refuse(f"--endpoint: {endpoint[:60]!r} is not in {traffic.name}; there are {names}{more}")
    part = traffic.chosen(traffic.endpoint_of == traffic.endpoints.index(endpoint), f"{traffic.name}: {endpoint}")
    if len(part) < 2:
        raise refuse(f"--endpoint: {endpoint[:60]!r} has one request in {traffic.name}; at least 2 are needed")
    whole = shortness(len(traffic), traffic.span_ms)  # said of all endpoints; what counts is what this one has
    notes = [note for note in traffic.notes if note not in whole]
    return replace(
        part, endpoint_of=np.zeros(len(part), np.int32), endpoints=(endpoint,),
        notes=(*notes, *shortness(len(part), part.span_ms)),
    )  # fmt: skip


def _above_zero(options: Mapping[str, Any], name: str, default: float) -> float:
    value = float(options.get(name, default))
    if not 0 < value < float("inf"):
        raise refuse(f"--{name.replace('_', '-')}: {value:g}; expected milliseconds above 0")
    return value
