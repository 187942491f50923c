"""The live table of `tidegate endpoints watch`: what endpoints are, what they promise, and how they keep it."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tidegate.cli.client import Api, escaped

REFRESH_S = 1.0
LINES_MAX = 12
STYLES = {
    "ready": "bold green", "idle": "green", "asleep": "blue", "waking": "yellow", "loading": "yellow",
    "creating": "yellow", "draining": "magenta", "degraded": "bold yellow", "failed": "bold red", "paused": "dim",
}  # fmt: skip


def follow(api: Api, name: str | None) -> None:
    """Until Ctrl-C."""
    with Live(console=Console(), auto_refresh=False, screen=False) as live:
        try:
            while True:
                live.update(_picture(api, name), refresh=True)
                time.sleep(REFRESH_S)
        except KeyboardInterrupt:
            return


def _picture(api: Api, name: str | None) -> Group:
    rows = [api.get(f"endpoints/{escaped(name)}")] if name else api.get("endpoints")["data"]
    parts: list[Any] = [table(rows)]
    if name:
        lines = api.get(f"endpoints/{escaped(name)}/logs", limit=LINES_MAX)["data"]
        parts.append(Text("\n".join(_line(line) for line in reversed(lines)), style="dim"))
    return Group(*parts)


def table(rows: list[dict[str, Any]]) -> Table:
    """One row an endpoint. Shares are of requests; a dash says that there were none."""
    made = Table(expand=True)
    columns = ("endpoint", "mode", "state", "now / full", "held", "SLO 5m", "1h", "24h", "available 24h", "budget 30d",
               "activation p99", "why")  # fmt: skip
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        slo, tier = row["slo_status"], f"({row['tier']})" if row["state"] == "asleep" else ""
        made.add_row(
            row["name"],
            row["mode"],
            Text(f"{row['state']}{tier}", style=STYLES.get(row["state"], "")),
            f"{row['in_flight']} of {row['concurrency']['current']} / {row['concurrency']['full']}",
            str(row["queued"]),
            *(_share(slo[window]["attainment"]) for window in ("5m", "1h", "24h")),
            _share(slo["24h"]["availability"]),
            _share(slo["30d"]["error_budget"]),
            "  ".join(f"{tier} {bound['p99_ms']} ms" for tier, bound in row["activation_bounds"].items()) or "–",
            row["reason"],
        )
    return made


def _share(value: float | None) -> Text:
    if value is None:
        return Text("–", style="dim")
    return Text("overdrawn", style="red") if value < 0 else Text(f"{value:.1%}")


def _line(line: dict[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(line["at_ms"] / 1000))
    return f"{at}  {line['kind']:<12} {line['reason']}"
