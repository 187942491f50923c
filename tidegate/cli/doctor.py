"""`tidegate doctor`: can this machine run the platform, and what would it get?"""

import typer

from tidegate.cli.output import Format, Output, show

MARKS = {"ok": "ok", "warn": "warning", "bad": "PROBLEM"}


def doctor(output: Output = Format.TABLE) -> None:
    """Check Python, memory, disk, port, accelerators and data directory. Exit code 1 when something is in the way."""
    from tidegate.assemble.checks import examine

    found = examine()
    rows = [{"check": check.name, "result": MARKS[check.verdict], "detail": check.detail} for check in found]
    show(rows, output, ("check", "result", "detail"))
    if any(check.verdict == "bad" for check in found):
        raise typer.Exit(1)
