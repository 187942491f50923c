"""Who may join, who may not, and what a part that was sent away can still do: nothing."""

import asyncio
import ssl
import stat
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from tests.transports.machines import CONTROL_PLANE, EVERYBODY, ControlMachine, listening
from tidegate.domain.errors import LinkFault
from tidegate.transports import authority, enrolment, secure
from tidegate.transports.authority import open_authority, read_token
from tidegate.transports.door import Door, Service
from tidegate.transports.enrolment import Registrar, join, joined, renew_when_due
from tidegate.transports.identity import Identity, Peer, peer_of
from tidegate.transports.tls import JOIN, LINK, Credentials, Dialer, open_tls, parse
from tidegate.wire.internal import GatewayHello
from tidegate.wire.joining import AskRemoved, Enrol

HELLO = GatewayHello("g", "us")


def run(directory: Path, scenario: Callable[[ControlMachine], Awaitable[None]]) -> None:
    async def main() -> None:
        machine = ControlMachine(directory)
        await machine.open()
        try:
            async with asyncio.timeout(20):
                await scenario(machine)
        finally:
            await machine.close()

    asyncio.run(main())


def test_who_has_joined_is_known_by_its_certificate(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        known, credentials = await machine.joined("node", "us-1")
        link = await secure.connector(Dialer(credentials), known.control, LINK)()
        await link.send(HELLO)
        there = await machine.links.accept()
        assert await there.receive() == HELLO
        assert there.peer == "node/us-1/us"
        assert joined(credentials.folder) == known, "it needs no token the next time"
        for private in (credentials.folder / "identity.pem", machine.folder / "pki" / "ca.key"):
            assert stat.S_IMODE(private.stat().st_mode) == 0o600
        await link.close()
        await there.close()

    run(tmp_path, scenario)


def test_a_token_works_once_in_time_and_for_its_own_platform(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        token = machine.token("node", "us-1")
        await join(tmp_path / "a", token)
        with pytest.raises(LinkFault, match="used already"):
            await join(tmp_path / "b", token)
        with pytest.raises(LinkFault, match="expired"):
            await join(tmp_path / "b", machine.token("node", "us-2", valid_ms=-1))
        other = open_authority(tmp_path / "other-pki")
        stolen = other.token(Identity("node", "us-3", "us"), machine.address, 60_000)
        with pytest.raises(LinkFault, match="not the platform this token is for"):
            await join(tmp_path / "b", stolen)
        assert not (tmp_path / "b").exists(), "nothing is kept of what was refused"

    run(tmp_path, scenario)


def test_of_two_who_redeem_a_token_at_once_one_gets_in(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        token = machine.token("node", "us-1")
        tries = await asyncio.gather(*(join(tmp_path / str(n), token) for n in range(5)), return_exceptions=True)
        assert sorted(type(one).__name__ for one in tries) == ["Joined", *["LinkFault"] * 4]

    run(tmp_path, scenario)


@pytest.mark.parametrize("text", ["", "tg1.", "tg1.e30", "hello", "tg1.!!!"])
def test_half_a_token_is_refused(text: str) -> None:
    with pytest.raises(LinkFault, match="not a whole join token"):
        read_token(text)


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "-a", "x" * 64, "a\n"])
def test_a_name_that_could_be_read_otherwise_gets_no_token(name: str, tmp_path: Path) -> None:
    known = open_authority(tmp_path)
    with pytest.raises(LinkFault, match="accepted"):
        known.token(Identity("node", name, "us"), "h:1", 1_000)
    with pytest.raises(LinkFault, match="accepted"):
        known.token(Identity("node", "n", name), "h:1", 1_000)


def test_a_part_that_was_removed_loses_its_link_and_gets_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secure, "BEAT_MS", 20)

    async def scenario(machine: ControlMachine) -> None:
        known, credentials = await machine.joined("node", "us-1")
        dialer = Dialer(credentials)
        connect = secure.connector(dialer, known.control, LINK)
        link, there = await connect(), await machine.links.accept()
        assert machine.authority.remove("node", "us-1")
        assert not machine.authority.remove("node", "us-1")
        with pytest.raises(LinkFault, match="removed"):
            await there.receive()
        with pytest.raises(LinkFault):
            await link.receive()
        again = await connect()
        with pytest.raises(LinkFault):
            await again.receive()
        with pytest.raises(LinkFault):
            await enrolment._ask(
                parse(known.control),
                Enrol("x"),
                lambda protocol: dialer.open(parse(known.control), "tidegate-join", protocol),
            )
        for one in (link, there, again):
            await one.close()

    run(tmp_path, scenario)


def test_other_machines_send_a_removed_gateway_away_too(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        known, credentials = await machine.joined("node", "us-1")
        _, gateway = await machine.joined("gateway", "us-gw")
        asking, refused = Dialer(credentials), frozenset(await enrolment.removed(known, Dialer(credentials)))
        links, listener = secure.SecureListener(lambda peer: True), listening()
        door = Door(credentials, {LINK: Service(EVERYBODY, links.serve)}, lambda peer: peer.serial not in refused)
        await door.listen(listener)
        connect = secure.connector(Dialer(gateway), f"tls:127.0.0.1:{listener.getsockname()[1]}/node/us-1", LINK)
        link, there = await connect(), await links.accept()
        machine.authority.remove("gateway", "us-gw")
        refused = await enrolment.removed(known, asking)
        door.look_again()
        for end in (link, there):
            with pytest.raises(LinkFault):
                await end.receive()
            await end.close()
        again = await connect()
        with pytest.raises(LinkFault):
            await again.receive()
        await again.close()
        token = machine.token("gateway", "us-gw")
        await join(gateway.folder, token)
        back = await connect()
        await back.send(HELLO)
        assert await (await links.accept()).receive() == HELLO, "with a new certificate it is welcome"
        await back.close()
        await door.close()

    run(tmp_path, scenario)


def test_who_was_removed_is_told_to_parts_only(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        where = parse(machine.control)
        with pytest.raises(LinkFault):
            await enrolment._ask(where, AskRemoved(), enrolment._stranger(where, _anybody(machine)))

    run(tmp_path, scenario)


def test_a_stranger_and_a_part_of_another_platform_are_turned_away(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        other = open_authority(tmp_path / "other-pki")
        credentials = other.own(Identity("node", "us-1", "us"), tmp_path / "foreign")
        (credentials.folder / "ca.pem").write_bytes(machine.authority.pem)  # it would trust us
        # TLS 1.3 tells a client only afterwards that its certificate was refused.
        link = await secure.connector(Dialer(Credentials(credentials.folder)), machine.control, LINK)()
        with pytest.raises(LinkFault):
            await link.receive()
        await link.close()
        naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        naked.check_hostname = False
        naked.load_verify_locations(cadata=machine.authority.pem.decode())
        naked.set_alpn_protocols([LINK])
        host, _, port = machine.address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=naked)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        assert machine.links._accepted.empty(), "neither got as far as a link"

    run(tmp_path, scenario)


def test_another_part_of_the_same_platform_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        _, credentials = await machine.joined("node", "us-1")
        _, impostor = await machine.joined("node", "us-2")
        listener = listening()
        links = secure.SecureListener(lambda peer: True)
        door = Door(impostor, {LINK: Service(EVERYBODY, links.serve)})
        await door.listen(listener)
        port = listener.getsockname()[1]
        for address in (f"tls:127.0.0.1:{port}/node/us-3", f"tls:127.0.0.1:{port}/control/control"):
            with pytest.raises(LinkFault, match="is not"):
                await secure.connector(Dialer(credentials), address, LINK)()
        await door.close()

    run(tmp_path, scenario)


def test_a_certificate_is_renewed_in_time_and_the_one_before_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(machine: ControlMachine) -> None:
        known, credentials = await machine.joined("node", "us-1")
        dialer = Dialer(credentials)
        assert not await renew_when_due(credentials.folder, known, dialer)
        before = (credentials.folder / "identity.pem").read_bytes()
        connect = secure.connector(dialer, known.control, LINK)
        link, there = await connect(), await machine.links.accept()
        monkeypatch.setattr(enrolment, "RENEW_AFTER", timedelta(days=-2))
        assert await renew_when_due(credentials.folder, known, dialer)
        assert (credentials.folder / "identity.pem").read_bytes() != before
        await link.send(HELLO)
        assert await there.receive() == HELLO, "the link of before goes on"
        renewed, beside = await connect(), await machine.links.accept()
        await renewed.send(HELLO)
        assert await beside.receive() == HELLO
        for one in (link, there, renewed, beside):
            await one.close()

    run(tmp_path, scenario)


def test_a_door_shows_the_renewed_certificate(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        before = await _shown(machine)
        machine.authority.own(CONTROL_PLANE, machine.credentials.folder)
        assert await _shown(machine) == before
        machine.credentials.refresh()
        assert await _shown(machine) != before

    run(tmp_path, scenario)


async def _shown(machine: ControlMachine) -> int:
    """The number of the certificate that the door shows."""
    host, _, port = machine.address.partition(":")
    transport, _ = await open_tls(host, int(port), _anybody(machine), asyncio.Protocol)
    peer = peer_of(transport.get_extra_info("ssl_object"))
    transport.abort()
    assert peer is not None
    return peer.serial


def _anybody(machine: ControlMachine) -> ssl.SSLContext:
    """Trusts the platform and has no certificate."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    tls.check_hostname = False
    tls.load_verify_locations(cadata=machine.authority.pem.decode())
    tls.set_alpn_protocols([JOIN])
    return tls


def test_one_more_than_may_join_at_once_is_turned_away(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        listener = listening()
        door = Door(machine.credentials, {JOIN: Service(frozenset(), Registrar(machine.authority).serve, 2)})
        await door.listen(listener)
        opened = [await asyncio.open_connection(*listener.getsockname(), ssl=_anybody(machine)) for _ in range(3)]
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await opened[2][0].readexactly(1)
        assert not opened[0][0].at_eof()
        for _, writer in opened:
            writer.transport.abort()
        await door.close()

    run(tmp_path, scenario)


def test_a_part_that_was_removed_comes_back_with_a_new_token(tmp_path: Path) -> None:
    async def scenario(machine: ControlMachine) -> None:
        token = machine.token("node", "us-1")
        known = await join(tmp_path / "us", token)
        assert not enrolment.is_new(known, token), "a restart with the same token in its environment joins nothing"
        assert not enrolment.is_new(known, "")
        machine.authority.remove("node", "us-1")
        another = machine.token("node", "us-1")
        assert enrolment.is_new(known, another)
        await join(tmp_path / "us", another)
        link = await secure.connector(Dialer(Credentials(tmp_path / "us")), machine.control, LINK)()
        there = await machine.links.accept()
        await link.send(HELLO)
        assert await there.receive() == HELLO
        await link.close()
        await there.close()

    run(tmp_path, scenario)


def test_certificates_are_good_for_machines_whose_clock_is_behind(tmp_path: Path) -> None:
    known = open_authority(tmp_path)
    known.own(CONTROL_PLANE, tmp_path / "own")
    certificate = x509.load_pem_x509_certificate((tmp_path / "own" / "identity.pem").read_bytes())
    assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(hours=23)
    assert certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(days=authority.CERTIFICATE_DAYS - 1)


def test_an_authority_of_ones_own_is_used_and_a_wrong_key_refused(tmp_path: Path) -> None:
    theirs = open_authority(tmp_path / "theirs")
    files = tmp_path / "theirs" / "ca.pem", tmp_path / "theirs" / "ca.key"
    assert open_authority(tmp_path / "ours", *files).digest == theirs.digest
    assert open_authority(tmp_path / "theirs").digest == theirs.digest, "a restart finds the same"
    open_authority(tmp_path / "others")
    with pytest.raises(LinkFault, match="is not the elliptic-curve key of"):
        open_authority(tmp_path / "ours", files[0], tmp_path / "others" / "ca.key")
    with pytest.raises(LinkFault, match="cannot be read"):
        open_authority(tmp_path / "ours", files[0], tmp_path / "nowhere")


def test_only_the_last_two_certificates_of_a_part_count(tmp_path: Path) -> None:
    known, who = open_authority(tmp_path / "pki"), Identity("gateway", "us", "us")
    seen: list[int] = []
    for _ in range(3):
        pem = known.issue(authority.new_request()[1], who)
        seen.append(x509.load_pem_x509_certificate(pem).serial_number)
    assert [known.admitted(who, serial) for serial in seen] == [False, True, True]
    assert not known.admitted(Identity("gateway", "us", "eu"), seen[-1]), "a region is part of who one is"


def test_silence_ends_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "SILENCE_MS_MAX", 100)
    monkeypatch.setattr(secure, "BEAT_MS", 60_000)  # as if the cable were cut after the first

    async def scenario(machine: ControlMachine) -> None:
        known, credentials = await machine.joined("node", "us-1")
        link = await secure.connector(Dialer(credentials), known.control, LINK)()
        there = await machine.links.accept()
        with pytest.raises(LinkFault, match="nothing was heard"):
            await there.receive()
        await link.close()
        await there.close()

    run(tmp_path, scenario)


def test_a_process_that_stood_still_takes_nobody_else_for_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came meanwhile is there and only not read yet: else a pause of the platform would cost it every node."""
    monkeypatch.setattr(secure, "SILENCE_MS_MAX", 100)
    monkeypatch.setattr(secure, "BEAT_MS", 60_000)

    async def scenario(machine: ControlMachine) -> None:
        known, credentials = await machine.joined("node", "us-1")
        link = await secure.connector(Dialer(credentials), known.control, LINK)()
        there = await machine.links.accept()
        await link.send(HELLO)
        assert await there.receive() == HELLO
        listening = asyncio.create_task(there.receive())
        await asyncio.sleep(0)
        await link.send(HELLO)
        time.sleep(0.3)  # noqa: ASYNC251 - the whole process stands still for longer than silence may last
        assert await listening == HELLO
        await link.close()
        await there.close()

    run(tmp_path, scenario)


def test_beats_keep_a_quiet_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secure, "SILENCE_MS_MAX", 500)
    monkeypatch.setattr(secure, "BEAT_MS", 20)

    async def scenario(machine: ControlMachine) -> None:
        known, credentials = await machine.joined("node", "us-1")
        link = await secure.connector(Dialer(credentials), known.control, LINK)()
        there = await machine.links.accept()
        listening = [asyncio.create_task(one.receive()) for one in (link, there)]
        await asyncio.sleep(1.2)
        assert not any(task.done() for task in listening)
        await link.send(HELLO)
        assert await listening[1] == HELLO
        listening[0].cancel()
        await link.close()
        await there.close()

    run(tmp_path, scenario)


def test_the_platforms_clock_counts_whatever_the_machines_own_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, own = secure.SharedClock(), [1_000_000]
    monkeypatch.setattr(secure, "own_ms", lambda: own[0])
    clock.heard(999_900, 999_950 + 3_600_000)  # asked 100 ms ago; there it is an hour later
    assert clock.now_ms() == 1_000_000 + 3_600_000
    clock.heard(999_900, 999_950 + 3_600_040)
    assert clock.now_ms() == 1_000_000 + 3_600_000, "40 ms are within what is not known"
    clock.heard(999_998, 999_999 + 3_600_040)
    assert clock.now_ms() == 1_000_000 + 3_600_040
    own[0] += 5_000
    assert clock.now_ms() == 1_005_000 + 3_600_040


@pytest.mark.parametrize(
    "address", ["", "tls:", "tls:h:1", "tls:h/node/a", "tls:h:x/node/a", "tcp:h:1/node/a", "tls:h:99999/node/a"]
)
def test_addresses(address: str) -> None:
    with pytest.raises(LinkFault):
        parse(address)


def test_peers_are_whole() -> None:
    assert str(Peer(Identity("node", "a", "b"), 1).identity) == "node/a/b"
    assert parse("tls:[::1]:7443/node/a/replica:r").host == "::1"
