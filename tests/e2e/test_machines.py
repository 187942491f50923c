"""A node and a gateway of another machine: they share nothing with the platform but a port, over cables that break."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.e2e.cable import Cable
from tests.e2e.platform import Platform, free_port, join_token, joining, running, wait_until
from tidegate import demo_models

pytest.importorskip("torch")
pytestmark = pytest.mark.e2e

SHAPE = ("--accelerators", "1", "--accelerator-memory", "256MiB")


@dataclass
class Fleet:
    """`hub` is the platform with a node of its own; `us` another machine, behind one cable each way."""

    platform: Platform
    admin: httpx.Client
    hub: httpx.Client
    us: httpx.Client
    to_hub: Cable  # what the other machine's parts say to the platform
    to_us: Cable  # what gateways say to the engines there
    node: subprocess.Popen[bytes]

    def node_log(self) -> str:
        return (self.platform.directory / "us-1" / "logs" / "node.log").read_text()

    def regions(self) -> set[str]:
        return {node["region"] for node in self.admin.get("/api/v1/nodes").json()["data"]}

    def usage(self, endpoint: str) -> dict[str, Any]:
        rows = self.admin.get("/api/v1/usage?by=endpoint").json()["rows"]
        return next((row for row in rows if row["group"] == endpoint), {"requests": 0, "output_tokens": 0})


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("machines")
    with ExitStack() as stack:
        to_hub, to_us = stack.enter_context(Cable()), stack.enter_context(Cable())
        to_hub.target, to_us.target = free_port(), free_port()
        config = (
            f'region = "hub"\ndemo = false\n[[tenants]]\nid = "acme"\n[accelerators]\ncount = 1\nmemory = "256MiB"\n'
            f'[links]\nlisten = "127.0.0.1:{to_hub.target}"\naddress = "127.0.0.1:{to_hub.port}"\n'
        )
        platform = stack.enter_context(running(directory, config=config))
        admin = stack.enter_context(platform.admin())
        node = stack.enter_context(
            joining(platform, *_node(platform, to_us, join_token(platform, "node", "us-1", "us")))
        )
        us_port, data = free_port(), ("--data-dir", str(directory / "gw"))
        token = join_token(platform, "gateway", "us-gw", "us")
        gateway = ("gateway", "--name", "us-gw", "--region", "us", "--port", str(us_port), *data, "--token", token)
        stack.enter_context(joining(platform, *gateway))
        key = {"authorization": f"Bearer {admin.post('/api/v1/keys', json={'tenant': 'acme'}).json()['secret']}"}
        hub = stack.enter_context(httpx.Client(base_url=platform.base_url, headers=key, timeout=60))
        us = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{us_port}", headers=key, timeout=60))
        found = Fleet(platform, admin, hub, us, to_hub, to_us, node)
        wait_until(lambda: "us" in found.regions(), "the node of the other machine")
        wait_until(lambda: _answers(us), "the gateway of the other machine")
        for name, regions in (("acme/hub", ["hub"]), ("acme/us", ["us"]), ("acme/both", ["us", "hub"])):
            body = {"model": str(demo_models.path("tides")), "regions": regions, "accelerator_memory": "64MiB"}
            assert admin.put(f"/api/v1/endpoints/{name}", json=body).status_code == 200
        yield found


def _node(platform: Platform, cable: Cable, token: str) -> list[str]:
    where = ("--listen", f"127.0.0.1:{cable.target}", "--address", f"127.0.0.1:{cable.port}")
    return [
        "node",
        "us-1",
        "--region",
        "us",
        *where,
        *SHAPE,
        "--data-dir",
        str(platform.directory / "us-1"),
        "--token",
        token,
    ]


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def ask(client: httpx.Client, name: str, tokens: int = 4) -> httpx.Response:
    body = {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    return client.post("/v1/chat/completions", json=body)


def test_every_gateway_serves_every_region_and_each_request_is_in_the_ledger_once(fleet: Fleet) -> None:
    for client in (fleet.hub, fleet.us):
        for region in ("hub", "us"):
            reply = ask(client, f"acme/{region}")
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-tidegate-region"] == region
    for region in ("hub", "us"):
        wait_until(lambda region=region: fleet.usage(f"acme/{region}")["requests"] == 2, "usage of both gateways")
        assert fleet.usage(f"acme/{region}")["output_tokens"] == 8
    assert fleet.us.get("/api/v1/usage").status_code == 200, "the admin API answers behind every gateway"
    assert 'tidegate_journal_silence_seconds{gateway="us-gw"}' in fleet.hub.get("/metrics").text
    lines = fleet.admin.get("/api/v1/activity?subject=node us-1").json()["data"]
    assert any(line["kind"] == "enrolled" and "join token" in line["reason"] for line in lines), "audited"


def test_a_cable_that_breaks_mid_stream_ends_in_an_error_event_and_is_billed_to_the_last_token(fleet: Fleet) -> None:
    assert ask(fleet.hub, "acme/us").status_code == 200
    before = wait_until(lambda: (row := fleet.usage("acme/us"))["requests"] and row, "usage")
    chat = {"model": "acme/us", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 450, "stream": True}
    delivered, last = 0, ""
    fleet.to_us.delay_ms = 30  # so that there is a middle of the stream
    with fleet.hub.stream("POST", "/v1/chat/completions", json=chat) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("id: "):
                delivered = int(line[4:])
            last = line[6:] if line.startswith("data: ") else last
            if delivered >= 10:
                fleet.to_us.reset()
    fleet.to_us.delay_ms = 0
    assert '"error"' in last, "an error event, not a silent end and not [DONE]"
    after = wait_until(
        lambda: (row := fleet.usage("acme/us"))["requests"] > before["requests"] and row, "the record of what was sent"
    )
    assert after["requests"] == before["requests"] + 1
    assert after["output_tokens"] - before["output_tokens"] == delivered >= 10
    assert ask(fleet.hub, "acme/us").status_code == 200, "the cable is whole again"


def test_a_node_that_is_cut_off_is_not_asked_and_not_started_twice(fleet: Fleet) -> None:
    """Both directions: neither the platform nor its gateway reaches the other machine, and nobody is told why."""
    replica = ask(fleet.hub, "acme/us").headers["x-tidegate-replica"]
    assert ask(fleet.hub, "acme/both").headers["x-tidegate-region"] == "us", "home first"
    fleet.to_hub.cut()
    fleet.to_us.cut()
    wait_until(lambda: "us" not in fleet.regions(), "silence is taken for what it is", 20)
    assert ask(fleet.hub, "acme/both").headers["x-tidegate-region"] == "hub", "borrowed in the next region of its list"
    refused = ask(fleet.hub, "acme/us")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "residency_denied")
    fleet.to_us.mend()
    fleet.to_hub.mend()
    wait_until(lambda: "us" in fleet.regions(), "the node is back by itself", 30)
    back = wait_until(lambda: (reply := ask(fleet.hub, "acme/us")).status_code == 200 and reply, "served at home again")
    assert back.headers["x-tidegate-replica"] == replica, "the engine that was there all the while"
    assert len([line for line in fleet.node_log().splitlines() if "Start acme.us-" in line]) == 1
    wait_until(lambda: ask(fleet.hub, "acme/both").headers.get("x-tidegate-region") == "us", "given back", 40)


def test_what_a_gateway_served_while_it_was_cut_off_arrives_when_it_is_back(fleet: Fleet) -> None:
    served = _settled_requests(fleet)
    fleet.to_hub.cut()
    assert ask(fleet.us, "acme/us").status_code == 200, "it needs no control plane to serve what is ready"
    assert fleet.usage("acme/us")["requests"] == served
    fleet.to_hub.mend()
    wait_until(lambda: fleet.usage("acme/us")["requests"] == served + 1, "the record of meanwhile", 30)


def test_a_platform_that_was_killed_finds_its_parts_again(fleet: Fleet) -> None:
    served = _settled_requests(fleet)
    fleet.platform.crash()
    assert ask(fleet.us, "acme/us").status_code == 200, "the other machine serves on"
    wait_until(lambda: _answers(fleet.hub), "the platform again")
    wait_until(lambda: "us" in fleet.regions(), "the node comes back by itself", 30)
    wait_until(lambda: ask(fleet.hub, "acme/us").status_code == 200, "served from the hub again", 30)
    assert ask(fleet.us, "acme/us").status_code == 200
    wait_until(lambda: fleet.usage("acme/us")["requests"] == served + 3, "each request once", 30)
    assert len([line for line in fleet.node_log().splitlines() if "Start acme.us-" in line]) == 1


def _settled_requests(fleet: Fleet) -> int:
    """How many requests of `acme/us` the ledger has, the last one of the gateway there among them."""
    before = fleet.usage("acme/us")["requests"]
    assert ask(fleet.us, "acme/us").status_code == 200
    wait_until(lambda: fleet.usage("acme/us")["requests"] == before + 1, "usage")
    return int(before + 1)


def test_a_part_that_was_sent_away_is_gone_and_stays_away(fleet: Fleet) -> None:
    """Last: the fleet is smaller after it."""
    command = [sys.executable, "-m", "tidegate", "join", "remove", "node", "us-1"]
    where = ["--join", str(fleet.platform.directory / "data"), "-o", "json"]
    removed = subprocess.run([*command, *where], capture_output=True, timeout=60, check=True)
    assert json.loads(removed.stdout) == {"removed": "node/us-1"}
    wait_until(lambda: "us" not in fleet.regions(), "its link ends", 20)
