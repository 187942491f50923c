"""hf:// and s3:// against servers that speak their protocols: inspected by ranges, pinned, refused by name."""

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import hub_server
from tests.engines.test_inspect import LLAMA, write_safetensors
from tidegate.domain.endpoint import ModelProfile
from tidegate.domain.errors import Refusal
from tidegate.engines.inspect import FileInspector
from tidegate.engines.weights.access import Access, open_remote
from tidegate.engines.weights.cache import DiskCache
from tidegate.engines.weights.download import DownloadLimits
from tidegate.engines.weights.faults import SourceChanged, SourceUnavailable
from tidegate.engines.weights.inspector import SourceInspector
from tidegate.engines.weights.s3 import S3Access
from tidegate.engines.weights.source import HubAddress, S3Address, parse

BIG = {"a": [4_000, 1_000], "b": [64]}  # 8 MB: much more than the samples


def write_model(folder: Path, *, shards: int = 1, fill: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "tokenizer.json").write_text(json.dumps({"x": "y" * 5_000}))
    (folder / "README.md").write_text("not fetched")
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", BIG, fill=fill)
        return folder
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    for i, name in enumerate(names):
        write_safetensors(folder / name, {f"t{i}": [4_000, 500]}, fill=fill + i)
    index = {"metadata": {}, "weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "published")


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serving() as hub:
        yield hub


@pytest.fixture(autouse=True)
def anonymous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)


def inspector(hub: hub_server.Hub, tmp_path: Path, token: str | None = None) -> SourceInspector:
    return SourceInspector(Access(hub_url=hub.url, hub_token=token), tmp_path / "scratch")


def same_but_source(remote: ModelProfile, local: ModelProfile) -> None:
    for name in ("digest", "kind", "weight_bytes", "kv_bytes_per_token", "context_tokens_max", "params"):
        assert getattr(remote, name) == getattr(local, name), name


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hub_model_is_inspected_by_ranges_and_pinned(hub: hub_server.Hub, tmp_path: Path, shards: int) -> None:
    folder = write_model(tmp_path / "published", shards=shards)
    commit = hub.put("acme/tide", folder)
    profile = inspector(hub, tmp_path).inspect("hf://acme/tide@main")
    assert profile.source == f"hf://acme/tide@{commit}"
    same_but_source(profile, FileInspector().inspect(str(folder)))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert hub.bytes_read < weights * (0.3 if shards == 1 else 0.9), "inspection must not download the weights"
    assert not any(name == "README.md" for name, _, _ in hub.ranges)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_branch_means_the_commit_it_pointed_to(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.put("acme/tide", write_model(tmp_path / "one", fill=1))
    first = inspector(hub, tmp_path).inspect("hf://acme/tide")
    hub.put("acme/tide", write_model(tmp_path / "two", fill=2))
    second = inspector(hub, tmp_path).inspect("hf://acme/tide")
    assert first.source != second.source
    assert first.digest != second.digest
    assert inspector(hub, tmp_path).inspect(first.source) == first


def test_the_token_reaches_the_hub_and_no_log(
    hub: hub_server.Hub, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put("acme/private", model)
    hub.token = "hf_secret_of_the_owner"
    caplog.set_level(logging.DEBUG)
    access = Access(hub_url=hub.url, hub_token=hub.token)
    assert inspector(hub, tmp_path, hub.token).inspect("hf://acme/private").weight_bytes
    assert hub.seen_tokens[hub.token] > 1
    assert hub.token not in caplog.text
    assert hub.token not in repr(access)


@pytest.mark.parametrize(
    ("token", "source", "says"),
    [
        (None, "hf://acme/private", "private: then set weights.hub_token"),
        ("hf_of_somebody_else", "hf://acme/private", "refuses the credentials"),
        ("right", "hf://acme/private@v9", "has no revision 'v9'"),
        ("right", "hf://acme/other", "there is no repository acme/other"),
    ],
)
def test_what_the_hub_refuses_is_a_named_refusal(
    hub: hub_server.Hub, model: Path, tmp_path: Path, token: str | None, source: str, says: str
) -> None:
    hub.put("acme/private", model)
    hub.token = "right"
    with pytest.raises(Refusal, match=says) as refused:
        inspector(hub, tmp_path, token).inspect(source)
    assert (refused.value.code, refused.value.param) == ("invalid_configuration", "model")
    assert "hf_of" not in refused.value.message


def test_a_hub_that_is_away_or_busy_is_not_the_operators_mistake(
    hub: hub_server.Hub, model: Path, tmp_path: Path
) -> None:
    hub.put("acme/tide", model)
    hub.status, hub.retry_after = 429, "7"
    with pytest.raises(Refusal) as busy:
        inspector(hub, tmp_path).inspect("hf://acme/tide")
    assert (busy.value.code, busy.value.retry_after_ms) == ("source_unavailable", 7_000)
    gone = SourceInspector(Access(hub_url="http://127.0.0.1:1"), tmp_path / "scratch")
    with pytest.raises(Refusal, match="does not answer") as away:
        gone.inspect("hf://acme/tide")
    assert away.value.code == "source_unavailable"


def test_what_is_no_hub_is_named(hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 200  # an empty page for everything, as a captive portal gives it
    with pytest.raises(Refusal, match="does not speak the Hub's API"):
        inspector(hub, tmp_path).inspect("hf://acme/tide")


def test_pickled_weights_are_refused_without_fetching_them(hub: hub_server.Hub, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "pytorch_model.bin").write_bytes(b"code" * 2_000)
    hub.put("acme/pickled", folder)
    with pytest.raises(Refusal, match=r"pytorch_model\.bin is a pickled format"):
        inspector(hub, tmp_path).inspect("hf://acme/pickled")
    assert {name for name, _, _ in hub.ranges} == {"config.json"}


@pytest.mark.parametrize(
    "source",
    ["ftp://a/b", "hf://acme", "hf://acme/tide@../x", "s3://bucket", "s3://b/../up", "hf://a/b/c", "s3://UP/x"],
)
def test_what_is_no_source_is_refused_with_what_is_accepted(source: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="accepted are hf://org/name@revision, s3://bucket/prefix") as refused:
        SourceInspector(Access(), tmp_path).inspect(source)
    assert refused.value.param == "model"


def test_sources_are_read_as_they_are_written() -> None:
    assert parse("hf://acme/tide@v1.0/x") == HubAddress("acme/tide", "v1.0/x")
    assert parse("hf://acme/tide") == HubAddress("acme/tide", "main")
    assert parse("s3://models/llama/8b/") == S3Address("models", "llama/8b")
    assert parse("/models/tide") is None
    assert parse("file:///models/tide") is None


def test_a_read_that_breaks_off_is_unavailable_not_short(hub: hub_server.Hub, model: Path) -> None:
    hub.put("acme/tide", model)
    remote = open_remote("hf://acme/tide", Access(hub_url=hub.url))
    hub.cut_after_reads = 0
    with pytest.raises(SourceUnavailable):
        remote.read("model.safetensors", 0, 1_000_000)


# --- S3, on moto's server ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def s3_access(endpoint: str, **more: str) -> Access:
    keys = {"access_key_id": "key", "secret_access_key": "wave-secret"}
    return Access(s3=S3Access(endpoint=endpoint, region="us-east-1", keys=keys | more))


def upload(endpoint: str, folder: Path, bucket: str, prefix: str) -> None:
    import boto3

    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="key", aws_secret_access_key="s", region_name="us-east-1"
    )
    client.create_bucket(Bucket=bucket)
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder)}")


def test_an_s3_model_is_inspected_by_ranges(store: str, model: Path, tmp_path: Path) -> None:
    upload(store, model, "models", "llama/8b")
    profile = SourceInspector(s3_access(store), tmp_path / "scratch").inspect("s3://models/llama/8b/")
    assert profile.source == "s3://models/llama/8b"
    same_but_source(profile, FileInspector().inspect(str(model)))


def test_an_object_replaced_while_it_is_read_is_noticed(store: str, model: Path, tmp_path: Path) -> None:
    upload(store, model, "changing", "m")
    remote = open_remote("s3://changing/m", s3_access(store))
    assert remote.read("config.json", 0, 5) == (model / "config.json").read_bytes()[:5]
    upload(store, write_model(tmp_path / "other", fill=9), "changing", "m")
    with pytest.raises(SourceChanged, match=r"model\.safetensors was replaced"):
        remote.read("model.safetensors", 0, 100)


def test_an_s3_model_is_downloaded_whole(store: str, model: Path, tmp_path: Path) -> None:
    upload(store, model, "whole", "m")
    access = s3_access(store)
    profile = SourceInspector(access, tmp_path / "scratch").inspect("s3://whole/m")
    limits = DownloadLimits(connections=4, range_bytes=1 << 20)
    cache = DiskCache(tmp_path / "cache", 1 << 30, lambda source: open_remote(source, access), limits)
    held = cache.hold(profile, lambda _: None, threading.Event())
    for name in ("model.safetensors", "config.json", "tokenizer.json", "1_Pooling/config.json"):
        assert (Path(held.path) / name).read_bytes() == (model / name).read_bytes()
    assert not (Path(held.path) / "README.md").exists()
    held.release()


def test_what_s3_refuses_is_a_named_refusal(store: str, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    with pytest.raises(Refusal, match="has no s3://nowhere/x"):
        SourceInspector(s3_access(store), scratch).inspect("s3://nowhere/x")
    with pytest.raises(Refusal) as away:
        SourceInspector(s3_access("http://127.0.0.1:1"), scratch).inspect("s3://models/x")
    assert away.value.code == "source_unavailable"
    broken = tmp_path / "credentials"
    broken.write_text("[default]\naws_secret_access_key = wave-secret\n")
    with pytest.raises(Refusal, match="credentials_file cannot be used") as refused:
        SourceInspector(Access(s3=S3Access(endpoint=store, credentials_file=broken)), scratch).inspect("s3://models/x")
    assert "wave-secret" not in refused.value.message


def test_credentials_s3_refuses(tmp_path: Path) -> None:
    """A store that answers 403 to everything, as S3 does to a wrong signature."""
    with hub_server.serving() as server:
        server.status = 403
        with pytest.raises(Refusal, match="refuses the credentials for s3://models/x"):
            SourceInspector(s3_access(server.url), tmp_path).inspect("s3://models/x")


def test_credentials_from_a_file(store: str, model: Path, tmp_path: Path) -> None:
    upload(store, model, "filed", "m")
    file = tmp_path / "credentials"
    file.write_text("[default]\naws_access_key_id = key\naws_secret_access_key = wave-secret\n")
    access = Access(s3=S3Access(endpoint=store, region="us-east-1", credentials_file=file))
    assert SourceInspector(access, tmp_path / "scratch").inspect("s3://filed/m").weight_bytes
