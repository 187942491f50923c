"""The console's files: served without a key, holding no data, able to run nothing but themselves; and what they read of
the API is really there.
"""

import re
from pathlib import Path

import msgspec
import pytest

from tests.control.world import running
from tests.loop import on_loop
from tidegate.control import console
from tidegate.control.limits import LIMIT_OPERATIONS
from tidegate.control.operations import OPERATIONS
from tidegate.domain.units import usd
from tidegate.wire import accelerator_time, admin, billing, contracts, limits, promises

STATIC = Path(console.__file__).parent / "static"
SCRIPTS = {path.name: path.read_text() for path in sorted(STATIC.glob("*.js"))}

# Which script reads which answers under which names: `e.slots` in a script must be a field of one of these.
READS: dict[str, dict[str, tuple[type[msgspec.Struct], ...]]] = {
    "fleet.js": {
        "node": (admin.NodeView,),
        "a": (admin.AcceleratorView,),
        "resident": (admin.ResidentView,),
        "replica": (admin.ReplicaView,),
        "endpoint": (admin.EndpointView,),
    },
    "endpoints.js": {
        "endpoint": (admin.EndpointView,),
        "e": (admin.EndpointView,),
        "took": (admin.BoundView,),
        "hour": (admin.SloView,),
        "slo": (admin.SloView,),
        "limit": (limits.LimitsView,),
        "canary": (admin.CanaryView,),
        "overflow": (admin.OverflowBody,),
        "concurrency": (admin.ConcurrencyView,),
    },
    "details.js": {
        "e": (admin.EndpointView,),
        "c": (admin.CanaryView,),
        "b": (admin.BoundView, limits.BudgetView),
        "g": (promises.SizeBounds,),
        "o": (admin.OverflowBody,),
        "r": (admin.ReplicaView,),
        "s": (admin.ScheduleBody,),
        "slo": (admin.SloView, admin.SloBody),
        "l": (limits.LimitsView,),
        "model": (admin.ModelView,),
        "limits": (admin.LimitsView,),
        "overflow": (admin.OverflowBody,),
        "fallback": (admin.FallbackBody,),
    },
    "money.js": {
        "e": (accelerator_time.EndpointTime,),
        "row": (billing.UsageRow,),
        "usage": (billing.UsageReport,),
        "time": (accelerator_time.TimeView,),
        "c": (contracts.ContractView,),
        "contract": (contracts.ContractView,),
    },
    "console.js": {"activity": (admin.ActivityView,), "slo": (admin.SloView,), "e": (admin.EndpointView,)},
}
OF_ARRAYS = {"map", "filter", "length", "reduce", "join"}


@on_loop
async def test_the_page_and_its_files_are_served_with_a_strict_policy(tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        for path in ("/", "/console"):
            assert (await world.http.get(path)).headers["location"] == "/console/"
        page = await world.http.get("/console/", headers={"authorization": ""})
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        files = set(re.findall(r'(?:src|href)="(/console/[^"]+)"', page.text))
        imported = {f"/console/{name}" for text in SCRIPTS.values() for name in re.findall(r' from "\./([^"]+)"', text)}
        assert files | imported == {f"/console/{path.name}" for path in STATIC.glob("*.[jc]s*")}, "all are used"
        for file in files | imported:
            answer = await world.http.get(file, headers={"authorization": ""})
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"] == policy


def test_nothing_is_fetched_from_elsewhere_and_text_never_becomes_markup() -> None:
    html, css = ((STATIC / f"console.{kind}").read_text() for kind in ("html", "css"))
    script = "".join(SCRIPTS.values())
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", html)
    assert "url(" not in css
    assert "@import" not in css
    assert re.findall(r"https?://[^\"']+", script) == ["http://www.w3.org/2000/svg"]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert sink not in script
    assert "localStorage" not in script, "the key is kept in the tab's session only"
    assert not re.findall(r"\son\w+=|style=", html), "inline handlers and styles are forbidden by the policy"


def _strayed(script: str, names: dict[str, tuple[type[msgspec.Struct], ...]]) -> list[str]:
    """What `script` reads of answers that no answer has."""
    found = []
    for name, structs in names.items():
        fields = {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}
        reads = re.findall(rf"(?<![\w$]){name}\??\.([a-z][a-z0-9_]*)\b(?!\()", script)
        assert reads, f"{name} is not read: drop it from READS"
        found += [f"{name}.{read}" for read in reads if read not in fields | OF_ARRAYS]
    return found


@pytest.mark.parametrize("file", READS)
def test_what_the_page_reads_of_an_answer_is_a_field_of_it(file: str) -> None:
    assert _strayed(SCRIPTS[file], READS[file]) == []


def test_a_field_that_no_answer_has_is_found() -> None:
    renamed = SCRIPTS["endpoints.js"].replace("endpoint.activation_bounds", "endpoint.bounds")
    assert _strayed(renamed, READS["endpoints.js"]) == ["endpoint.bounds", "endpoint.bounds"]


@on_loop
async def test_the_paths_and_windows_that_the_page_asks_for_are_answered(tmp_path: Path) -> None:
    asked = set(re.findall(r'(?:api|read)\(["`]([a-z/-]+)', SCRIPTS["console.js"]))
    here = {"nodes", "endpoints", "activity", "limits", "activation-bounds"}
    assert asked == here | {"activity/stream", "usage", "usage/time", "contracts"}
    async with running(tmp_path) as world:
        ours = {operation.path for operation in (*OPERATIONS, *LIMIT_OPERATIONS)}
        assert {path for path in asked if f"/api/v1/{path}" in ours} == here
        await world.http.post("/api/v1/tenants", json={"id": "acme"})
        made = await world.http.put("/api/v1/endpoints/acme/tides", json={"model": "/models/tides"})
        shown = re.search(r"WINDOWS = \[(.+?)\]", SCRIPTS["details.js"])
        assert shown is not None
        assert re.findall(r'"(\w+)"', shown[1]) == list(made.json()["slo_status"])


def test_amounts_have_the_nine_places_that_the_page_adds_up() -> None:
    assert [usd(nano) for nano in (0, 1_512_000, -22_067_861)] == ["0.000000000", "0.001512000", "-0.022067861"]
    for name in ("tokens_usd", "time_usd", "drawn_usd", "dedicated_usd"):
        assert f"nano(e.{name})" in SCRIPTS["money.js"]
