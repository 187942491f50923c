"""The house is tidy, and every tidy rule bites: for each there is a mutant it must catch."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.tidy import (
    CORE_LINES_MAX,
    DISPATCH_LINES_MAX,
    MONEY_LINES_MAX,
    QUOTA_LINES_MAX,
    RULES,
    Module,
    findings,
    parse,
    text_findings,
)

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tidegate"
BINARY = {".safetensors", ".png", ".woff2", ".ico", ".gz", ".parquet"}


def committed() -> dict[str, str]:
    """Text of what git tracks, by path; of the checkout's own files where there is no git."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
        names = [name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        folders = ("tidegate", "tests", "docs", "bench", "tools")
        names = [str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file()]
        names += ["README.md", "Makefile", "pyproject.toml"]
    kept = [name for name in names if Path(name).suffix not in BINARY and (ROOT / name).is_file()]
    return {name: (ROOT / name).read_text(errors="replace") for name in kept}


def test_package_is_tidy() -> None:
    assert not [str(finding) for finding in findings(parse(PACKAGE))]


def test_repository_text_is_clean() -> None:
    files = committed()
    assert len(files) > 30
    assert not [str(finding) for finding in text_findings(files)]


DOC = '"""A module."""\n'
# rule, path in the package, source that breaks exactly it
MUTANTS: list[tuple[str, str, str]] = [
    ("module-length", "gateway/x.py", DOC + "x = 1\n" * 400),
    ("function-length", "gateway/x.py", DOC + "def f() -> None:\n" + "    x = 1\n" * 60),
    ("docstring", "gateway/x.py", "x = 1\n"),
    ("print-call", "gateway/x.py", DOC + "print('hello')\n"),
    ("swallowed", "gateway/x.py", DOC + "try:\n    x = 1\nexcept:\n    raise\n"),
    ("swallowed", "gateway/x.py", DOC + "try:\n    x = 1\nexcept ValueError:\n    pass\n"),
    ("swallowed", "gateway/x.py", DOC + "import contextlib\nwith contextlib.suppress(Exception):\n    x = 1\n"),
    ("unsafe-loading", "stores/x.py", DOC + "import pickle\n"),
    ("unsafe-loading", "stores/x.py", DOC + "from pickle import loads\n"),
    ("unsafe-loading", "cli/x.py", DOC + "x = eval('1')\n"),
    ("unsafe-loading", "torch_engine/x.py", DOC + "import torch\nx = torch.load('x.bin')\n"),
    ("unsafe-loading", "torch_engine/x.py", DOC + "x = load('x', trust_remote_code=True)\n"),
    ("unsafe-loading", "engines/x.py", DOC + "x = start('ls', shell=True)\n"),
    ("blocking-in-async", "node/x.py", DOC + "import time\nasync def f() -> None:\n    time.sleep(1)\n"),
    ("unbounded-queue", "control/x.py", DOC + "import asyncio\nq = asyncio.Queue()\n"),
    ("logged-content", "gateway/x.py", DOC + "def f(log, body):\n    log.info('got %s', body)\n"),
    ("logged-content", "gateway/x.py", DOC + "def f(logger, request):\n    logger.error(f'bad {request.prompt}')\n"),
    ("unfinished", "billing/x.py", DOC + "x = 1  # TO" + "DO later\n"),
    ("unfinished", "billing/x.py", DOC + "def f() -> None:\n    raise NotImplementedError\n"),
    ("wall-clock-in-services", "billing/x.py", DOC + "import time\nx = time.time()\n"),
]


@pytest.mark.parametrize(("rule", "path", "source"), MUTANTS)
def test_each_rule_bites(rule: str, path: str, source: str) -> None:
    found = findings([Module(path, source, ast.parse(source))])
    assert {finding.rule for finding in found} == {rule}


def test_every_rule_has_a_mutant() -> None:
    assert {rule for rule, _, _ in MUTANTS} == set(RULES)


@pytest.mark.parametrize(
    ("rule", "floor", "lines_max"),
    [
        ("core-length", "policy", CORE_LINES_MAX),
        ("money-length", "money", MONEY_LINES_MAX),
        ("quota-length", "quota", QUOTA_LINES_MAX),
        ("dispatch-length", "dispatch", DISPATCH_LINES_MAX),
    ],
)
def test_the_length_rules_bite(rule: str, floor: str, lines_max: int) -> None:
    part = DOC + "x = 1\n" * 390
    modules = [Module(f"{floor}/m{n}.py", part, ast.parse(part)) for n in range(lines_max // 390 + 1)]
    assert [finding.rule for finding in findings(modules)] == [rule]


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("machine-path", "see /wo" + "rk/main/x"),
        ("machine-path", "cd /ro" + "ot/x"),
        ("registry-host", "https://py" + "pi.org/simple"),
        ("workshop-tool", "run fa" + "rm-start"),
    ],
)
def test_each_text_rule_bites(rule: str, text: str) -> None:
    assert [(f.rule, f.where) for f in text_findings({"docs/x.md": "fine\n" + text})] == [(rule, "docs/x.md:2")]


@pytest.mark.parametrize("text", ["POST /api/v1/work", "tenant/home", "https://a.example/root", "the issues of a peer"])
def test_text_rules_leave_ordinary_text_alone(text: str) -> None:
    assert not text_findings({"docs/x.md": text})
