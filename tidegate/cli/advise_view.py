"""How advice looks on a terminal."""

from typing import Any

from tidegate.cli.output import console, table, usd

OFFERS_SHOWN = 30


def print_advice(answer: dict[str, Any]) -> None:
    printer = console()
    shape = answer["shape"]
    printer.print(
        f"[bold]{answer['trace']}[/]: {shape['requests']:,} requests in {shape['span_hours']:.1f} hours, "
        f"{shape['kind']}; peak ÷ mean {shape['peak_to_mean']:.1f}, idle {100 * shape['idle_share']:.0f} % of minutes, "
        f"burstiness {shape['burstiness']:.1f}"
    )
    for note in answer["notes"]:
        printer.print(f"note: {note}", style="dim")
    if "bill" in answer:
        print_bill(answer["bill"])
    printer.print()
    rows = [_mode(row, answer["recommended"]) for row in answer["modes"]]
    printer.print(
        table(
            rows,
            ("", "mode", "USD a month", "90 % range", "p99 TTFT", "cold", "meets", "why", "offer"),
            _title(answer),
            ("90 % range", "cold", "offer"),
        )
    )
    _print_even(printer, answer["break_even"])
    printer.print("\n[bold]The decision[/]")
    for step in answer["decision"]:
        printer.print(f"  {step['question']} [bold]{step['answer']}[/]: {step['why']}")
    if answer["changes"]:
        printer.print("[bold]What would change the answer[/]")
    for line in answer["changes"]:
        printer.print(f"  {line}")
    offers = sorted(
        answer["offers"], key=lambda o: (not o["feasible"], o["monthly_usd"] is None, o["monthly_usd"] or 0.0)
    )
    shown = [_offer(o) for o in offers[:OFFERS_SHOWN]]
    printer.print()
    columns = ("offer", "mode", "on", "USD a month", "p99 TTFT", "cold", "meets", "why", "facts")
    printer.print(table(shown, columns, "every offer, replayed", ("facts", "cold", "mode", "on")))


def print_bill(bill: dict[str, Any]) -> None:
    """What the ledger says was charged in the period, to the cent of its invoices."""
    printer = console()
    printer.print(table(bill["lines"], ("endpoint", "mode", "item", "quantity", "usd"), "what the ledger charged"))
    printer.print(
        f"total {usd(bill['total_usd'])} USD; dedicated would have cost {usd(bill['dedicated_total_usd'])} USD"
    )
    verdict = "which is the token lines" if bill["agrees"] else "[bold red]which is not the token lines[/]"
    printer.print(
        f"the same requests at their prices, one by one: {usd(bill['advised_usd'])} USD, {verdict} to the cent"
    )


def print_claims(found: list[dict[str, Any]]) -> None:
    printer = console()
    for source in dict.fromkeys(row["source"] for row in found):
        rows = [row for row in found if row["source"] == source]
        printer.print(table(rows, ("claim", "said", "computed", "verdict", "why"), source))
        printer.print()
    counts = {v: sum(row["verdict"] == v for row in found) for v in dict.fromkeys(row["verdict"] for row in found)}
    printer.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def _title(answer: dict[str, Any]) -> str:
    best = answer["recommended"] or "no mode"
    return f"{answer['model']}, p99 TTFT within {answer['slo_ttft_ms']:,.0f} ms: {best}"


def _mode(row: dict[str, Any], best: str | None) -> dict[str, Any]:
    ranged = row["low_usd"] is not None and row["high_usd"] - row["low_usd"] > 0.005
    return {
        "": "→" if row["mode"] == best else " ",
        "mode": row["mode"],
        "USD a month": _usd(row["monthly_usd"]),
        "90 % range": f"{row['low_usd']:,.0f} to {row['high_usd']:,.0f}" if ranged else "",
        "p99 TTFT": _ms(row["p99_ttft_ms"]),
        "cold": f"{100 * row['cold_share']:.1f} %" if row["cold_share"] else "",
        "meets": row["feasible"],
        "why": row["why"],
        "offer": row["offer"],
    }


def _offer(row: dict[str, Any]) -> dict[str, Any]:
    count = f"{row['replicas']} x " if row["replicas"] > 1 else ""
    facts = row["checked"] + (", partly assumed" if row["assumed"] else "")
    return {
        "offer": row["offer"],
        "mode": row["mode"],
        "on": f"{count}{row['accelerator']}" if row["accelerator"] else "",
        "USD a month": _usd(row["monthly_usd"]),
        "p99 TTFT": _ms(row["p99_ttft_ms"]),
        "cold": f"{100 * row['cold_share']:.1f} %" if row["cold_share"] else "",
        "meets": row["feasible"],
        "why": row["why"],
        "facts": facts,
    }


def _print_even(printer: Any, even: dict[str, Any] | None) -> None:
    if even is None:
        return
    never = " (above 100 %: never, at these prices)" if even["utilisation"] > 1 else ""
    printer.print(
        f"\n[bold]Break-even[/] of {even['dedicated']} ({even['usd_per_hour']:.2f} USD an hour) against "
        f"{even['by_token']}: {100 * even['utilisation']:.0f} % of a replica{never}, "
        f"{even['requests_per_hour']:,.0f} requests an hour, {even['tokens_month'] / 1e6:,.0f} million tokens a month"
    )
    for what, value in even["sensitivity"]:
        printer.print(f"  {what}: {'not servable' if value is None else f'{100 * value:.0f} %'}", style="dim")


def _usd(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f} ms"
