"""Tables of contracts, of what adjusts bills beside usage and time, and of limits."""

from sqlalchemy import BigInteger, Column, Index, Integer, PrimaryKeyConstraint, Table, Text, UniqueConstraint

from tidegate.stores.schema import metadata

# `document` is the Contract as JSON. The token sums move in the transaction that posts what they sum.
contracts = Table(
    "contracts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("document", Text, nullable=False),
    Column("used_tokens", BigInteger, nullable=False),
    Column("rolled_tokens", BigInteger, nullable=False),
    Column("lapsed_tokens", BigInteger, nullable=False),
)

# Thresholds a contract has crossed; delivered once, tried again until then.
contract_alerts = Table(
    "contract_alerts",
    metadata,
    Column("contract", Text, nullable=False),
    Column("percent", Integer, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_ms", BigInteger, nullable=False),
    Column("ended_ms", BigInteger, nullable=True),
    Column("outcome", Text, nullable=False),
    PrimaryKeyConstraint("contract", "percent", name="pk_contract_alerts"),
)

# Transactions that belong to no request and no hour: purchases, lapses, re-ratings, credits. Never updated.
adjustments = Table(
    "adjustments",
    metadata,
    Column("transaction_id", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("reference", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("mode", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("quantity", BigInteger, nullable=False),
    Column("nano_usd", BigInteger, nullable=False),
    Column("note", Text, nullable=False),
    UniqueConstraint("id", name="uq_adjustments_id"),
    Index("ix_adjustments_at_ms", "at_ms"),
)

# Periods that were rated again; `reversed_ms` is when that was taken back.
rerates = Table(
    "rerates",
    metadata,
    Column("id", Text, primary_key=True),
    Column("start_ms", BigInteger, nullable=False),
    Column("end_ms", BigInteger, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("reversed_ms", BigInteger, nullable=True),
)

# What keys, tenants and endpoints may do: desired state, `document` is a Limits as JSON.
limits = Table(
    "limits",
    metadata,
    Column("scope", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("document", Text, nullable=False),
    PrimaryKeyConstraint("scope", "subject", name="pk_limits"),
)
