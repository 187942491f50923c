"""Bad input is refused by name: the row, the column, the key."""

import gzip
from pathlib import Path

import pytest

from tidegate.domain.errors import Refusal
from tidegate.sim import api, profile, trace

HEADER = "t_s,endpoint,input_tokens,output_tokens\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        (HEADER, "no request in it"),
        ("t_s,endpoint,input_tokens\n1,a,2\n", "column 'output_tokens' is missing"),
        (HEADER + "0,a,1,1\n-1,a,1,1\n", "row 3: t_s is negative"),
        (HEADER + "5,a,1,1\n4.5,a,1,1\n", "row 3: t_s goes back, 4.5 after 5"),
        (HEADER + "nan,a,1,1\n", "row 2: t_s is not a finite number"),
        (HEADER + "inf,a,1,1\n", "row 2: t_s is not a finite number"),
        (HEADER + "0,a,1,x\n", "row 2: invalid literal"),
        (HEADER + "0,a\n", "row 2: it has too few columns"),
        (HEADER + "0,a,0,1\n", "row 2: tokens must be 1 to 10000000 (input 0"),
        (HEADER + "0,a,1,99999999999\n", "row 2: tokens must be 1 to"),
        (HEADER + "0,,1,1\n", "row 2: endpoint is empty"),
    ],
)
def test_a_bad_trace_names_its_row(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(Refusal) as refused:
        api.simulate(write(tmp_path / "t.csv", text))
    assert says in refused.value.message
    assert refused.value.message.startswith("t.csv: ")


def test_a_file_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="not a readable trace"):
        trace.summarize(write(tmp_path / "t.csv.gz", "plain text"))


def test_columns_may_come_in_any_order_and_gzipped(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("endpoint,output_tokens,t_s,input_tokens,more\na,3,0.5,2,x\n")
    assert list(trace.rows(path)) == [(500.0, "a", 2, 3)]


GOOD = (Path(api.__file__).parent / "fleets" / "h200-qwen-14b.toml").read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = [", "Invalid value"),
        ("accelerator = 3\n", "accelerator must be a table"),
        ("[node]\naccelerator = 'h900'\n", "node.accelerator is 'h900'; described or known are t4, l4"),
        ("[model.m]\nweights_gb = 1\n", "node.accelerator is ''"),
        ("default_model = 'gpt-9'\n[node]\naccelerator = 'l4'\n", "names model 'gpt-9', which is not in [model]"),
        (GOOD.replace("memory_gb = 141.0", 'memory_gb = "x"'), "accelerator.h200.memory_gb must be a number above 0"),
        (
            GOOD.replace("weights_gb = 29.5", "weights_gb = -1"),
            "model.qwen-14b-bf16.weights_gb must be a number above 0",
        ),
        (GOOD.replace('default_model = "qwen-14b-bf16"', 'default_model = "no"'), "names model 'no'"),
        (GOOD.replace('default_model = "qwen-14b-bf16"', ""), "no model for endpoint 'a' in [endpoints]"),
        (GOOD.replace("weights_gb = 29.5", "weights_gb = 2950"), "no node can hold"),
        (GOOD.replace("usable_share = 0.92", "usable_share = 1.5"), "usable_share must be at most 1"),
    ],
)
def test_a_bad_fleet_names_its_key(tmp_path: Path, text: str, says: str) -> None:
    trace_path = write(tmp_path / "t.csv", HEADER + "0,a,1,1\n")
    with pytest.raises(Refusal) as refused:
        api.simulate(trace_path, fleet=write(tmp_path / "fleet.toml", text))
    assert says in refused.value.message


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="is not one of tidegate, dedicated"):
        api.simulate(write(tmp_path / "t.csv", HEADER + "0,a,1,1\n"), policy="magic")


@pytest.mark.parametrize("accelerator", ["t4", "l4", "a10g", "l40s", "a100", "h100", "h200"])
def test_known_accelerators_serve_known_models_that_fit(tmp_path: Path, accelerator: str) -> None:
    trace_path = write(tmp_path / "t.csv", HEADER + "".join(f"{at},a,500,50\n" for at in range(20)))

    def ttft_ms(model: str) -> float:
        text = f"default_model = '{model}'\n[node]\naccelerator = '{accelerator}'\n"
        result = api.simulate(trace_path, fleet=write(tmp_path / "fleet.toml", text), accelerators=8)
        return float(result["ttft_ms"]["p50"])

    assert ttft_ms("llama-3_2-1b-bf16") < ttft_ms("llama-3_1-8b-fp8")
    if accelerator in ("t4", "l4", "a10g"):
        with pytest.raises(Refusal, match=r"no node can hold 2\d\d\.\d GB"):
            ttft_ms("qwen3-235b-a22b-fp8")
    else:
        assert ttft_ms("qwen3-235b-a22b-fp8") > 0


def test_fp8_computes_at_twice_the_rate() -> None:
    assert profile.ModelSpec("m", 70_600_000_000, 70.6e9, 1).flop_rate_factor == 2.0
    assert profile.ModelSpec("m", 29_500_000_000, 14.8e9, 1).flop_rate_factor == 1.0


def test_fp8_needs_hardware_that_has_it_and_a_token_goes_through_active_parameters_only(tmp_path: Path) -> None:
    def of(accelerator: str) -> profile.ModelSpec:
        text = f"default_model = 'qwen3-235b-a22b-fp8'\n[node]\naccelerator = '{accelerator}'\n"
        return profile.load(write(tmp_path / "fleet.toml", text)).model_of("any")

    assert of("h100").flop_rate_factor == 2.0
    assert of("a100").flop_rate_factor == 1.0
    assert of("h100").params == 22e9
