"""What another endpoint served is on the bill: at its price, with the endpoint that was called and why."""

from pathlib import Path

from tests.billing.world import CHAT, GOLD, World
from tests.loop import on_loop
from tests.money import DECEMBER_MS, NOVEMBER_MS, usage
from tidegate.billing.periods import Period

NOVEMBER = Period(NOVEMBER_MS, DECEMBER_MS)


@on_loop
async def test_the_invoice_says_what_was_served_elsewhere_and_why(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.facts = {"acme/chat": CHAT, "house/common": GOLD}
    away = {"endpoint": "house/common", "mode": "serverless", "overflow_from": "acme/chat"}
    await world.write(
        usage("a"),
        usage("b", overflow_reason="concurrency", **away),
        usage("c", overflow_reason="concurrency", **away),
        usage("d", overflow_reason="engine_error", **away),
        usage("e", tenant="birch", key="key-3", overflow_reason="concurrency", **away),
    )
    await world.billing.drain()
    invoice = world.billing.statements.invoice("acme", NOVEMBER, DECEMBER_MS)
    assert [(line.called, line.endpoint, line.reason, line.requests) for line in invoice.overflow] == [
        ("acme/chat", "house/common", "concurrency", 2),
        ("acme/chat", "house/common", "engine_error", 1),
    ]
    on_lines = sum(line.nano_usd for line in invoice.lines if line.endpoint == "house/common")
    assert sum(line.nano_usd for line in invoice.overflow) == on_lines > 0, "at the price of who served it"
