"""Tuning profiles: how an engine is best set for a model on an accelerator, and how fast it then was. TOML files.

engine = "vllm"
source = "measured by tidegate tune on 2026-11-21, load average 0.3"      # or where the advice is from
model = "4f2a…"                 # digest; without it, for any model
engine_args = { max_num_batched_tokens = "8192" }
[[curve]]                       # with so many requests at once
slots = 16
tokens_per_s = 1830.0
ttft_ms = 310.0                 # at `percentile`
tpot_ms = 9.1
"""

import tomllib
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

Above = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]


class Point(Struct, frozen=True, forbid_unknown_fields=True):
    """One replica under real load: `tokens_per_s` are output tokens of all its requests together."""

    slots: Count
    tokens_per_s: Above
    ttft_ms: Above
    tpot_ms: Above


class Profile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`accelerator` as the advisor calls it (``h100``). The curve was measured with prompts and answers of so many
    tokens, TTFT and TPOT at `percentile`. `slots` is for profiles without a curve.
    """

    engine: Annotated[str, Meta(min_length=1)]
    source: Annotated[str, Meta(min_length=1)]
    model: str = ""
    accelerator: str = ""
    accelerators_per_replica: Count = 1
    prompt_tokens: Annotated[int, Meta(ge=0)] = 0
    output_tokens: Annotated[int, Meta(ge=0)] = 0
    percentile: Annotated[int, Meta(ge=1, le=100)] = 99
    slots: Count | None = None
    engine_args: dict[str, str] = {}
    curve: list[Point] = []


def parse(text: str) -> Profile:
    """Raises ValueError saying what is wrong, and where."""
    try:
        return msgspec.convert(tomllib.loads(text), Profile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ValueError(str(error)) from error


def best(profile: Profile, ttft_ms: float, tpot_ms: float) -> Point | None:
    """The point with most tokens a second that keeps within both; None where none does."""
    kept = [point for point in profile.curve if point.ttft_ms <= ttft_ms and point.tpot_ms <= tpot_ms]
    return max(kept, key=lambda point: point.tokens_per_s, default=None)


def written(profile: Profile) -> str:
    """As TOML."""
    lines = []
    for name, value in msgspec.to_builtins(profile).items():
        if name == "curve" or value in ("", None, {}):
            continue
        if isinstance(value, dict):
            value = "{ " + ", ".join(f"{key} = {_text(each)}" for key, each in sorted(value.items())) + " }"
        lines.append(f"{name} = {_text(value) if name in _TEXTS else value}")
    for point in profile.curve:
        lines += ["", "[[curve]]", *(f"{name} = {value}" for name, value in msgspec.to_builtins(point).items())]
    return "\n".join(lines) + "\n"


_TEXTS = ("engine", "source", "model", "accelerator")


def _text(value: object) -> str:
    """A JSON string is a TOML basic string."""
    return msgspec.json.encode(str(value)).decode()
