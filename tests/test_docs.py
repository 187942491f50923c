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
    assert documented == {code: str(status) for code, (status, _) in REFUSALS.items()}


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make up" in readme
    assert "make test" in readme
