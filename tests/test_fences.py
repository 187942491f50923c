"""The floors hold, and every import contract bites: each has a mutant it must catch, by name.

All mutants are put into one copy of the package and linted in one run: a contract has bitten only if its own section
of the report shows its own mutant's import.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
NAMES = {contract["id"]: contract["name"] for contract in CONTRACTS}


@dataclass(frozen=True)
class Mutant:
    """`line` appended to `module` of the package must show as `importer -> imported` under `contract`."""

    contract: str
    module: str
    line: str
    imported: str

    @property
    def importer(self) -> str:
        return "tidegate." + self.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MUTANTS = [
    Mutant("floors", "domain/units.py", "from tidegate.policy import costs", "tidegate.policy"),
    Mutant("floors", "billing/service.py", "from tidegate.control import keys", "tidegate.control.keys"),
    Mutant("floors", "batch/job.py", "from tidegate.gateway import limits", "tidegate.gateway.limits"),
    Mutant("floors", "stores/state.py", "from tidegate.engines import logs", "tidegate.engines.logs"),
    Mutant("floors", "money/rating.py", "from tidegate.policy import costs", "tidegate.policy.costs"),
    Mutant("floors", "quota/gate.py", "from tidegate.money import rating", "tidegate.money.rating"),
    Mutant("pure", "quota/gate.py", "import time", "time"),
    Mutant("floors", "policy/costs.py", "from tidegate.money import rating", "tidegate.money.rating"),
    Mutant("floors", "dispatch/room.py", "from tidegate.policy import costs", "tidegate.policy.costs"),
    Mutant("domain-order", "domain/units.py", "from tidegate.domain import ports", "tidegate.domain.ports"),
    Mutant("pure", "domain/fleet.py", "import time", "time"),
    Mutant("pure", "policy/costs.py", "import asyncio", "asyncio"),
    Mutant("pure", "wire/internal.py", "import random", "random"),
    Mutant("pure", "money/rating.py", "import logging", "logging"),
    Mutant("pure", "dispatch/room.py", "import asyncio", "asyncio"),
    Mutant("policies", "policy/eviction.py", "from tidegate.policy import scaling", "tidegate.policy.scaling"),
    Mutant("policies", "policy/costs.py", "from tidegate.policy import forecast", "tidegate.policy.forecast"),
    Mutant("who-may-ask", "quota/routing.py", "from tidegate.quota import admission", "tidegate.quota.admission"),
    Mutant("adapters-by-assemble", "node/agent.py", "from tidegate.engines import process", "tidegate.engines.process"),
    Mutant("adapters-by-assemble", "control/loop.py", "from tidegate.stores import state", "tidegate.stores.state"),
    Mutant("adapters-by-assemble", "cli/keys.py", "from tidegate.transports import local", "tidegate.transports.local"),
    Mutant("engines-independent", "engines/builtin.py", "from tidegate.engines import fake", "tidegate.engines.fake"),
    Mutant("engines-independent", "engines/vllm.py", "from tidegate.engines import sglang", "tidegate.engines.sglang"),
    Mutant("torch-engine-alone", "torch_engine/server.py", "from tidegate.policy import costs", "tidegate.policy"),
    Mutant("torch-engine-unimported", "engines/builtin.py", "import tidegate.torch_engine", "tidegate.torch_engine"),
    Mutant("sim-pure", "sim/world.py", "import asyncio", "asyncio"),
    Mutant("advisor-pure", "advisor/read.py", "from tidegate.billing import periods", "tidegate.billing.periods"),
    Mutant("advisor-pure", "advisor/traffic.py", "import asyncio", "asyncio"),
    Mutant("sql-in-stores", "billing/ingest.py", "import sqlalchemy", "sqlalchemy"),
    Mutant("torch-in-engine", "node/limits.py", "import torch", "torch"),
    Mutant("programs-in-process", "assemble/checks.py", "import subprocess", "subprocess"),
    Mutant("no-ray", "transports/socket.py", "import ray", "ray"),
    Mutant("keys-in-their-places", "gateway/app.py", "import cryptography", "cryptography"),
    Mutant("config-at-the-edge", "control/settings.py", "from tidegate import config", "tidegate.config"),
    Mutant("light-gateway", "gateway/limits.py", "import pydantic", "pydantic"),
    Mutant("no-cycles", "node/limits.py", "from tidegate.node import agent", "tidegate.node.agent"),
]


def lint(folder: Path) -> tuple[int, str]:
    command = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    )
    environment = os.environ | {"COLUMNS": "250"}  # a headline that wraps is no longer the contract's name
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mutants")
    ignored = shutil.ignore_patterns("*.safetensors", "__pycache__", "static")
    shutil.copytree(ROOT / "tidegate", folder / "tidegate", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for mutant in MUTANTS:
        with (folder / "tidegate" / mutant.module).open("a") as file:
            file.write(f"\n{mutant.line}\n")
    code, report = lint(folder)
    assert code == 1, report
    return report


def section(report: str, name: str) -> str:
    """What the report says below the contract's headline, up to the next one's."""
    headlines = "|".join(re.escape(other) for other in NAMES.values())
    parts = re.split(rf"^({headlines})$", report, flags=re.MULTILINE)
    return "".join(text for headline, text in zip(parts[1::2], parts[2::2], strict=True) if headline == name)


def test_the_floors_hold() -> None:
    code, report = lint(ROOT)
    assert code == 0, report


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.contract}:{m.module}")
def test_each_contract_bites(mutant: Mutant, mutated: str) -> None:
    assert re.search(rf"^{re.escape(NAMES[mutant.contract])} BROKEN\b", mutated, re.MULTILINE), mutated
    broken = section(mutated, NAMES[mutant.contract])
    shown = rf"{re.escape(mutant.importer)}\S* -> {re.escape(mutant.imported)}\b"
    importing = rf"{re.escape(mutant.importer)} is not allowed to import {re.escape(mutant.imported)}"
    cycle = rf"{re.escape(mutant.imported.rpartition('.')[2])}\b"
    pattern = cycle if mutant.contract == "no-cycles" else f"{shown}|{importing}"
    assert re.search(pattern, broken), broken


def test_every_contract_has_a_mutant() -> None:
    assert {mutant.contract for mutant in MUTANTS} == set(NAMES)


def test_strict_types_below() -> None:
    """`mypy --strict` on the floors where a wrong type would be a wrong decision or a wrong bill."""
    floors = [f"tidegate/{floor}" for floor in ("domain", "policy", "wire", "money", "quota", "dispatch")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *floors], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_is_content() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
