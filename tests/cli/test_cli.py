"""The command line without a platform: exit codes, one clear line for what is wrong, JSON that parses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.cli import bench
from tidegate.cli.demo_story import Asked, Story, summary
from tidegate.cli.output import Problem

VERBS = {
    "up", "demo", "doctor", "tune", "simulate", "plan", "endpoints", "tenants", "keys", "nodes", "prices", "usage",
    "invoices",
    "limits", "contracts",
    "bench", "advise", "join",
}  # fmt: skip


def tidegate(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    package = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "tidegate", *arguments],
        cwd=cwd,
        env={**kept, "PYTHONPATH": package, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help_lists_every_verb(tmp_path: Path) -> None:
    done = tidegate("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from tidegate.cli import app; heavy = ('torch', 'sqlalchemy', 'pydantic', 'httpx', 'starlette'); "
        "print([module for module in heavy if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_platform_one_line_says_so(tmp_path: Path) -> None:
    done = tidegate("endpoints", "list", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "tidegate up" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("node", "us-1", "--region", "us"), 1, "no platform runs in"),
        (("node", "us-1", "--region", "US East"), 2, "region: "),
        (("gateway", "--region", "us", "--port", "99999"), 2, "port: "),
    ],
)
def test_joining_what_is_not_there_or_as_what_cannot_be_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = tidegate("join", *arguments, "--join", str(tmp_path / "nowhere"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "nowhere").exists()


def test_a_platform_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = tidegate("nodes", cwd=tmp_path, TIDEGATE_URL=url, TIDEGATE_ADMIN_KEY="x")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert url in done.stderr


WRONG_USAGE = [
    ["nothing"],
    ["endpoints", "create", "acme/x"],
    ["endpoints", "create", "acme", "--model", "m"],
    ["endpoints", "get", "acme"],
    ["tune", "acme"],
    ["nodes", "--url", "127.0.0.1:8000"],
    ["prices", "end"],  # would end the plan everybody is on
    ["endpoints", "wake", "/tides"],
    ["usage"],  # nobody answers there
    ["simulate", "--trace", "t.csv", "--policy", "guess"],
    ["up", "--port", "many"],
    ["up", "--port", "99999"],
    ["up", "--config", "absent.toml"],
    ["keys", "create"],
    ["keys", "create", "acme", "--admin"],
    ["batches", "list", "--key", ""],
    ["batches", "list"],  # the administrator's key is nobody's
    ["batches", "list", "--url", "nowhere", "--key", "x"],
    ["keys", "list", "--url", "http://[::1"],
    ["keys", "list", "--key", "clé"],
    ["usage", "export", "--file", "no/such/folder.csv"],
    ["prices", "rerate"],
]


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=" ".join)
def test_wrong_usage_is_exit_code_2_without_a_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = tidegate(*arguments, cwd=tmp_path, TIDEGATE_URL="http://127.0.0.1:9", TIDEGATE_ADMIN_KEY="x")
    assert done.returncode == 2, done.stderr
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_contradictory_configuration_is_refused_by_key(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text("[gateway]\nhold_ms_max = 10\n")
    done = tidegate("up", cwd=tmp_path)
    assert done.returncode == 2
    assert "gateway.hold_ms_max" in done.stderr
    assert "engine.start_ms_max" in done.stderr


def test_a_taken_port_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = tidegate("up", "--port", port, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert port in done.stderr
    assert "in use" in done.stderr
    assert not (tmp_path / ".tidegate").exists(), "nothing is touched before the port is had"


def test_doctor_speaks_json(tmp_path: Path) -> None:
    done = tidegate("doctor", "-o", "json", cwd=tmp_path, TIDEGATE_PORT="0", TIDEGATE_ACCELERATORS__KIND="cpu")
    checks = {row["check"]: row["result"] for row in json.loads(done.stdout)}
    assert {"python", "accelerators", "memory", "data directory", "disk", "port"} <= set(checks)
    assert checks["python"] == checks["port"] == "ok"


def test_doctor_names_a_broken_configuration(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text("port = -1\n")
    done = tidegate("doctor", "-o", "json", cwd=tmp_path)
    assert done.returncode == 1
    assert {row["check"]: row["detail"] for row in json.loads(done.stdout)}["configuration"].startswith("port: ")


def test_the_demo_sums_up_what_happened() -> None:
    story = Story(swaps=3)
    story.asked = [
        Asked("a/b", ttft_ms=10, right=True),
        Asked("a/b", ttft_ms=30, held_ms=20, right=True),
        Asked("a/b", failed="503"),
        Asked("a/b", ttft_ms=12, right=False),
    ]
    line = {"endpoint": "a/b", "item": "input_tokens", "quantity": 7}
    story.invoices = [
        {
            "tenant": "a",
            "lines": [line, line | {"item": "accelerator_hours"}],
            "total_usd": "1",
            "dedicated_total_usd": "2",
        }
    ]
    result = summary(story)
    assert (result["requests"], result["answered"], result["by_the_right_model"], result["failed"]) == (4, 3, 2, 1)
    assert (result["ttft_ms_ready_p50"], result["ttft_ms_held_p50"]) == (11, 30)
    assert result["bills"] == [{"tenant": "a", "tokens": 7, "usd": "1", "dedicated_usd": "2"}]


def test_benchmarks_are_found_in_the_checkout_and_only_there() -> None:
    assert all((Path(__file__).parents[2] / "bench" / f"{name}.py").is_file() for name in bench.NAMES)
    with pytest.raises(Problem, match=r"bench/nothing\.py is not here"):
        bench.run("nothing")


def test_simulate_and_plan_answer_in_the_published_shape(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    rows = [f"{second},acme/{'ab'[second % 2]},200,20" for second in range(0, 120, 3)]
    trace.write_text("\n".join(["t_s,endpoint,input_tokens,output_tokens", *rows]) + "\n")
    done = tidegate(
        "simulate", "--trace", str(trace), "--policy", "lru", "--accelerators", "2", "-o", "json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["policy"], result["requests"], result["accelerators"]) == ("lru", len(rows), 2)
    assert set(result["ttft_ms"]) == {"p50", "p95", "p99"}


BAD_TRACES = [
    ("endpoint,input_tokens,output_tokens\na/b,1,1\n", "t_s"),
    ("t_s,endpoint,input_tokens,output_tokens\n-1,a/b,1,1\n", "2"),
    ("t_s,endpoint,input_tokens,output_tokens\n5,a/b,1,1\n4,a/b,1,1\n", "3"),
    ("", "empty"),
]


@pytest.mark.parametrize("verb", ["simulate", "plan"])
@pytest.mark.parametrize(("text", "named"), BAD_TRACES)
def test_a_bad_trace_is_refused_by_row(verb: str, text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    done = tidegate(verb, "--trace", "t.csv", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = tidegate("simulate", "--trace", "absent.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "absent.csv" in done.stderr


@pytest.mark.parametrize("verb", ["simulate", "advise"])
def test_what_is_no_parquet_is_refused_and_so_is_a_page_for_a_folder_that_is_not_there(
    verb: str, tmp_path: Path
) -> None:
    (tmp_path / "t.parquet").write_bytes(b"no")
    done = tidegate(verb, "--trace", "t.parquet", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "not readable as Parquet" in done.stderr
    done = tidegate(verb, "--trace", "t.parquet", "--html", "no/such/page.html", cwd=tmp_path)
    assert "--html: there is no directory no/such" in done.stderr


def test_the_policies_offered_are_those_there_are() -> None:
    from tidegate.cli.simulate import POLICIES
    from tidegate.sim import baselines

    assert set(POLICIES) == set(baselines.POLICIES)


def test_an_engine_argument_is_name_and_value(tmp_path: Path) -> None:
    done = tidegate("endpoints", "create", "a/b", "--model", "m", "--engine-arg", "oops", cwd=tmp_path)
    assert done.returncode == 2
    assert "NAME=VALUE" in done.stderr
