"""What lies in deploy/ speaks of things that are there: metrics, options, settings, files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tidegate.cli.app import app
from tidegate.config import Config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def _metrics(text: str) -> set[str]:
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\btidegate_[a-z_]+", text)}


def test_every_metric_of_the_dashboard_is_documented_and_made() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "tidegate.json").read_text())
    asked = _metrics(" ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]))
    documented = _metrics((ROOT / "docs" / "metrics.md").read_text())
    code = " ".join(path.read_text() for path in (ROOT / "tidegate").rglob("*.py"))
    assert len(asked) > 20
    assert asked - documented == set()
    for name in asked:
        # prometheus-client adds `_total` to counters itself; some families are made from a list of names.
        plain = name.removesuffix("_total")
        assert plain in code or f'"{plain.removeprefix("tidegate_")}"' in code, name


def test_the_dashboard_is_whole() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "tidegate.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places), "no panel lies on another"
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]+)", json.dumps(dashboard))) <= variables


def test_gateways_elsewhere_are_scraped_for_what_is_theirs() -> None:
    rule = re.search(r"regex: (\S+)", (DEPLOY / "grafana" / "prometheus.yml").read_text())
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert rule is not None
    theirs = page.split("## Requests (gateway)")[1].split("\n## ")[0]
    for name in _metrics("\n".join(line for line in theirs.splitlines() if line.startswith("| `"))):
        assert re.fullmatch(rule[1], name) or re.fullmatch(rule[1], f"{name}_bucket"), name
    for name in _metrics(page.split("## Capacity (control)")[1].split("\n## ")[0]):
        assert not re.fullmatch(rule[1], name), name


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_start_tidegate_with_options_it_has(unit: Path) -> None:
    text = unit.read_text()
    start = re.search(r"^ExecStart=\S+/tidegate (.+)$", text, re.MULTILINE)
    assert start is not None
    _check_options(start[1].split())
    _check_settings(text)
    assert "User=tidegate" in text
    assert "KillSignal=SIGINT" in text, "records are shipped and engines ended by the part itself"


def test_compose_starts_tidegate_with_options_and_settings_it_has() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    commands = re.findall(r"command: \[(.+)\]", text)
    assert len(commands) == 3
    for command in commands:
        _check_options([word.strip(' "') for word in command.split(",")])
    _check_settings(text)
    for name in re.findall(r"dockerfile: (\S+?)}", text):
        assert (ROOT / name).is_file()


def test_the_image_runs_as_nobody_special_and_copies_what_is_there() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^USER tidegate$", text, re.MULTILINE)
    _check_settings(text)
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name


def _check_options(words: list[str]) -> None:
    command: Any = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def _check_settings(text: str) -> None:
    for name in re.findall(r"\bTIDEGATE_([A-Z_]+)", text):
        key, _, inner = name.lower().partition("__")
        if key == "join_token":  # an option's own variable
            continue
        assert key in Config.model_fields, name
        section = Config.model_fields[key].annotation
        assert not inner or inner in section.model_fields, name  # type: ignore[union-attr]
