"""Money at the door of a real platform: requests at once cannot overdraw a budget, a killed gateway forgets nothing,
and every verb of it does what it says.
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.platform import Platform, running, wait_until

CONFIG = "[prices.default]\ninput_usd_per_million_tokens = '1'\noutput_usd_per_million_tokens = '10'\n"
BUDGET_NANO_USD = 2_000_000


def _ask(platform: Platform, model: str) -> httpx.Response:
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "What is tidegate?"}]}
    key = {"authorization": f"Bearer {platform.ready['api_key']}"}
    return httpx.post(f"{platform.base_url}/v1/chat/completions", json=body, headers=key, timeout=60)


def _charged(platform: Platform) -> int:
    with platform.admin() as admin:
        return int(admin.get("/api/v1/usage", params={"by": "tenant"}).json()["total"]["nano_usd"])


def _spent_usd(platform: Platform) -> str | None:
    with platform.admin() as admin:
        (limits,) = admin.get("/api/v1/limits").json()["data"]
        return limits["budgets"][0]["spent_usd"]


@pytest.mark.e2e
def test_a_budget_holds_against_requests_at_once_and_a_killed_gateway(tmp_path: Path) -> None:
    with running(tmp_path, config=CONFIG) as platform:
        model = next(e for e in platform.ready["endpoints"] if not e.endswith("embed"))
        tenant = model.split("/")[0]
        assert _ask(platform, model).status_code == 200
        with platform.admin() as admin:
            body = {"scope": "tenant", "subject": tenant, "budget_total_usd": "0.002"}
            assert admin.put("/api/v1/limits", json=body).status_code == 200
        wait_until(lambda: _ask(platform, model).status_code != 503, "the budget to be leased")
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: _ask(platform, model), range(32)))
        codes = {answer.json().get("error", {}).get("code") for answer in answers}
        assert codes == {None, "insufficient_quota"}, codes
        assert 0 < _charged(platform) <= BUDGET_NANO_USD

        (gateway,) = platform.gateways()
        gateway.send_signal(signal.SIGKILL)
        wait_until(lambda: platform.gateways() not in ([], [gateway]), "a new gateway")

        def spent_up() -> bool:
            return _ask(platform, model).json().get("error", {}).get("code") == "insufficient_quota"

        wait_until(spent_up, "the budget to be spent")
        charged = _charged(platform)
        assert charged <= BUDGET_NANO_USD
        wait_until(lambda: _spent_usd(platform) == f"0.{charged:09d}", "the budget to show what the bill does")


@pytest.mark.e2e
def test_a_contract_that_refuses_is_never_exceeded(tmp_path: Path) -> None:
    with running(tmp_path, config=CONFIG) as platform:
        model = next(e for e in platform.ready["endpoints"] if not e.endswith("embed"))
        tenant = model.split("/")[0]
        contract = ("contracts", "create", tenant, "--id", "c1", "--tokens", "3000", "--price", "0.003")
        made = _verb(platform, *contract, "--expires", "2099-01-01", "--on-exhausted", "refuse")
        assert made["contract"]["on_exhausted"] == "refuse"

        def used_up() -> Any:
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda _: _ask(platform, model), range(16)))
            error = _ask(platform, model).json().get("error", {})  # alone: nothing is reserved beside it
            return error if error.get("code") == "insufficient_quota" else None

        error = wait_until(used_up, "the tokens to be used up")
        assert (error["limit"]["kind"], error["limit"]["full"]) == ("contract", 3000)
        status = _verb(platform, "contracts", "status", "c1")
        assert 0 < status["used_tokens"] <= 3000
        assert _charged(platform) == 0, "nothing beyond what was prepaid"


def _verb(platform: Platform, *arguments: str, code: int = 0) -> Any:
    """A command line against the platform; its JSON, or what it said on stderr where `code` is not 0."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
    environment |= {"TIDEGATE_URL": platform.base_url, "TIDEGATE_ADMIN_KEY": platform.ready["admin_key"]}
    command = [sys.executable, "-m", "tidegate", *arguments, "-o", "json"]
    done = subprocess.run(command, env=environment, cwd=platform.directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


@pytest.mark.e2e
def test_the_verbs_of_money_on_a_real_platform(tmp_path: Path) -> None:
    with running(tmp_path, config=CONFIG) as platform:
        model = next(e for e in platform.ready["endpoints"] if not e.endswith("embed"))
        tenant = model.split("/")[0]
        contract = ("contracts", "create", tenant, "--id", "c1", "--tokens", "10", "--price", "0.003")
        assert _verb(platform, *contract, "--expires", "2099-01-01")["contract"]["state"] == "active"
        assert "`expires`" in _verb(platform, *contract, "--expires", "2001-01-01", code=2)
        assert _ask(platform, model).status_code == 200
        status = _verb(platform, "contracts", "status", "c1")
        assert (status["used_tokens"], status["state"]) == (10, "exhausted"), "it used more than that"
        assert [alert["percent"] for alert in status["alerts"]] == [50, 80, 100]
        assert _verb(platform, "contracts", "credit", tenant, "0.001", "--note", "welcome")["nano_usd"] == -1_000_000

        prices = ("--input", "2", "--output-tokens", "20", "--accelerator-hour", "1")
        assert _verb(platform, "prices", "set", "--tenant", tenant, "--model", "m", *prices)["plan"] == ""
        assert "`plan`" in _verb(platform, "prices", "set", "--tenant", tenant, "--plan", "x", *prices, code=2)
        assert _verb(platform, "prices", "end", "--tenant", tenant, "--model", "m")["ends"] is True
        period = ("--from", "2020-01-01", "--to", "2020-02-01")
        assert _verb(platform, "prices", "rerate", *period, "--id", "r1")["adjustments"] == []
        assert _verb(platform, "prices", "undo", "r1")["undone"] is not None

        limits = ("limits", "set", "endpoint", model, "--rpm", "2", "--monthly", "5")
        assert _verb(platform, *limits)["requests_per_minute"] == 2
        wait_until(lambda: _ask(platform, model).status_code == 429, "the rate to be used up")
        (shown,) = _verb(platform, "limits", "list")
        assert shown["subject"] == model
        _verb(platform, "limits", "remove", "endpoint", model)
        wait_until(lambda: _ask(platform, model).status_code == 200, "the limits to be gone")
        invoice = _verb(platform, "invoices", tenant)
        assert {"purchase", "credit", "committed_tokens"} <= {line["item"] for line in _lines(invoice)}


def _lines(invoice: Any) -> list[dict[str, Any]]:
    (one,) = invoice if isinstance(invoice, list) else [invoice]
    return list(one["lines"])
