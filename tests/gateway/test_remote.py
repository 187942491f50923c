"""Endpoints served elsewhere: over TLS to a provider that checks keys, limits, dies and stalls; secrets stay secret."""

import asyncio
import contextlib
import datetime
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.gateway.engine import Exchange, StandInEngine, refuse, serve_well
from tests.gateway.rig import KEY, Rig, chat, endpoint, rig, run
from tests.loop import until
from tidegate.domain.usage import CountSource, Outcome
from tidegate.wire.internal import RemoteTarget

SECRET = "sk-provider-secret-0123456789"
NAME = "acme/far"


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed one for localhost, and the server side of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    public, private = folder / "cert.pem", folder / "key.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(public, private)
    return public, context


class Provider(StandInEngine):
    """A stand-in for a provider's API: HTTPS on a port, refusing every key but one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "unused")
        self.certificate, self._tls = certificate(folder)
        self.key = SECRET
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    def target(self, **more: Any) -> RemoteTarget:
        made = RemoteTarget(
            "far", f"https://localhost:{self.port}/api/v1", "their/model", key="env:FAR_KEY",
            ca_file=str(self.certificate), concurrency_max=2, first_byte_ms_max=500,
        )  # fmt: skip
        return replace(made, **more)


async def checked(exchange: Exchange) -> None:
    """What a provider does before it serves."""
    if exchange.headers.get("authorization") != f"bearer {SECRET}".lower():
        await refuse(401, "invalid_api_key", f"key {exchange.headers.get('authorization')} is wrong")(exchange)
        return
    assert exchange.path == "/api/v1/chat/completions"
    assert exchange.json["model"] == "their/model"
    await serve_well(replace(exchange, path="/v1/chat/completions"))


@contextlib.asynccontextmanager
async def far(tmp_path: Path, **more: Any) -> AsyncIterator[tuple[Rig, Provider]]:
    provider = Provider(tmp_path)
    await provider.start()
    async with rig(tmp_path) as made:
        entry = endpoint(NAME, remote=provider.target(**more), metering="usage_event", hold_ms_max=1_000)
        made.control.endpoints = (*made.control.endpoints, entry)
        await made.control.publish()
        await until(lambda: NAME in made.gateway.parts.room.endpoints, "the endpoint")
        yield made, provider
        await provider.kill()


def play(tmp_path: Path, scene: Callable[[Rig, Provider], Awaitable[None]], **more: Any) -> None:
    async def main() -> None:
        async with far(tmp_path, **more) as (made, provider):
            await scene(made, provider)

    run(main())


async def post(made: Rig, **more: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{made.port}", timeout=20) as http:
        headers = {"authorization": f"Bearer {KEY}"}
        return await http.post("/v1/chat/completions", json=chat(model=NAME, **more), headers=headers)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", SECRET)


def test_it_is_served_counted_and_the_tenants_key_stays_here(tmp_path: Path) -> None:
    async def scene(made: Rig, provider: Provider) -> None:
        provider.script.extend([checked, checked])
        response = await post(made, max_tokens=4)
        assert response.status_code == 200, response.text
        assert response.headers["x-tidegate-replica"] == "remote:far"
        streamed = await post(made, max_tokens=3, stream=True)
        assert "usage" not in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert all(KEY not in str(exchange.headers) for exchange in provider.exchanges)
        first, second = made.journal.final
        assert (first.outcome, first.input_tokens, first.output_tokens) == (Outcome.COMPLETED, 7, 4)
        assert (second.output_tokens, second.count_source) == (3, CountSource.ENGINE_USAGE)
        assert first.endpoint == NAME

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [(429, "rate_limit_exceeded", 429), (503, "capacity", 503), (401, "engine_error", 502), (500, "engine_error", 502)],
)
def test_its_refusals_are_understood(tmp_path: Path, status: int, code: str, told: int) -> None:
    """Its limits are told with its Retry-After; what is about our key there is never passed on as the client's."""

    async def limited(exchange: Exchange) -> None:
        body = b'{"error":{"message":"org-42 is over its quota","code":"x"}}'
        head = f"HTTP/1.1 {status} X\r\nretry-after: 7\r\ncontent-length: {len(body)}\r\n\r\n"
        await exchange.write(head.encode() + body)

    async def scene(made: Rig, provider: Provider) -> None:
        provider.script.extend([limited, limited])
        response = await post(made)
        assert response.status_code == told
        assert response.json()["error"]["code"] == code
        assert "org-42" not in response.text
        assert response.headers.get("retry-after") == ("7" if status in (429, 503) else None)
        assert made.journal.final[-1].output_tokens == 0
        assert not made.journal.final[-1].billable

    play(tmp_path, scene)


def test_a_bad_request_is_the_clients(tmp_path: Path) -> None:
    async def scene(made: Rig, provider: Provider) -> None:
        provider.script.append(refuse(400, "invalid_request", "too many tools"))
        response = await post(made)
        assert response.status_code == 400
        assert "too many tools" in response.text

    play(tmp_path, scene)


def test_no_more_at_once_than_the_provider_allows(tmp_path: Path) -> None:
    async def scene(made: Rig, provider: Provider) -> None:
        most = 0

        async def slow(exchange: Exchange) -> None:
            nonlocal most
            most = max(most, sum(1 for e in provider.exchanges if not e.written))
            await asyncio.sleep(0.05)
            await checked(exchange)

        provider.script.extend([slow] * 6)
        responses = await asyncio.gather(*(post(made, max_tokens=1) for _ in range(6)))
        assert [response.status_code for response in responses] == [200] * 6
        assert most == 2

    play(tmp_path, scene)


@pytest.mark.parametrize("wrong", ["another authority", "no key", "silent", "away"])
def test_what_goes_wrong_is_an_error_without_secrets(
    tmp_path: Path, wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    more: dict[str, Any] = {"ca_file": ""} if wrong == "another authority" else {}
    if wrong == "no key":
        monkeypatch.delenv("FAR_KEY")

    async def silent(exchange: Exchange) -> None:
        await exchange.gone.wait()

    async def scene(made: Rig, provider: Provider) -> None:
        provider.script.extend([silent] * 4 if wrong == "silent" else [])
        if wrong == "away":
            await provider.kill()
        response = await post(made)
        assert response.status_code in (502, 503), response.text
        assert SECRET not in response.text + caplog.text
        assert not made.journal.final[-1].billable

    play(tmp_path, scene, **more)
    words = {"another authority": "certificate", "no key": "env:FAR_KEY", "silent": "nothing for", "away": "accept"}
    assert words[wrong] in caplog.text, "the operator is told why"


def test_a_key_in_a_file_can_be_rotated(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("sk-old\n")

    async def scene(made: Rig, provider: Provider) -> None:
        provider.script.extend([checked, checked])
        assert (await post(made)).status_code == 502
        file.write_text(SECRET + "\n")
        assert (await post(made)).status_code == 200

    play(tmp_path, scene, key=f"file:{file}")


def test_a_cut_off_stream_is_billed_by_the_pieces_that_came(tmp_path: Path) -> None:
    async def scene(made: Rig, provider: Provider) -> None:
        async def breaks(exchange: Exchange) -> None:
            await exchange.head()
            for text in ("one", "two"):
                chunk = json.dumps({"choices": [{"delta": {"content": text}}]}, separators=(",", ":"))
                await exchange.chunk(f"data: {chunk}\n\n".encode())
            exchange.writer.close()

        provider.script.append(breaks)
        response = await post(made, stream=True)
        assert "engine_error" in response.text
        record = made.journal.final[-1]
        assert (record.outcome, record.output_tokens) == (Outcome.ENGINE_LOST, 2)
        assert record.count_source is CountSource.DELIVERED_PIECES

    play(tmp_path, scene)
