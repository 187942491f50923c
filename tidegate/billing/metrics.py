"""What the operator watches about money."""

from prometheus_client import Counter, Gauge

ledger_lag = Gauge("tidegate_ledger_lag_seconds", "Seconds since the ledger last held everything in the journals")
ledger_records = Counter("tidegate_ledger_records_total", "Usage records posted to the ledger")
ledger_duplicates = Counter("tidegate_ledger_duplicates_total", "Usage records ignored because the ledger had them")
ledger_unrated = Counter("tidegate_ledger_unrated_total", "Billable usage records without a price in force")
journal_damage = Counter("tidegate_journal_damage_total", "Pages of a journal in which damaged bytes were set aside")
