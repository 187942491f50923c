"""LoRA adapters on engines that are not ours: each loaded when it is first asked for, by the engine's own route.

vLLM's (https://docs.vllm.ai/en/latest/features/lora.html): ``POST /v1/load_lora_adapter``, then requests name the
adapter as their model. It is loaded under the endpoint's name and a piece of its digest, so an endpoint applied anew
with other files is another adapter to the engine, and each answer says which one made it.
"""

import asyncio
import re
from urllib.parse import unquote

import msgspec

from tidegate.domain.errors import EngineFault, Refusal
from tidegate.gateway.upstream import Pool
from tidegate.wire.internal import EndpointEntry

KNOWN_MAX = 100_000  # pairs of a replica and an adapter; then all are asked for anew
LOAD_MS_MAX = 60_000
ANSWER_BYTES_MAX = 64 << 10
DIGEST_CHARS = 16
_HEAD = (
    b"POST /v1/load_lora_adapter HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n"
)
_ALREADY = b"already been loaded"
_PATH = re.compile(r"(?:/[\w.@+-]+)+/")


def needs_loading(entry: EndpointEntry) -> bool:
    """Whether its engine knows an adapter only once it was told. Ours reads it with the request."""
    return bool(entry.adapter) and entry.metering != "sse_id"


def name_of(entry: EndpointEntry) -> str:
    """What the engine is to call the adapter of `entry`."""
    return f"{entry.endpoint}@{entry.adapter.partition(' ')[0][:DIGEST_CHARS]}"


async def load(pool: Pool, address: str, entry: EndpointEntry) -> None:
    """Returns once the engine at `address` has the adapter. EngineFault when it does not answer; Refusal when it does
    not take it.
    """
    name = name_of(entry)
    if (address, name) in pool.adapters:
        return
    body = msgspec.json.encode({"lora_name": name, "lora_path": unquote(entry.adapter.partition(" ")[2])})
    connection = pool.take(address) or await pool.connect(address)
    try:
        async with asyncio.timeout(LOAD_MS_MAX / 1000):
            connection.start(_HEAD % len(body) + body)
            answer = await connection.answer(False, ANSWER_BYTES_MAX)
    except TimeoutError as error:
        raise EngineFault(f"it did not load the adapter within {LOAD_MS_MAX} ms") from error
    finally:
        connection.release()
    if connection.status != 200 and _ALREADY not in answer:  # another gateway, or request of ours, may have been first
        said = f"the engine does not take its adapter ({connection.status}): {_words(answer)}"
        raise Refusal("endpoint_failed", f"{entry.endpoint}: {said}")
    if len(pool.adapters) >= KNOWN_MAX:
        pool.adapters.clear()
    pool.adapters.add((address, name))


def forget(pool: Pool, address: str, entry: EndpointEntry) -> None:
    """The engine there does not know it: it is not the one that was told."""
    pool.adapters.discard((address, name_of(entry)))


def made(first: bytes, entry: EndpointEntry) -> bool:
    """Whether an answer, or the first of a stream, says that this adapter made it."""
    return re.search(rb'"model": ?"%b"' % re.escape(name_of(entry).encode()), first) is not None


def _words(answer: bytes) -> str:
    """What the engine says of it, without paths. No prompt was sent with it."""
    try:
        error = msgspec.json.decode(answer)["error"]
        said = str(error.get("message") if isinstance(error, dict) else error)
    except (msgspec.DecodeError, KeyError, TypeError):
        said = "no reason given"
    return _PATH.sub("", said)[:200]
