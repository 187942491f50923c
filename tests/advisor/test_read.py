"""Files of every kind become the same Traffic; every bad row is named, with what was expected."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars
import pytest

from tidegate.advisor.described import SHAPES, describe
from tidegate.advisor.read import Reading, read
from tidegate.advisor.tables import write_trace
from tidegate.advisor.traffic import HOUR_MS
from tidegate.domain.errors import Refusal
from tidegate.sim.trace import rows

HEADER = "t_s,endpoint,input_tokens,output_tokens"
ROWS = ["0.5,a,100,10", "1.5,b,200,20", "3600,a,300,30"]


def trace(folder: Path, rows: Sequence[str], header: str = HEADER, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    plain = trace(tmp_path, ROWS)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    polars.read_csv(plain).write_parquet(tmp_path / "t.parquet")
    names = HEADER.split(",")
    objects = [dict(zip(names, row.split(","), strict=True)) for row in ROWS]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(o) for o in objects))
    (tmp_path / "t.json").write_text(json.dumps(objects))
    for name in ("t.csv", "t.csv.gz", "t.parquet", "t.jsonl", "t.json"):
        traffic = read(tmp_path / name)
        assert traffic.t_ms.tolist() == [500.0, 1500.0, 3_600_000.0], name
        assert traffic.inputs.tolist() == [100, 200, 300], name
        assert [traffic.endpoints[k] for k in traffic.endpoint_of] == ["a", "b", "a"], name


STAMPS = ("2026-11-20T10:00:00Z", "2026-11-20T10:00:01Z", "2026-11-20T11:00:00Z")
OTHER_TOOLS = [
    ("bom and Windows line ends", "\ufefftimestamp,model,prompt_tokens,completion_tokens\r\n", "{0},{1},{2},{3}\r\n"),
    ("semicolons", "Timestamp;Model;Prompt Tokens;Completion-Tokens\n", "{0};{1};{2};{3}\n"),
    ("tabs, empty lines", "timestamp\tmodel\ttokens_in\ttokens_out\n\n", "{0}\t{1}\t{2}\t{3}\n\n"),
    ("a JSON log by another name", "", '{{"ts":"{0}","req":{{"model":"{1}"}},"resp":{{"usage":'
     '{{"prompt_tokens":{2},"completion_tokens":{3}}}}}}}\r\n'),
    ("a web server's times", "time_local,model,tokens_in,tokens_out\n", "20/Nov/2026:{0:.8} +0000,{1},{2},{3}\n"),
]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(("what", "header", "row"), OTHER_TOOLS, ids=[what for what, _, _ in OTHER_TOOLS])
def test_files_as_other_tools_write_them(tmp_path: Path, what: str, header: str, row: str, encoding: str) -> None:
    stamps = [stamp[11:] for stamp in STAMPS] if what == "a web server's times" else STAMPS
    rows = [(stamps[0], "a", 100, 1), (stamps[1], "b", 200, 2), (stamps[2], "a", 300, 3)]
    text = header.removeprefix("\ufeff") if encoding == "utf-16" else header
    (tmp_path / "access.log").write_bytes((text + "".join(row.format(*one) for one in rows)).encode(encoding))
    traffic = read(tmp_path / "access.log")
    assert traffic.t_ms.tolist() == [0.0, 1000.0, 3_600_000.0], what
    assert (traffic.inputs.tolist(), traffic.outputs.tolist()) == ([100, 200, 300], [1, 2, 3])
    assert [traffic.endpoints[k] for k in traffic.endpoint_of] == ["a", "b", "a"]


@pytest.mark.parametrize("name", ["saved.csv", "saved.csv.gz"])
def test_what_was_read_can_be_saved_for_the_simulator(tmp_path: Path, name: str) -> None:
    source = trace(tmp_path, ["100;b, c;7;1", "100.5;a;8;2"], "t_s;model;tokens_in;tokens_out")
    write_trace(tmp_path / name, read(source))
    assert list(rows(tmp_path / name)) == [(100_000.0, "b, c", 7, 1), (100_500.0, "a", 8, 2)]
    with pytest.raises(Refusal, match="needs tokens"):
        write_trace(tmp_path / name, read(trace(tmp_path, ["1,a", "2,a"], "t_s,endpoint"), Reading(service_ms=5)))


def test_a_nested_name_that_two_columns_end_in_is_not_guessed(tmp_path: Path) -> None:
    rows = ["1,a,5,6,1", "2,a,5,6,1"]
    with pytest.raises(Refusal, match=r"no column holds input tokens; .*'first\.prompt_tokens'"):
        read(trace(tmp_path, rows, "t_s,endpoint,first.prompt_tokens,retry.prompt_tokens,output_tokens"))


def test_litellm_spend_logs_newest_first(tmp_path: Path) -> None:
    rows = [
        {"request_id": "r2", "startTime": "2026-11-20T10:00:05.000Z", "model_group": "chat", "model": "openai/x",
         "prompt_tokens": 20, "completion_tokens": 2, "spend": 0.1},
        {"request_id": "r1", "startTime": "2026-11-20T10:00:00.000Z", "model_group": "chat", "model": "openai/x",
         "prompt_tokens": 10, "completion_tokens": 1, "spend": 0.1},
    ]  # fmt: skip
    (tmp_path / "logs.json").write_text(json.dumps(rows))
    traffic = read(tmp_path / "logs.json", Reading(timezone="Europe/Berlin"))
    assert traffic.t_ms.tolist() == [0.0, 5000.0]
    assert traffic.inputs.tolist() == [10, 20]
    assert traffic.endpoints == ("chat",)
    assert traffic.start_ms is not None
    assert (traffic.start_ms / HOUR_MS) % 24 == 11  # ten in the morning UTC is eleven in Berlin
    assert "newest first" in traffic.notes[0]


def test_openai_usage_buckets_are_spread_and_said_to_be(tmp_path: Path) -> None:
    bucket = {
        "object": "bucket",
        "start_time": 1730419200,
        "end_time": 1730505600,
        "results": [
            {
                "input_tokens": 1000,
                "output_tokens": 500,
                "input_cached_tokens": 800,
                "num_model_requests": 5,
                "model": "m",
            }
        ],
    }
    (tmp_path / "usage.json").write_text(json.dumps({"object": "page", "data": [bucket]}))
    traffic = read(tmp_path / "usage.json")
    assert len(traffic) == 5
    assert traffic.inputs.sum() == 1000
    assert traffic.cached.sum() == 800
    assert np.diff(traffic.t_ms).tolist() == [17_280_000.0] * 4
    assert "bursts shorter than a bucket" in traffic.notes[0]


def test_vllm_span_attributes(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    said = {"gen_ai": {"request": {"model": "m"}, "usage": usage}}
    spans = [{"startTimeUnixNano": (1_763_632_800 + k) * 10**9, "attributes": said} for k in range(3)]
    (tmp_path / "spans.jsonl").write_text("\n".join(json.dumps(s) for s in spans))
    traffic = read(tmp_path / "spans.jsonl")
    assert traffic.endpoints == ("m",)
    assert traffic.outputs.tolist() == [3, 3, 3]
    assert traffic.t_ms.tolist() == [0.0, 1000.0, 2000.0]


BAD = [
    ([], HEADER, "no request in it; at least 2"),
    (["1,a,1,1"], HEADER, "one request in it; at least 2 .* 1,000 over 7 days"),
    (["1,a,1,1", "40000000,a,1,1"], HEADER, "row 3: 463 days after the row before it; expected one period"),
    (["2,a,1,1", "3,a,1,1", "1,a,1,1"], HEADER, "row 4: time goes back by 2 s; expected rows in the order of arrival"),
    (["1,a,1,1", "2,a,0,1"], HEADER, "row 3: zero input tokens; expected 1 or more"),
    (["1,a,1,1", "2,a,5,0"], HEADER, "row 3: zero output tokens"),
    (["1,a,1,1", "2,a,x,1"], HEADER, "row 3: input is 'x'; expected a number"),
    (["1,a,1,1", "-2,a,1,1"], HEADER, "row 3: t_s is '-2'; expected seconds from the start"),
    (["1,a,1,1", "2,a"], HEADER, "row 3: has fewer columns than the header"),
    (["1,a,1,1"], "when,who,in,out", "row 1: no column says when .* 'when', 'who'.*--columns time="),
    (["1,a,1,1"], "t_s,endpoint,in,output_tokens", "no column holds input tokens; .*--columns input="),
    (["2026-11-20T10:00:00,a,1,1"], "time,endpoint,input_tokens,output_tokens", "row 2: .*no time zone; .*--timezone"),
    (["soon,a,1,1"], "time,endpoint,input_tokens,output_tokens", "row 2: 'soon' is not a time; expected ISO 8601"),
    (["7,a,1,1"], "time,endpoint,input_tokens,output_tokens", "row 2: '7' is no epoch time"),
    (["1,a,5,1,r1", "2,a,5,1,r1"], HEADER + ",request_id", "row 3: the same request id as row 2"),
    (["1,a,5,1,9", "2,a,5,1,1"], HEADER + ",cached_tokens", "row 2: 9 cached of 5 input tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "header", "said"), BAD)
def test_bad_input_is_named_by_file_and_row(tmp_path: Path, rows: list[str], header: str, said: str) -> None:
    with pytest.raises(Refusal, match=r"t\.csv: .*" + said):
        read(trace(tmp_path, rows, header))


def test_rows_can_be_left_out_and_sorted_on_demand(tmp_path: Path) -> None:
    rows = ["2,a,1,1", "3,a,0,1", "1,a,1,1", "4,a,1,1"]
    traffic = read(trace(tmp_path, rows), Reading(skip_bad=True, sort=True))
    assert traffic.t_ms.tolist() == [1000.0, 2000.0, 4000.0]
    assert traffic.notes[0] == "1 rows left out (first: row 3: zero input tokens; expected 1 or more "\
        "(a failed request is not billed))"  # fmt: skip


def test_too_little_says_how_much_too_little(tmp_path: Path) -> None:
    notes = read(trace(tmp_path, ROWS)).notes
    assert any("3 requests of the 1,000 wanted (0 %)" in note for note in notes)
    assert any("1.00 hours of the 7 days" in note and "(0.6 %)" in note for note in notes)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("t.parquet", b"no", "Parquet"), ("t.csv.gz", b"no", "not readable"), ("t.jsonl", b"[1]", "row 1: a JSON list"),
     ("t.jsonl", b"{", "row 1: not JSON"), ("t.json", b"3", "list of objects"), ("t.csv", b"", "empty"),
     ("t.csv", b"\xff\xfe\x00", "not readable")],
)  # fmt: skip
def test_what_is_not_its_kind_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=said):
        read(tmp_path / name)


def test_unknown_mappings_are_refused(tmp_path: Path) -> None:
    path = trace(tmp_path, ROWS)
    with pytest.raises(Refusal, match=r"there is no such column"):
        read(path, Reading(columns={"input": "nope"}))
    with pytest.raises(Refusal, match=r"'colour' is not a field"):
        read(path, Reading(columns={"colour": "t_s"}))
    with pytest.raises(Refusal, match=r"'Mars/Base' is not known"):
        read(path, Reading(timezone="Mars/Base"))


@pytest.mark.parametrize("shape", SHAPES)
def test_described_shapes_have_what_was_said(shape: str) -> None:
    traffic = describe(shape, 5_000, 400, 120)
    assert len(traffic) == 35_000
    assert np.all(np.diff(traffic.t_ms) >= 0)
    assert abs(traffic.inputs.mean() / 400 - 1) < 0.05
    assert abs(traffic.outputs.mean() / 120 - 1) < 0.05
    assert traffic.t_ms[-1] <= traffic.span_ms


def test_described_traffic_is_checked() -> None:
    with pytest.raises(Refusal, match="is not one of business-hours, spiky, steady, mixed"):
        describe("flat", 10)
    with pytest.raises(Refusal, match="--requests-per-day"):
        describe("steady", 0)


def test_scaling_keeps_the_shape() -> None:
    traffic = describe("spiky", 2_000)
    twice = traffic.scaled(2.5)
    assert abs(len(twice) / len(traffic) - 2.5) < 0.01
    assert twice.span_ms == traffic.span_ms
    assert np.all(np.diff(twice.t_ms) >= 0)


def test_silence_before_an_export_began_is_not_traffic(tmp_path: Path) -> None:
    """`usage export` counts from the beginning of the month, however young the platform is."""
    twentieth = 20 * 86_400
    traffic = read(trace(tmp_path, [f"{twentieth + 68_400 + k * 6},a,100,10" for k in range(100)]))
    assert traffic.span_ms <= 2 * HOUR_MS
    assert any("taken as not watched yet" in note for note in traffic.notes)
    # The silent morning of a day of traffic stays, and with it the hours of the day.
    traffic = read(trace(tmp_path, [f"{twentieth + 28_800 + k * 3_600},a,100,10" for k in range(10)]))
    assert traffic.t_ms[0] == 8 * HOUR_MS
