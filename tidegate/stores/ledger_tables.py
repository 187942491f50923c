"""The money tables. What is here is what the migrations make; every amount, token count and instant is a BIGINT.

Texts have no length limit: a journal must never hold a record that the ledger cannot take.
"""

from sqlalchemy import BigInteger, Column, Index, Integer, PrimaryKeyConstraint, Table, Text, UniqueConstraint, text

from tidegate.stores.schema import RowId, metadata

# One row: the next transaction number. Taking numbers from it also makes two writers on PostgreSQL take turns.
ledger_state = Table(
    "ledger_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("next_transaction", BigInteger, nullable=False),
)

# How far each gateway's journal has been posted; moves in the transaction that posts what was read.
cursors = Table(
    "cursors",
    metadata,
    Column("boot", Text, primary_key=True),
    Column("segment", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False),
)

AWAY = text("overflow_from <> ''")  # served by another endpoint than the one called

# One row a request, never updated. `transaction_id` numbers the transaction whose entries pay for it.
usage_records = Table(
    "usage_records",
    metadata,
    Column("transaction_id", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False, unique=True),
    Column("gateway", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("region", Text, nullable=False),
    Column("replica", Text, nullable=False),
    Column("api", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("count_source", Text, nullable=False),
    Column("arrived_ms", BigInteger, nullable=False),
    Column("first_token_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger, nullable=False),
    Column("queue_ms", BigInteger, nullable=False),
    Column("activation_ms", BigInteger, nullable=False),
    Column("refusal", Text, nullable=False),
    Column("price_version", BigInteger, nullable=False),
    Column("overflow_from", Text, nullable=False, server_default=""),
    Column("overflow_reason", Text, nullable=False, server_default=""),
    Index("ix_usage_records_arrived_ms", "arrived_ms", "transaction_id"),
    Index("ix_usage_records_overflow", "arrived_ms", sqlite_where=AWAY, postgresql_where=AWAY),
)

# Newest checkpoint of each stream still running: the record as JSON.
open_records = Table(
    "open_records",
    metadata,
    Column("id", Text, primary_key=True),
    Column("boot", Text, nullable=False, index=True),
    Column("document", Text, nullable=False),
)

# Accelerator time charged to dedicated endpoints, one row an endpoint and hour.
accelerator_time = Table(
    "accelerator_time",
    metadata,
    Column("transaction_id", BigInteger, primary_key=True, autoincrement=False),
    Column("endpoint", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("hour_ms", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("nano_usd", BigInteger, nullable=False),
    Column("price_version", BigInteger, nullable=False),
    UniqueConstraint("hour_ms", "endpoint", name="uq_accelerator_time_hour_ms"),
)

# Where every accelerator's time went, by hour: sums that grow with each page of a node's time.
accelerator_states = Table(
    "accelerator_states",
    metadata,
    Column("hour_ms", BigInteger, nullable=False),
    Column("node", Text, nullable=False),
    Column("accelerator", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("lender", Text, nullable=False),
    Column("held_us", BigInteger, nullable=False),
    Column("share_us", BigInteger, nullable=False),
    PrimaryKeyConstraint(
        "hour_ms", "node", "accelerator", "kind", "endpoint", "mode", "state", "lender", name="pk_accelerator_states"
    ),
)

# Up to which instant each node's time is in `accelerator_states`; moves in the transaction that adds it.
time_marks = Table(
    "time_marks",
    metadata,
    Column("node", Text, primary_key=True),
    Column("until_ms", BigInteger, nullable=False),
)

# The last transaction each collector of usage events has taken.
deliveries = Table(
    "deliveries",
    metadata,
    Column("sink", Text, primary_key=True),
    Column("delivered", BigInteger, nullable=False),
)

# One row: usage records of requests that arrived before this instant may be gone; rollups and entries stay.
retention = Table(
    "retention",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("records_from_ms", BigInteger, nullable=False),
)

# Append-only. The amounts of a transaction sum to zero.
entries = Table(
    "entries",
    metadata,
    Column("transaction_id", BigInteger, nullable=False),
    Column("account", Text, nullable=False),
    Column("quantity", BigInteger, nullable=False),
    Column("amount", BigInteger, nullable=False),
    PrimaryKeyConstraint("transaction_id", "account", name="pk_entries"),
    sqlite_with_rowid=False,
)

# Sums kept along with what they sum, in the same transaction; equal to a fold over usage_records and entries.
usage_rollups = Table(
    "usage_rollups",
    metadata,
    Column("hour_ms", BigInteger, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("price_version", BigInteger, nullable=False),
    Column("requests", BigInteger, nullable=False),
    Column("billed_requests", BigInteger, nullable=False),
    Column("refused_requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("billed_input", BigInteger, nullable=False),
    Column("billed_cached", BigInteger, nullable=False),
    Column("billed_output", BigInteger, nullable=False),
    Column("input_nano_usd", BigInteger, nullable=False),
    Column("cached_nano_usd", BigInteger, nullable=False),
    Column("output_nano_usd", BigInteger, nullable=False),
    Column("minimum_nano_usd", BigInteger, nullable=False),
    Column("drawn_tokens", BigInteger, nullable=False),
    Column("drawn_nano_usd", BigInteger, nullable=False),
    PrimaryKeyConstraint(
        "hour_ms", "tenant", "key", "endpoint", "model", "mode", "price_version", name="pk_usage_rollups"
    ),
)

# Sum of the entries of each account, kept the same way.
balances = Table(
    "balances",
    metadata,
    Column("account", Text, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)

# What was true of an endpoint from `start_ms` on; a row without `mode` says that it was deleted.
endpoint_facts = Table(
    "endpoint_facts",
    metadata,
    Column("endpoint", Text, nullable=False),
    Column("start_ms", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("accelerators", BigInteger, nullable=False),
    Column("price_plan", Text, nullable=False),
    Column("mode", Text, nullable=True),
    PrimaryKeyConstraint("endpoint", "start_ms", name="pk_endpoint_facts"),
)

price_versions = Table(
    "price_versions",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("plan", Text, nullable=False),
    Column("effective_ms", BigInteger, nullable=False),
    Column("input_nano_usd", BigInteger, nullable=False),
    Column("cached_input_nano_usd", BigInteger, nullable=False),
    Column("output_nano_usd", BigInteger, nullable=False),
    Column("accelerator_hour_nano_usd", BigInteger, nullable=False),
    Column("batch_percent", Integer, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("minimum_nano_usd", BigInteger, nullable=False),
    Column("accelerator_kinds", Text, nullable=False),
    Column("ends", Integer, nullable=False),
    UniqueConstraint("plan", "tenant", "endpoint", "model", "mode", "effective_ms", name="uq_price_versions_plan"),
)
