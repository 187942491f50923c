"""The gateway process stays light: what importing it must not bring along."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.rig import chat, rig, run

HEAVY = (
    "pydantic",
    "sqlalchemy",
    "starlette",
    "torch",
    "transformers",
    "typer",
    "rich",
    "httpx",
    "prometheus_client",
    "numpy",
)


def test_a_gateway_imports_nothing_heavy() -> None:
    program = (
        "import sys, tidegate.gateway.server, tidegate.transports.socket, tidegate.stores.journal\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_nothing_for_the_garbage_collector(tmp_path: Path, stream: bool) -> None:
    """Reference cycles in every request cost a fifth of the gateway's CPU time before this was looked at."""

    async def main() -> list[str]:
        async with rig(tmp_path) as r:
            client = await r.client()  # one connection: it keeps its last request alive
            gc.collect()
            gc.disable()
            try:
                for _ in range(5):
                    await client.post("/v1/chat/completions", chat(stream=stream))
                    assert (await client.reply()).status == 200
                await r.at_rest()
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                return [type(x).__name__ for x in gc.garbage]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()

    left = run(main())
    assert not {"Cycle", "Relay", "Call", "Exchange", "UsageRecord"} & set(left), left
