"""The pages people read agree with the code."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from tidegate.cli.app import app
from tidegate.domain.errors import REFUSALS

ROOT = Path(__file__).parent.parent


def test_every_refusal_is_documented_with_its_status() -> None:
    rows = [line for line in (ROOT / "docs" / "errors.md").read_text().splitlines() if line.startswith("| `")]
    documented: dict[str, str] = {}
    for row in rows:
        codes, status = row.split("|")[1:3]
        for code in codes.split(","):
            documented[code.strip(" `")] = status.strip()
    bug = {"internal_error": "500"}  # not a refusal: what a client sees of a bug
    assert documented == {code: str(status) for code, (status, _) in REFUSALS.items()} | bug


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make up" in readme
    assert "make test" in readme


def test_the_architecture_page_has_a_line_for_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    modules = [
        ".".join(path.relative_to(ROOT / "tidegate").with_suffix("").parts)
        for path in (ROOT / "tidegate").rglob("*.py")
        if not path.name.startswith("__") and "migrations" not in path.parts
    ]
    assert [module for module in modules if f"- `{module}`: " not in page] == []


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "bench" / "results").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#:\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_every_page_can_be_found_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert [name for name in sorted(names) if f"({name})" not in index] == []


def test_every_page_says_what_falls_short() -> None:
    pages = [page for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"]
    assert [page.name for page in pages if "\n## What falls short" not in page.read_text()] == []


def _commands() -> list[tuple[str, str]]:
    """(page, line) of every `tidegate …` in a block of code; ` | ` between verbs and `·` begin another."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```.*?\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in re.sub(r"\\\n", " ", block).splitlines():
                if line.startswith("tidegate "):
                    found.append((page.name, line.partition(" #")[0].partition("   ")[0].partition(" | ")[0]))
    return found


def test_every_command_shown_is_one_there_is() -> None:
    root: Any = typer.main.get_command(app)
    wrong = []
    for page, line in _commands():
        command, words = root, shlex.split(line.partition(" · ")[0].partition(" && ")[0], comments=False)[1:]
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        named = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        bad = sorted(named - options - {"--help", "--version"})
        if bad or (getattr(command, "commands", None) and words and not words[0].startswith("-")):
            wrong.append(f"{page}: {line} ({bad})")
    assert wrong == []
    assert len(_commands()) > 30
