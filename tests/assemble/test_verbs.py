"""Every verb of the command line against a real platform (stand-in engine), as JSON and as a table."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.assemble.live import Live, chat

pytestmark = pytest.mark.e2e


async def tidegate(live: Live, *arguments: str, expected: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of one verb in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    environment |= {"TIDEGATE_URL": live.ready["base_url"], "TIDEGATE_ADMIN_KEY": live.ready["admin_key"]}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidegate", *arguments, env=environment, stdout=-1, stderr=-1
    )
    out, error = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == expected, error.decode()
    return out.decode(), error.decode()


async def as_json(live: Live, *arguments: str) -> Any:
    return json.loads((await tidegate(live, *arguments, "-o", "json"))[0])


def test_the_life_of_an_endpoint(run: Any, tmp_path: Path) -> None:
    async def story(live: Live) -> None:
        assert (await as_json(live, "tenants", "create", "zeta"))["id"] == "zeta"
        assert [row["id"] for row in await as_json(live, "tenants", "list")] == ["acme", "zeta"]
        model = str(models.llama(seed=300))
        made = await as_json(live, "endpoints", "create", "zeta/one", "--model", model, "--slots", "2", "--wait")
        assert (made["name"], made["generation"], made["slots"]) == ("zeta/one", 1, 2)
        _, refused = await tidegate(live, "endpoints", "create", "zeta/one", "--model", model, expected=2)
        assert "exists already" in refused
        file = tmp_path / "endpoint.toml"
        file.write_text(f"name = 'zeta/one'\nmodel = '{model}'\nslots = 3\n")
        for generation in (2, 2):  # the same again changes nothing
            applied = await as_json(live, "endpoints", "apply", "-f", str(file))
            assert (applied["generation"], applied["slots"]) == (generation, 3)
        several = tmp_path / "several.json"
        wanted = [{"name": f"zeta/{name}", "model": model} for name in ("two", "three")]
        several.write_text(json.dumps({"endpoints": wanted}))
        assert [e["name"] for e in await as_json(live, "endpoints", "apply", "-f", str(several))] == [
            "zeta/two",
            "zeta/three",
        ]
        several.write_text(json.dumps({"endpoints": [wanted[0], wanted[1] | {"slots": 0}]}))
        _, partly = await tidegate(live, "endpoints", "apply", "-f", str(several), expected=2)
        assert "zeta/three: `slots`" in partly
        assert "1 of 2 were applied before it" in partly
        for name in ("zeta/two", "zeta/three"):
            await as_json(live, "endpoints", "delete", name)
        await as_json(live, "endpoints", "wake", "zeta/one")
        await as_json(live, "endpoints", "sleep", "zeta/one")
        assert await as_json(live, "endpoints", "logs", "zeta/one")
        assert (await as_json(live, "endpoints", "delete", "zeta/one"))["deleted"] is True
        _, gone = await tidegate(live, "endpoints", "get", "zeta/one", expected=2)
        assert "zeta/one" in gone
        assert (await as_json(live, "tenants", "delete", "zeta"))["deleted"] is True
        _, nobody = await tidegate(live, "invoices", "nobody", expected=2)
        assert "there is no tenant 'nobody'" in nobody

    run(story)


def test_keys_prices_usage_invoices(run: Any, tmp_path: Path) -> None:
    async def story(live: Live) -> None:
        made = await as_json(live, "keys", "create", "acme", "--expires-in-s", "3600")
        assert made["secret"].startswith("tg-")
        listed = {row["id"]: row for row in await as_json(live, "keys", "list")}
        assert "secret" not in listed[made["id"]]
        await as_json(live, "keys", "revoke", made["id"])
        assert {r["id"]: r["state"] for r in await as_json(live, "keys", "list")}[made["id"]] == "revoked"
        price = ("--input-tokens", "0.5", "--output-tokens", "1.5", "--accelerator-hour", "3")
        await as_json(live, "prices", "set", "--plan", "gold", *price)
        assert {row["plan"] for row in await as_json(live, "prices", "list")} == {"default", "gold"}
        async with live.client() as client:
            assert (await client.post("/v1/chat/completions", json=chat("acme/tides", 4))).status_code == 200
        row: dict[str, Any] = {}
        while not row:
            row = next((r for r in await as_json(live, "usage", "--by", "endpoint") if r["requests"]), {})
        assert (row["endpoint"], row["output_tokens"]) == ("acme/tides", 4)
        (invoice,) = await as_json(live, "invoices")
        assert await as_json(live, "usage", "--period", "2020-01") == []
        assert await as_json(live, "invoices", "--period", "2020-01") == []
        assert invoice["total_nano_usd"] == row["nano_usd"] > 0
        trace = tmp_path / "trace.csv"
        await tidegate(live, "usage", "export", "-f", str(trace))
        header, line = trace.read_text().splitlines()
        assert header == "t_s,endpoint,input_tokens,output_tokens"
        assert line.split(",")[1:] == ["acme/tides", str(row["input_tokens"]), "4"]

    run(story)


TABLES = [
    ("endpoints", "list"), ("endpoints", "get", "acme/tides"), ("endpoints", "logs", "acme/tides"), ("nodes",),
    ("nodes", "list"), ("tenants", "list"), ("keys", "list"), ("prices", "list"), ("usage",), ("invoices",),
    ("usage", "--by", "hour"),
]  # fmt: skip


def test_every_table_is_printed(run: Any) -> None:
    async def story(live: Live) -> None:
        printed = {arguments: (await tidegate(live, *arguments))[0] for arguments in TABLES}
        assert "acme/tides" in printed["endpoints", "list"]
        assert "cpu-0" in printed["nodes",] == printed["nodes", "list"]
        assert "acme" in printed["invoices",]
        assert not any(live.ready["admin_key"] in text for text in printed.values())

    run(story)


def test_watch_follows_decisions_until_interrupted(run: Any) -> None:
    async def story(live: Live) -> None:
        environment = {"TIDEGATE_URL": live.ready["base_url"], "TIDEGATE_ADMIN_KEY": live.ready["admin_key"]}
        watching = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tidegate", "endpoints", "watch", "acme/bread", "-o", "json"),
            env=os.environ | environment,
            stdout=-1,
        )
        assert watching.stdout is not None
        async with live.client() as client:
            assert (await client.post("/v1/chat/completions", json=chat("acme/bread"))).status_code == 200
        seen: set[str] = set()
        while not {"apply", "ready"} <= seen:
            line = json.loads(await asyncio.wait_for(watching.stdout.readline(), 30))
            assert "acme/bread" in f"{line['subject']} {line['reason']}"
            seen.add(line["kind"])
        watching.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(watching.wait(), 30) == 0

    run(story)
