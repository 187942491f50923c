"""The gateway process stays light: what importing it must not bring along."""

import subprocess
import sys

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
