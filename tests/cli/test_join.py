"""`tidegate join` on a machine where something is missing: it says what, and what to do."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidegate.cli.app import app
from tidegate.cli.output import Problem
from tidegate.transports.authority import open_authority
from tidegate.transports.identity import Identity

NODE = ["join", "node", "us-1", "--region", "us"]


def refused(*words: str) -> tuple[int, str]:
    """(exit code, what is said)."""
    found = CliRunner().invoke(app, list(words))
    if isinstance(found.exception, Problem):
        return found.exception.exit_code, str(found.exception)
    return found.exit_code, found.output


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIDEGATE_JOIN_TOKEN", raising=False)


def test_without_a_platform_here_and_without_a_token_both_ways_are_named() -> None:
    code, said = refused(*NODE)
    assert code == 1
    assert "start `tidegate up` there first" in said
    assert "--token" in said


def test_a_token_is_made_only_where_other_machines_may_come_in() -> None:
    code, said = refused("join", "token", "node", "us-1", "--region", "us")
    assert code == 2
    assert "links.listen" in said


@pytest.mark.parametrize(
    "words",
    [
        ["join", "token", "engine", "us-1", "--region", "us"],
        ["join", "token", "node", "us-1", "--region", "us", "--minutes", "0"],
        ["join", "token", "node", "us-1"],
        ["join", "gateway", "--region", "us", "--port", "0", "--token", "x"],
        [*NODE, "--listen", "nowhere"],
        [*NODE, "--address", "host:port"],
    ],
)
def test_bad_input_is_the_callers_mistake(words: list[str]) -> None:
    code, said = refused(*words)
    assert code == 2, said


def test_half_a_token_is_refused_before_anything_runs() -> None:
    code, said = refused(*NODE, "--token", "tg1.half")
    assert code == 1
    assert "not a whole join token" in said


def test_nobody_there_is_said_with_the_address(tmp_path: Path) -> None:
    token = open_authority(tmp_path / "pki").token(Identity("node", "us-1", "us"), "127.0.0.1:9", 60_000)
    code, said = refused(*NODE, "--token", token, "--data-dir", str(tmp_path / "node"))
    assert code == 1
    assert "127.0.0.1:9" in said


def test_a_name_that_fits_no_certificate_is_refused_by_name(tmp_path: Path) -> None:
    open_authority(tmp_path / ".tidegate" / "pki")
    (tmp_path / ".tidegate" / "pki" / "address").write_text("127.0.0.1:9")
    code, said = refused("join", "token", "node", "US 1", "--region", "us")
    assert code == 2
    assert "name 'US 1' is refused; accepted" in said
    code, said = refused("join", "token", "node", "node-0", "--region", "us")
    assert (code, "choose another name" in said) == (2, True)


def test_tokens_members_and_removal(tmp_path: Path) -> None:
    authority = open_authority(tmp_path / ".tidegate" / "pki")
    (tmp_path / ".tidegate" / "pki" / "address").write_text("127.0.0.1:9")
    result = CliRunner().invoke(app, ["join", "token", "node", "us-1", "--region", "us"])
    assert result.exit_code == 0
    assert result.output.startswith("tg1.")
    assert len(list((tmp_path / ".tidegate" / "pki" / "tokens").iterdir())) == 1
    authority.own(Identity("node", "us-1", "us"), tmp_path / "node")
    listed = CliRunner().invoke(app, ["join", "list", "-o", "json"])
    assert '"name": "us-1"' in listed.output
    assert refused("join", "remove", "gateway", "us-1") == (1, "no gateway 'us-1' has joined; there are: node us-1")
    assert CliRunner().invoke(app, ["join", "remove", "node", "us-1"]).exit_code == 0
    assert CliRunner().invoke(app, ["join", "list", "-o", "json"]).output.strip() == "[]"
