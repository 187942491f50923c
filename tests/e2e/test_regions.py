"""Regions as processes of their own: where requests are served while home is there, dead and back; nodes' own logs."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.platform import Platform, free_port, joined, running, wait_until
from tidegate import demo_models

pytestmark = pytest.mark.e2e
CONFIG = 'region = "hub"\ndemo = false\n[[tenants]]\nid = "acme"\n[accelerators]\ncount = 1\nmemory = "256MiB"\n'


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running(tmp_path_factory.mktemp("regions"), config=CONFIG) as found:
        yield found


def node(platform: Platform, region: str) -> Any:
    shape = ("--accelerators", "1", "--accelerator-memory", "256MiB")
    return joined(platform, "node", f"{region}-1", "--region", region, *shape)


def node_log(platform: Platform, region: str) -> str:
    return (platform.directory / "data" / "nodes" / f"{region}-1" / "logs" / "node.log").read_text()


def served_at(client: httpx.Client, name: str) -> tuple[int, str]:
    """(status, region or refusal code) of one request."""
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    reply = client.post("/v1/chat/completions", json=body)
    if reply.status_code == 200:
        return 200, reply.headers["x-tidegate-region"]
    return reply.status_code, reply.json()["error"]["code"]


def test_home_dead_and_back_and_a_bound_endpoint_is_never_served_elsewhere(platform: Platform) -> None:
    model = str(demo_models.path("tides"))
    with platform.admin() as admin, node(platform, "us"):

        def region_is_there(region: str) -> bool:
            return region in {n["region"] for n in admin.get("/api/v1/nodes").json()["data"]}

        with node(platform, "eu") as eu:
            wait_until(lambda: region_is_there("eu") and region_is_there("us"), "both nodes")
            for name, regions in (("acme/bound", ["eu"]), ("acme/free", ["eu", "us"])):
                body = {"model": model, "regions": regions, "accelerator_memory": "64MiB"}
                applied = admin.put(f"/api/v1/endpoints/{name}", json=body)
                assert applied.status_code == 200, applied.text
            key = admin.post("/api/v1/keys", json={"tenant": "acme"}).json()["secret"]
            with httpx.Client(
                base_url=platform.base_url, headers={"authorization": f"Bearer {key}"}, timeout=60
            ) as api:
                assert served_at(api, "acme/bound") == (200, "eu")
                assert served_at(api, "acme/free") == (200, "eu")
                eu.kill()
                eu.wait(10)
                wait_until(lambda: not region_is_there("eu"), "the dead node to be noticed")
                assert served_at(api, "acme/free") == (200, "us"), "borrowed in the next region of its list"
                assert served_at(api, "acme/bound") == (403, "residency_denied")
                metrics = api.get("/metrics").text
                assert re.search(r'tidegate_residency_denied_total\{endpoint="acme/bound"\} [1-9]', metrics)
        lines = admin.get("/api/v1/activity?subject=acme/bound").json()["data"]
        assert any("it may not run elsewhere" in line["reason"] for line in lines), "audited"
        assert "acme.bound" not in node_log(platform, "us"), "the other region's own log knows nothing of it"
        assert "acme.free" in node_log(platform, "us")
        with node(platform, "eu"), httpx.Client(base_url=platform.base_url, timeout=60) as api:
            api.headers["authorization"] = f"Bearer {key}"
            wait_until(lambda: region_is_there("eu"), "home is back")
            assert served_at(api, "acme/bound") == (200, "eu")
            wait_until(lambda: served_at(api, "acme/free") == (200, "eu"), "what was borrowed is given back", 40)


def test_a_gateway_of_another_region_serves_the_same_endpoints_and_is_billed_the_same(platform: Platform) -> None:
    port = free_port()
    with platform.admin() as admin, joined(platform, "gateway", "--region", "us", "--port", str(port)):
        body = {"model": str(demo_models.path("tides"))}
        assert admin.put("/api/v1/endpoints/acme/a", json=body).status_code == 200
        key = admin.post("/api/v1/keys", json={"tenant": "acme"}).json()["secret"]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60) as api:

            def answers() -> bool:
                with contextlib.suppress(httpx.TransportError):
                    return served_at(api, "acme/a") == (200, "hub")
                return False

            wait_until(answers, "the second gateway serves")

            def billed() -> set[str]:
                return {row["group"] for row in api.get("/api/v1/usage?by=endpoint").json().get("rows", [])}

            wait_until(lambda: "acme/a" in billed(), "usage in the ledger")
