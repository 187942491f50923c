"""Budgets on a real platform: requests at once cannot overdraw one, and killing the gateway forgets nothing."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
