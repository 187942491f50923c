"""What the operator watches about money."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge


class BillingMetrics:
    """On a registry of their own: whoever serves ``/metrics`` registers that one with theirs."""

    def __init__(self, lag_s: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        lag = "Seconds since the ledger last held everything in the journals"
        Gauge("tidegate_ledger_lag_seconds", lag, registry=registry).set_function(lag_s)
        self.records = Counter("tidegate_ledger_records_total", "Usage records posted to the ledger", registry=registry)
        self.duplicates = Counter(
            "tidegate_ledger_duplicates_total", "Usage records the ledger had already", registry=registry
        )
        self.unrated = Counter(
            "tidegate_ledger_unrated_total", "Billable usage records without a price in force", registry=registry
        )
        self.events = Counter(
            "tidegate_usage_events_total",
            "Usage events for collectors: delivered, dead (never taken, kept aside), retried (tries that failed)",
            ["collector", "outcome"],
            registry=registry,
        )
        self.damage = Counter(
            "tidegate_journal_damage_total", "Pages of a journal with damaged bytes, set aside", registry=registry
        )
