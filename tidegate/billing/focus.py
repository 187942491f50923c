"""Usage as FOCUS 1.0 rows (FinOps Open Cost and Usage Specification, https://focus.finops.org). Pure.

One row an hour, endpoint, model, mode, key, price and item; accelerator time of dedicated endpoints, one a period,
endpoint and price. A cost is never null: what had no price in force costs 0 and is still a row. What was paid from a
commitment is billed at 0 and has its worth as effective cost.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

from msgspec import json

from tidegate.billing.periods import Period, iso
from tidegate.domain.endpoint import Mode
from tidegate.domain.ledger import NO_PRICE, Adjustment, TimeSum, UsageKey, UsageSum
from tidegate.domain.units import MS_PER_HOUR, usd

# Every column of FOCUS 1.0, in the specification's (alphabetical) order.
COLUMNS = (
    "AvailabilityZone", "BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd",
    "BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargeFrequency", "ChargePeriodEnd",
    "ChargePeriodStart", "CommitmentDiscountCategory", "CommitmentDiscountId", "CommitmentDiscountName",
    "CommitmentDiscountStatus", "CommitmentDiscountType", "ConsumedQuantity", "ConsumedUnit", "ContractedCost",
    "ContractedUnitPrice", "EffectiveCost", "InvoiceIssuerName", "ListCost", "ListUnitPrice", "PricingCategory",
    "PricingQuantity", "PricingUnit", "ProviderName", "PublisherName", "RegionId", "RegionName", "ResourceId",
    "ResourceName", "ResourceType", "ServiceCategory", "ServiceName", "SkuId", "SkuPriceId", "SubAccountId",
    "SubAccountName", "Tags",
)  # fmt: skip
ISSUER = "tidegate"

Row = dict[str, str]


def as_csv(rows: Iterable[Row], *, header: bool) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\r\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def usage_rows(cells: Iterable[tuple[UsageKey, UsageSum]], period: Period) -> Iterator[Row]:
    """`cells` are hourly sums."""
    for key, cell in cells:
        for item, unit, quantity, amount, drawn in (
            ("input_tokens", "Tokens", cell.billed_input, cell.input_nano_usd, 0),
            ("cached_input_tokens", "Tokens", cell.billed_cached, cell.cached_nano_usd, 0),
            ("output_tokens", "Tokens", cell.billed_output, cell.output_nano_usd, 0),
            ("minimum_charges", "Requests", 0, cell.minimum_nano_usd, 0),
            ("committed_tokens", "Tokens", cell.drawn_tokens, 0, cell.drawn_nano_usd),
            ("unpriced_tokens", "Tokens", _unpriced(key, cell), 0, 0),
        ):
            if quantity or amount or drawn:
                row = _row(period, key.tenant, key.endpoint, key.mode, item, key.price_version)
                row |= _charge_period(max(key.hour_ms, period.start_ms), min(key.hour_ms + MS_PER_HOUR, period.end_ms))
                row |= _money(amount, drawn, Decimal(quantity), unit)
                row["Tags"] = json.encode({"model": key.model, "mode": key.mode, "key": key.key}).decode()
                if drawn:
                    row |= {"PricingCategory": "Committed", "CommitmentDiscountCategory": "Usage"}
                    row |= {"CommitmentDiscountStatus": "Used", "CommitmentDiscountType": "Token commitment"}
                    row |= {"CommitmentDiscountId": key.tenant, "CommitmentDiscountName": "prepaid tokens"}
                yield row


def time_rows(times: Sequence[TimeSum], period: Period) -> Iterator[Row]:
    for time in times:
        row = _row(period, time.tenant, time.endpoint, Mode.DEDICATED.value, "accelerator_hours", time.price_version)
        row |= _charge_period(period.start_ms, period.end_ms)
        row |= _money(time.nano_usd, 0, Decimal(time.duration_ms) / MS_PER_HOUR, "Accelerator Hours")
        row["Tags"] = '{"mode":"dedicated"}'
        yield row


def adjustment_rows(adjustments: Iterable[Adjustment], period: Period) -> Iterator[Row]:
    """Purchases, credits, and what was rated again, at the instant it was. What a credit costs is below 0."""
    for found in adjustments:
        endpoint = found.endpoint or found.reference or found.id
        row = _row(period, found.tenant, endpoint, found.mode or "contract", found.kind, NO_PRICE)
        row |= _charge_period(found.at_ms, min(found.at_ms + 1_000, period.end_ms))
        row |= _money(found.nano_usd, 0, Decimal(found.quantity), "Tokens")
        row["ChargeCategory"] = {"purchase": "Purchase", "credit": "Credit"}.get(found.kind, "Adjustment")
        row["ChargeClass"] = "Correction" if found.kind.startswith("rerate") else ""
        row["ChargeFrequency"] = "One-Time"
        row["Tags"] = json.encode({"id": found.id, "mode": found.mode or "contract"}).decode()
        yield row


def _unpriced(key: UsageKey, cell: UsageSum) -> int:
    return cell.input_tokens + cell.output_tokens if key.price_version == NO_PRICE else 0


def _row(period: Period, tenant: str, endpoint: str, mode: str, item: str, price_version: int) -> Row:
    return dict.fromkeys(COLUMNS, "") | {
        "BillingAccountId": tenant,
        "BillingAccountName": tenant,
        "BillingCurrency": "USD",
        "BillingPeriodStart": iso(period.start_ms),
        "BillingPeriodEnd": iso(period.end_ms),
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{item.replace('_', ' ')} of {endpoint} ({mode.replace('_', ' ')})",
        "ChargeFrequency": "Usage-Based",
        "InvoiceIssuerName": ISSUER,
        "PricingCategory": "Standard",
        "ProviderName": ISSUER,
        "PublisherName": ISSUER,
        "ResourceId": endpoint,
        "ResourceName": endpoint.partition("/")[2] or endpoint,
        "ResourceType": "Endpoint",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": "Inference",
        "SkuId": f"{mode}/{item}",
        "SkuPriceId": str(price_version) if price_version != NO_PRICE else "unpriced",
        "SubAccountId": endpoint,
        "SubAccountName": endpoint,
    }


def _charge_period(start_ms: int, end_ms: int) -> Row:
    return {"ChargePeriodStart": iso(start_ms), "ChargePeriodEnd": iso(end_ms)}


def _money(amount: int, drawn: int, quantity: Decimal, unit: str) -> Row:
    """`amount` was charged, `drawn` taken from a commitment. The unit price is per what `unit` says."""
    worth = amount + drawn
    price = Decimal(worth) / 10**9 / quantity if quantity else Decimal(0)
    return {
        "BilledCost": usd(amount),
        "EffectiveCost": usd(worth),
        "ListCost": usd(worth),
        "ContractedCost": usd(worth),
        "ListUnitPrice": f"{price:f}",
        "ContractedUnitPrice": f"{price:f}",
        "ConsumedQuantity": f"{quantity:f}",
        "ConsumedUnit": unit,
        "PricingQuantity": f"{quantity:f}",
        "PricingUnit": unit,
    }
