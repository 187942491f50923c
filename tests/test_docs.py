"""The pages people read agree with the code."""

from pathlib import Path

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
