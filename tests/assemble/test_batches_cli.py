"""`tidegate batches` against a whole platform (stand-in engine), and its tables."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars
import pytest

from tests.assemble.live import Live, Story
from tests.assemble.test_batches import jsonl, line
from tests.assemble.test_verbs import tidegate
from tidegate.cli.batch_progress import Pace, describe
from tidegate.cli.batch_table import Table
from tidegate.cli.output import Problem


@pytest.mark.e2e
def test_a_file_from_the_command_line(run: Callable[[Story], None], tmp_path: Path) -> None:
    async def story(live: Live) -> None:
        key = ("--key", live.ready["api_key"])
        file = tmp_path / "in.jsonl"
        file.write_bytes(jsonl(line(1), line(2)))
        made = json.loads((await tidegate(live, "batches", "create", str(file), *key, "-o", "json"))[0])
        assert (made["status"], made["request_counts"]["completed"]) == ("completed", 2)
        tokens = made["usage"]
        full = tokens["input_tokens"] * 200 + tokens["output_tokens"] * 600  # nano-USD at the default prices
        assert made["cost_nano_usd"] == full // 2
        out, error = await tidegate(live, "batches", "get", made["id"], "--wait", *key)
        assert "completed" in out
        assert "cost usd" in out
        assert "2/2" in error
        results = (await tidegate(live, "batches", "results", made["id"], *key))[0].splitlines()
        assert {json.loads(each)["custom_id"] for each in results} == {"id-1", "id-2"}
        assert made["id"] in (await tidegate(live, "batches", "list", *key))[0]
        _, refused = await tidegate(live, "batches", "cancel", made["id"], *key, expected=2)
        assert "'completed'" in refused
        _, none = await tidegate(live, "batches", "results", made["id"], "--errors", *key, expected=1)
        assert "no error file" in none
        file.write_bytes(jsonl(line(1), line(1)))
        assert "duplicate_custom_id" in (await tidegate(live, "batches", "create", str(file), *key, expected=1))[0]
        file.write_text("{}")
        assert "line 1" in (await tidegate(live, "batches", "create", str(file), *key, expected=2))[1]

    run(story)


@pytest.mark.e2e
def test_a_table_from_the_command_line(run: Callable[[Story], None], tmp_path: Path) -> None:
    async def story(live: Live) -> None:
        data = tmp_path / "data.parquet"
        polars.DataFrame({"n": [1, 2, 3], "text": ["a", None, 'quoted "c"']}).write_parquet(data)
        options = ("--prompt", "{n}: {text}", "--model", "tides", "--max-tokens", "2", "--key", live.ready["api_key"])
        done = json.loads((await tidegate(live, "batches", "run", "--input", str(data), *options, "-o", "json"))[0])
        assert (done["rows"], done["answered"], done["failed"]) == (3, 3, 0)
        rows = polars.read_parquet(tmp_path / "data.results.parquet")
        assert rows.columns == ["n", "text", "answer"]
        assert all(rows["answer"])

    run(story)
    assert list(tmp_path.glob(".*.json")) == []


def result(number: int, content: str | None, status: int = 200) -> bytes:
    error = {"error": {"code": "invalid_request", "message": "no"}}
    body: dict[str, Any] = {"choices": [{"message": {"content": content}}]} if status == 200 else error
    response = {"status_code": status, "request_id": "r", "body": body}
    return json.dumps({"custom_id": f"row-{number}", "response": response, "error": None}).encode() + b"\n"


def test_answers_and_errors_lie_beside_their_rows(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("name,age\nAda,36\n{Bob},07\n")
    table = Table(source, None, "Who is {name}? {{exactly}}", "answer", "m", max_tokens=5, system="Be kind.")
    lines = [json.loads(each) for each in table.lines(0)]
    assert [each["body"]["messages"][1]["content"] for each in lines] == [
        "Who is Ada? {exactly}",
        "Who is {Bob}? {exactly}",
    ]
    assert lines[0]["body"]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert lines[0]["body"]["max_tokens"] == 5
    table.note(0, "batch_1")
    again = Table(source, None, "Who is {name}? {{exactly}}", "answer", "m", max_tokens=5, system="Be kind.")
    assert again.submitted(0) == "batch_1"
    assert Table(source, None, "Who was {name}?", "answer", "m").submitted(0) is None
    again.take(result(1, None, 400) + result(0, "a countess"))
    assert again.write()["failed"] == 1
    rows = list(csv.DictReader((tmp_path / "in.results.csv").open()))
    assert [row["age"] for row in rows] == ["36", "07"]  # as it was, leading zeros too
    assert [(row["answer"], row["answer_error"]) for row in rows] == [("a countess", ""), ("", "invalid_request: no")]
    assert again.submitted(0) is None


@pytest.mark.parametrize(
    ("name", "text", "prompt", "column", "what"),
    [
        ("in.csv", "a\n1\n", "{b}", "answer", "accepted: a"),
        ("in.csv", "a\n1\n", "{a.__class__}", "answer", "no column"),
        ("in.csv", "a\n1\n", "{", "answer", "--prompt"),
        ("in.csv", "a\n1\n", "{a}", "a", "--column"),
        ("in.csv", "a\n", "{a}", "answer", "0 rows"),
        ("in.txt", "a\n", "{a}", "answer", ".parquet"),
        ("in.parquet", "nonsense", "{a}", "answer", "not a table"),
    ],
)
def test_a_wrong_table_is_refused_by_name(
    tmp_path: Path, name: str, text: str, prompt: str, column: str, what: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(Problem, match=what) as refused:
        Table(tmp_path / name, None, prompt, column, "m")
    assert refused.value.exit_code == 2


def test_how_far_it_is_in_words() -> None:
    batch = {
        "status": "in_progress",
        "request_counts": {"total": 1_000, "completed": 390, "failed": 10},
        "usage": {"output_tokens": 4_000},
        "cost_nano_usd": 12_300_000,
        "in_progress_at": 100,
        "completed_at": None,
    }
    assert describe(batch, (10.0, 83.2)) == "400/1000 · 10 failed · 83 tokens/s · 60 s left · $0.0123"
    assert describe(batch, (0.1, 0.0)).endswith("1.7 h left · $0.0123")
    waiting = batch | {"cost_nano_usd": None}
    assert describe(waiting, (0.0, 0.0)) == "400/1000 · 10 failed · waiting for an idle accelerator"
    ended = batch | {"status": "completed", "completed_at": 112}
    assert describe(ended, (0.0, 0.0)) == "400/1000 · 10 failed · $0.0123 · in 12 s"


def test_the_pace_is_that_of_the_present() -> None:
    pace = Pace()
    assert pace.seen(0.0, 0, 0) == (0.0, 0.0)
    assert pace.seen(30.0, 0, 0) == (0.0, 0.0), "half a minute without an accelerator"
    assert pace.seen(30.5, 10, 100) == pytest.approx((20.0, 200.0)), "the wait is no part of its pace"
    for second in range(1, 13):
        assert pace.seen(30.5 + second, 10 + 20 * second, 100 + 200 * second)[0] > 0
    assert pace.seen(42.9, 250, 2_500) == pytest.approx((20.0, 200.0))
    assert pace.seen(44.0, 250, 2_500) == pytest.approx((20.0, 200.0)), "the next jump may be a moment away"
    assert pace.seen(48.5, 250, 2_500)[0] < 20.0
    assert pace.seen(60.0, 250, 2_500) == (0.0, 0.0)
