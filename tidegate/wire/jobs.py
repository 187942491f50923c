"""The job APIs of RunPod (docs.runpod.io/serverless) and Replicate (replicate.com/docs/reference/http) as batches of
one line. Pure: what is asked as a request of ours, and a batch in their words.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import Struct

from tidegate.domain.errors import Refusal
from tidegate.wire.batch import URLS, LineFault, LineResponse, Status, StoredBatch

RUNPOD = {
    Status.VALIDATING: "IN_QUEUE",
    Status.IN_PROGRESS: "IN_PROGRESS",
    Status.FINALIZING: "IN_PROGRESS",
    Status.COMPLETED: "COMPLETED",
    Status.FAILED: "FAILED",
    Status.EXPIRED: "TIMED_OUT",
    Status.CANCELLING: "CANCELLED",
    Status.CANCELLED: "CANCELLED",
}
REPLICATE = {
    Status.VALIDATING: "starting",
    Status.IN_PROGRESS: "processing",
    Status.FINALIZING: "processing",
    Status.COMPLETED: "succeeded",
    Status.FAILED: "failed",
    Status.EXPIRED: "failed",
    Status.CANCELLING: "canceled",
    Status.CANCELLED: "canceled",
}
_SAME = {"max_new_tokens": "max_tokens", "max_length": "max_tokens", "stop_sequences": "stop"}  # Replicate's names


class RunRequest(Struct, forbid_unknown_fields=True, frozen=True):
    """RunPod's `/run` and `/runsync`. `webhook` and the like are refused by name: only an operator names URLs here."""

    input: dict[str, Any]


class PredictionRequest(Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Replicate's `POST /v1/predictions`; `model` and `version` both name an endpoint."""

    input: dict[str, Any]
    model: str | None = None
    version: str | None = None
    stream: bool | None = None


class Line(Struct):
    """What came of the one line."""

    response: LineResponse | None = None
    error: LineFault | None = None


class _Fault(Struct):
    message: str = ""


class _Refused(Struct):
    error: _Fault | None = None


def run_call(endpoint: str, given: dict[str, Any]) -> tuple[str, bytes]:
    """(url, body) of RunPod's vLLM worker: `openai_route` with `openai_input`, else `messages` or `prompt` with
    `sampling_params`.
    """
    if "openai_route" in given:
        url, body = given["openai_route"], given.get("openai_input")
        if url not in URLS or not isinstance(body, dict):
            message = f"`input.openai_route`: accepted: {', '.join(URLS)}, with `input.openai_input` an object"
            raise Refusal("invalid_request", message, param="input.openai_route")
        return str(url), msgspec.json.encode(body | {"model": endpoint})
    sampling = given.get("sampling_params") or {}
    if not isinstance(sampling, dict):
        raise Refusal("invalid_request", "`input.sampling_params`: accepted: an object", param="input.sampling_params")
    rest = {name: value for name, value in given.items() if name != "sampling_params"}
    return _call({"model": endpoint} | rest | sampling)


def prediction_call(endpoint: str, given: dict[str, Any]) -> tuple[str, bytes]:
    """(url, body) of a prediction: a `prompt` (with `system_prompt`) is a chat of one turn."""
    body = {"model": endpoint} | {_SAME.get(name, name): value for name, value in given.items()}
    if "messages" not in body and "prompt" in body:
        system = body.pop("system_prompt", None)
        body["messages"] = [{"role": "system", "content": system}] if system else []
        body["messages"].append({"role": "user", "content": body.pop("prompt")})
    return _call(body)


def _call(body: dict[str, Any]) -> tuple[str, bytes]:
    for name, url in (("messages", URLS[0]), ("prompt", URLS[1]), ("input", URLS[2])):
        if name in body:
            return url, msgspec.json.encode(body)
    raise Refusal("invalid_request", "`input`: `messages`, `prompt` or `openai_input` is missing", param="input")


def run_view(batch: StoredBatch, line: Line | None) -> dict[str, Any]:
    """RunPod's status object; times in milliseconds."""
    status = _failed_line(RUNPOD[batch.status], line, "FAILED")
    view: dict[str, Any] = {"id": batch.id, "status": status}
    if batch.in_progress_ms is not None:
        view["delayTime"] = batch.in_progress_ms - batch.created_ms
        if batch.ended_ms is not None:
            view["executionTime"] = batch.ended_ms - batch.in_progress_ms
    if line is not None and status == "COMPLETED" and line.response is not None:
        view["output"] = line.response.body
    elif (error := _error(batch, line)) is not None:
        view["error"] = error
    return view


def prediction_view(batch: StoredBatch, line: Line | None) -> dict[str, Any]:
    """Replicate's prediction. `output` is the answer as it came, in OpenAI's shape."""
    status = _failed_line(REPLICATE[batch.status], line, "failed")
    path = f"/v1/predictions/{batch.id}"
    done = line is not None and status == "succeeded" and line.response is not None
    return {
        "id": batch.id,
        "model": batch.model or None,
        "version": batch.model or None,
        "status": status,
        "output": line.response.body if done and line is not None and line.response is not None else None,
        "error": _error(batch, line),
        "created_at": _iso(batch.created_ms),
        "started_at": _iso(batch.in_progress_ms),
        "completed_at": _iso(batch.ended_ms),
        "urls": {"get": path, "cancel": f"{path}/cancel"},
    }


def _failed_line(status: str, line: Line | None, failed: str) -> str:
    """A batch whose only line was refused has ended well; a job has not."""
    answered = line is None or (line.response is not None and line.response.status_code == 200)
    return status if answered or line is None or line.response is None else failed


def _error(batch: StoredBatch, line: Line | None) -> str | None:
    if batch.errors:
        return batch.errors[0].message
    if line is None:
        return None
    if line.error is not None:
        return line.error.message
    if line.response is not None and line.response.status_code != 200:
        refused = msgspec.json.decode(line.response.body, type=_Refused).error
        return refused.message if refused is not None else f"status {line.response.status_code}"
    return None


def _iso(at_ms: int | None) -> str | None:
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).isoformat()
