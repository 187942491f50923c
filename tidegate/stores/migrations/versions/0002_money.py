"""Money: usage records, ledger entries, cursors into the journals, rollups, endpoint facts, the price book."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

RowId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    _ledger()
    _usage()
    _time()
    _rollups()
    _prices()


def downgrade() -> None:
    for table in (
        "price_versions",
        "endpoint_facts",
        "balances",
        "usage_rollups",
        "entries",
        "accelerator_time",
        "open_records",
        "usage_records",
        "cursors",
        "ledger_state",
    ):
        op.drop_table(table)


def _ledger() -> None:
    op.create_table(
        "ledger_state",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("next_transaction", sa.BigInteger, nullable=False),
    )
    op.execute("INSERT INTO ledger_state (id, next_transaction) VALUES (1, 1)")
    op.create_table(
        "cursors",
        sa.Column("boot", sa.Text, primary_key=True),
        sa.Column("segment", sa.BigInteger, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "entries",
        sa.Column("transaction_id", sa.BigInteger, nullable=False),
        sa.Column("account", sa.Text, nullable=False),
        sa.Column("quantity", sa.BigInteger, nullable=False),
        sa.Column("amount", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("transaction_id", "account", name="pk_entries"),
        sqlite_with_rowid=False,
    )


def _usage() -> None:
    op.create_table(
        "usage_records",
        sa.Column("transaction_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("gateway", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("region", sa.Text, nullable=False),
        sa.Column("replica", sa.Text, nullable=False),
        sa.Column("api", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("count_source", sa.Text, nullable=False),
        sa.Column("arrived_ms", sa.BigInteger, nullable=False),
        sa.Column("first_token_ms", sa.BigInteger, nullable=False),
        sa.Column("ended_ms", sa.BigInteger, nullable=False),
        sa.Column("queue_ms", sa.BigInteger, nullable=False),
        sa.Column("activation_ms", sa.BigInteger, nullable=False),
        sa.Column("refusal", sa.Text, nullable=False),
        sa.Column("price_version", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("id", name="uq_usage_records_id"),
    )
    op.create_index("ix_usage_records_arrived_ms", "usage_records", ["arrived_ms", "transaction_id"])
    op.create_table(
        "open_records",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("boot", sa.Text, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_index("ix_open_records_boot", "open_records", ["boot"])


def _time() -> None:
    op.create_table(
        "accelerator_time",
        sa.Column("transaction_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("hour_ms", sa.BigInteger, nullable=False),
        sa.Column("duration_ms", sa.BigInteger, nullable=False),
        sa.Column("nano_usd", sa.BigInteger, nullable=False),
        sa.Column("price_version", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("hour_ms", "endpoint", name="uq_accelerator_time_hour_ms"),
    )
    op.create_table(
        "endpoint_facts",
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("start_ms", sa.BigInteger, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.Column("accelerators", sa.BigInteger, nullable=False),
        sa.Column("price_plan", sa.Text, nullable=False),
        sa.Column("mode", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("endpoint", "start_ms", name="pk_endpoint_facts"),
    )


def _rollups() -> None:
    op.create_table(
        "usage_rollups",
        sa.Column("hour_ms", sa.BigInteger, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("price_version", sa.BigInteger, nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("billed_requests", sa.BigInteger, nullable=False),
        sa.Column("refused_requests", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("billed_input", sa.BigInteger, nullable=False),
        sa.Column("billed_cached", sa.BigInteger, nullable=False),
        sa.Column("billed_output", sa.BigInteger, nullable=False),
        sa.Column("input_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("cached_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("output_nano_usd", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint(
            "hour_ms", "tenant", "key", "endpoint", "model", "mode", "price_version", name="pk_usage_rollups"
        ),
    )
    op.create_table(
        "balances",
        sa.Column("account", sa.Text, primary_key=True),
        sa.Column("amount", sa.BigInteger, nullable=False),
    )


def _prices() -> None:
    op.create_table(
        "price_versions",
        sa.Column("id", RowId, primary_key=True, autoincrement=True),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("effective_ms", sa.BigInteger, nullable=False),
        sa.Column("input_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("cached_input_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("output_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("accelerator_hour_nano_usd", sa.BigInteger, nullable=False),
        sa.Column("batch_percent", sa.Integer, nullable=False),
        sa.Column("created_ms", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("plan", "effective_ms", name="uq_price_versions_plan"),
    )
