"""Models from a Hub on the whole real platform: applied by headers, fetched, served, resumed, refused by name, and no
other endpoint harmed.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.platform import Platform, free_port, join_token, joined, joining, running, wait_until
from tests.engines import hub_server

pytest.importorskip("torch")
from tidegate import demo_models

pytestmark = pytest.mark.e2e

TOKEN = "hf_wave_token_of_the_operator"
CONFIG = """
[[tenants]]
id = "acme"
api_key = "acme-key-of-sixteen"
[weights]
hub_url = "{url}"
hub_token = "{token}"
[gateway]
hold_ms_max = 150000
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serving() as hub:
        hub.token = TOKEN
        hub.slow_s = 0.02  # a model of a few MB is here before anybody could look
        for name in demo_models.NAMES[:2]:
            hub.put(f"acme/{name}", demo_models.path(name))
        yield hub


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("remote")


@pytest.fixture(scope="module")
def platform(hub: hub_server.Hub, directory: Path) -> Iterator[Platform]:
    with running(directory, config=CONFIG.format(url=hub.url, token=TOKEN)) as started:
        yield started


def apply(platform: Platform, name: str, model: str) -> httpx.Response:
    with platform.admin() as admin:
        return admin.put(f"/api/v1/endpoints/acme/{name}", json={"model": model})


def endpoint(platform: Platform, name: str) -> dict[str, Any]:
    with platform.admin() as admin:
        return dict(admin.get(f"/api/v1/endpoints/acme/{name}").json())


def activity(platform: Platform, kind: str) -> list[dict[str, Any]]:
    with platform.admin() as admin:
        lines = admin.get("/api/v1/activity", params={"limit": 500}).json()["data"]
    return [line for line in lines if line["kind"] == kind]


def on_nodes(platform: Platform) -> set[str]:
    """Where replicas of the endpoint are ready."""
    return {replica["node"] for replica in endpoint(platform, "one")["replicas"] if replica["state"] == "ready"}


def ask(platform: Platform, name: str) -> str:
    client = openai.OpenAI(base_url=f"{platform.base_url}/v1", api_key="acme-key-of-sixteen", max_retries=0)
    answer = client.chat.completions.create(
        model=f"acme/{name}", messages=[{"role": "user", "content": "Hello?"}], max_tokens=4, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_a_hub_model_is_applied_by_its_headers_fetched_and_served(platform: Platform, hub: hub_server.Hub) -> None:
    made = apply(platform, "one", f"hf://acme/{demo_models.NAMES[0]}@main")
    assert made.status_code == 200, made.text
    source = made.json()["model"]["source"]
    assert source == f"hf://acme/{demo_models.NAMES[0]}@{hub.commits[f'acme/{demo_models.NAMES[0]}@main']}"
    assert apply(platform, "one", source).json()["generation"] == 1
    wait_until(lambda: endpoint(platform, "one")["state"] in ("ready", "idle"), "the fetched model to be ready")
    assert ask(platform, "one")
    assert any("model=hf://" in line["reason"] for line in activity(platform, "prefetch"))
    told = [line["reason"] for line in activity(platform, "starting") + activity(platform, "state")]
    assert any("downloading" in reason for reason in told)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (f"hf://acme/{demo_models.NAMES[0]}@v7", "has no revision 'v7'"),
        ("hf://acme/nothing", "there is no repository acme/nothing"),
        ("gopher://acme/x", "accepted are hf://org/name@revision"),
    ],
)
def test_what_does_not_exist_is_refused_at_apply(platform: Platform, model: str, says: str) -> None:
    refused = apply(platform, "never", model)
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] == "model"


def test_wrong_bytes_and_a_dying_source_are_reasons_on_their_endpoint_only(
    platform: Platform, hub: hub_server.Hub, tmp_path: Path
) -> None:
    shutil.copytree(demo_models.path(demo_models.NAMES[1]), tmp_path / "copy")
    hub.put("acme/copy", tmp_path / "copy")
    hub.corrupt, hub.corrupt_bytes_min = "model.safetensors", 1 << 20  # the samples of the inspection are right
    assert apply(platform, "two", "hf://acme/copy").status_code == 200
    wrong = "model.safetensors does not match the checksum its source gives"
    wait_until(lambda: wrong in endpoint(platform, "two")["reason"], "the fault of the bytes on the endpoint")
    hub.corrupt, hub.status = "", 503
    assert ask(platform, "one"), "another endpoint is unharmed"
    away = "the Hub answered 503"
    wait_until(lambda: away in endpoint(platform, "two")["reason"], "the fault of the source on the endpoint")
    hub.status = 0
    with platform.admin() as admin:  # its next attempt would come by itself, after a pause
        assert admin.post("/api/v1/endpoints/acme/two/wake").is_success
    wait_until(lambda: endpoint(platform, "two")["state"] in ("ready", "idle"), "the endpoint to recover")
    assert ask(platform, "two")


def test_after_a_restart_the_disk_serves_without_the_hub_and_no_secret_was_written(
    platform: Platform, hub: hub_server.Hub, directory: Path
) -> None:
    assert platform.stop() == 0
    hub.status = 503
    with running(directory, config=CONFIG.format(url=hub.url, token=TOKEN)) as again:
        assert ask(again, "one")
        assert endpoint(again, "one")["tier"] == "accelerator"
    for path in directory.rglob("*"):
        if path.is_file() and path.name != "tidegate.toml":
            assert TOKEN.encode() not in path.read_bytes(), path


def test_of_several_nodes_one_fetches_and_all_serve(tmp_path: Path) -> None:
    config = 'region = "hub"\ndisk = "7GiB"\n[accelerators]\ncount = 1\nmemory = "1MiB"\n' + CONFIG
    shape = ("--region", "eu", "--accelerators", "1", "--accelerator-memory", "96MiB")  # one replica each
    model = demo_models.path(demo_models.NAMES[0])
    with hub_server.serving() as hub:
        hub.token, hub.slow_s = TOKEN, 0.02
        hub.put("acme/tide", model)
        with (
            running(tmp_path, config=config.format(url=hub.url, token=TOKEN)) as platform,
            joined(platform, "node", "eu-1", *shape),
            joined(platform, "node", "eu-2", *shape),
            platform.admin() as admin,
        ):
            wait_until(lambda: len(admin.get("/api/v1/nodes").json()["data"]) == 3, "both nodes")
            body = {"model": "hf://acme/tide", "regions": ["eu"], "accelerator_memory": "64MiB",
                    "min_replicas": 2, "max_replicas": 2}  # fmt: skip
            applied = admin.put("/api/v1/endpoints/acme/one", json=body)
            assert applied.status_code == 200, applied.text
            inspected = hub.bytes_read
            assert ask(platform, "one")
            wait_until(lambda: on_nodes(platform) == {"eu-1", "eu-2"}, "a replica on each node")
            shared = platform.directory / "data" / "weights" / "models"
            assert len(list(shared.iterdir())) == 1, "nodes of one machine share one cache"
            assert (shared.parent / "budget").read_text() == f"{7 << 30}\n", "and the platform's budget"
            size = sum(path.stat().st_size for path in model.iterdir())
            assert hub.bytes_read - inspected < 1.1 * size, "and it was fetched once"


def test_of_several_machines_one_fetches_and_the_others_copy_from_it(tmp_path: Path) -> None:
    """The platform and a node of another machine: own disks, mutual TLS between them, one reading of the Hub."""
    port, model = free_port(), demo_models.path(demo_models.NAMES[0])
    links = f'[links]\nlisten = "127.0.0.1:{port}"\naddress = "127.0.0.1:{port}"\n'
    config = 'region = "hub"\n[accelerators]\ncount = 1\nmemory = "96MiB"\n' + CONFIG + links
    with hub_server.serving() as hub:
        hub.token, hub.slow_s = TOKEN, 0.02
        hub.put("acme/tide", model)
        other = tmp_path / "other.toml"
        other.write_text(f'[weights]\nhub_url = "{hub.url}"\nhub_token = "{TOKEN}"\n')
        with running(tmp_path, config=config.format(url=hub.url, token=TOKEN)) as platform, platform.admin() as admin:
            token = join_token(platform, "node", "far-1", "far")
            data, shape = tmp_path / "far-1", ("--accelerators", "1", "--accelerator-memory", "96MiB")
            where = ("--listen", f"127.0.0.1:{free_port()}", "--config", str(other), "--data-dir", str(data))
            with joining(platform, "node", "far-1", "--region", "far", *where, *shape, "--token", token):
                wait_until(lambda: len(admin.get("/api/v1/nodes").json()["data"]) == 2, "the node of the other machine")
                for name, region in (("one", "hub"), ("two", "far")):
                    body = {"model": "hf://acme/tide", "regions": [region], "accelerator_memory": "64MiB"}
                    applied = admin.put(f"/api/v1/endpoints/acme/{name}", json=body)
                    assert applied.status_code == 200, applied.text
                assert ask(platform, "one")
                assert ask(platform, "two")
        for folder in (tmp_path / "data", data):
            assert len(list((folder / "weights" / "models").iterdir())) == 1, f"{folder} has a copy of its own"
        whole = ("model.safetensors", 0, (model / "model.safetensors").stat().st_size)
        assert hub.ranges.count(whole) == 1, "but the Hub was read once"
