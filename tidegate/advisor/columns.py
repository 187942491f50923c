"""Which column means what: names used by tidegate's own export, LiteLLM spend logs, OpenAI's usage API, vLLM's request
statistics and traces, and by common hand-made tables and access logs.

Sources: LiteLLM `LiteLLM_SpendLogs` (docs.litellm.ai/docs/proxy/ui_logs), OpenAI usage API buckets
(cookbook.openai.com/examples/completions_usage_api), vLLM `RequestStats` fields and its OpenTelemetry span attributes
(docs.vllm.ai, opentelemetry.io/docs/specs/semconv/gen-ai), Azure's public traces.
"""

from collections.abc import Mapping, Sequence

from tidegate.domain.errors import Refusal

# field -> accepted names, the surest first. Compared in lower case, with `_` for spaces and hyphens.
ALIASES: dict[str, tuple[str, ...]] = {
    "t_s": ("t_s",),
    "time": (
        "starttime", "start_time", "startdate", "timestamp", "time", "created", "created_at", "arrival_time", "arrived",
        "request_time", "@timestamp", "starttimeunixnano", "start_time_unix_nano", "timestamp_iso", "date", "datetime",
        "ts", "ts_ms", "timestamp_ms", "time_iso8601", "time_local",
    ),
    "endpoint": (
        "endpoint", "model_group", "model", "model_name", "served_model_name", "gen_ai.request.model",
        "gen_ai.response.model", "deployment", "snapshot_id", "endpoint_name", "deployment_name", "model_id",
    ),
    "input": (
        "input_tokens", "prompt_tokens", "usage.prompt_tokens", "usage.input_tokens", "num_prompt_tokens",
        "gen_ai.usage.prompt_tokens", "gen_ai.usage.input_tokens", "n_context_tokens_total", "context_tokens",
        "contexttokens", "prompt_length", "tokens_in", "n_prompt_tokens",
    ),
    "output": (
        "output_tokens", "completion_tokens", "usage.completion_tokens", "usage.output_tokens",
        "num_generation_tokens", "gen_ai.usage.completion_tokens", "gen_ai.usage.output_tokens",
        "n_generated_tokens_total", "generated_tokens", "generatedtokens", "output_length",
        "tokens_out", "n_completion_tokens",
    ),
    "cached": (
        "cached_tokens", "input_cached_tokens", "cache_read_input_tokens", "prompt_tokens_details.cached_tokens",
        "usage.prompt_tokens_details.cached_tokens", "num_cached_tokens", "cached_context_tokens_total",
    ),
    "count": ("num_model_requests", "n_requests", "requests_total"),
    "end": ("end_time",),
    "service_ms": ("service_ms", "duration_ms", "execution_ms", "gpu_ms"),
    "id": ("request_id", "gen_ai.request.id", "call_id", "id"),
}  # fmt: skip
FIELDS = tuple(ALIASES)
NESTED = ("time", "endpoint", "input", "output", "cached")
"""Fields also found by the end of a log's nested name (`response.usage.prompt_tokens`) where only one ends so."""


def find(file: str, header: Sequence[str], mapping: Mapping[str, str], fixed_time: bool) -> dict[str, int]:
    """field -> column number. `mapping` (field -> column name) wins over the known names. `fixed_time`: every request
    takes a given time, tokens are not needed.

    Raises Refusal naming the file, what is missing and what is there.
    """
    lower = [_plain(name) for name in header]
    found: dict[str, int] = {}
    for field, column in mapping.items():
        if field not in ALIASES:
            raise refuse(f"--columns: {field!r} is not a field; accepted: {', '.join(FIELDS)}")
        name = _plain(column)
        if name not in lower:
            raise refuse(f"{file}: --columns {field}={column}: there is no such column; there are {_some(header)}")
        found[field] = lower.index(name)
    for field, names in ALIASES.items():
        if field not in found:
            known = next((name for name in names if name in lower), None)
            if known is None and field in NESTED:
                known = _nested(names, lower)
            if known is not None:
                found[field] = lower.index(known)
    _check(file, header, found, fixed_time)
    return found


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_").removeprefix("attributes.")


def _nested(names: Sequence[str], header: Sequence[str]) -> str | None:
    for name in names:
        ending = [column for column in header if column.endswith(f".{name}")]
        if len(ending) == 1:
            return ending[0]
    return None


def _check(file: str, header: Sequence[str], found: Mapping[str, int], fixed_time: bool) -> None:
    if "t_s" not in found and "time" not in found:
        raise refuse(
            f"{file}: row 1: no column says when a request arrived; there are {_some(header)}; expected t_s (seconds), "
            f"or a time stamp such as {', '.join(ALIASES['time'][:4])}; name yours with --columns time=COLUMN"
        )
    if fixed_time or "service_ms" in found:
        return
    for field, what in (("input", "input tokens"), ("output", "output tokens")):
        if field not in found:
            raise refuse(
                f"{file}: row 1: no column holds {what}; there are {_some(header)}; expected one of "
                f"{', '.join(ALIASES[field][:4])}; name yours with --columns {field}=COLUMN"
            )


def refuse(message: str) -> Refusal:
    return Refusal("invalid_request", message, param="trace")


def _some(header: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in header[:12])
    return shown + (f" and {len(header) - 12} more" if len(header) > 12 else "")
