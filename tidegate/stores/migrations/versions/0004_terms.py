"""Terms of prices beside plans, contracts, adjustments, re-ratings, limits; sums of minimums and drawdowns."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

TERMS = ("tenant", "endpoint", "model", "mode")
SUMS = ("minimum_nano_usd", "drawn_tokens", "drawn_nano_usd")


def upgrade() -> None:
    _prices()
    with op.batch_alter_table("usage_rollups") as table:
        for name in SUMS:
            table.add_column(sa.Column(name, sa.BigInteger, nullable=False, server_default="0"))
    with op.batch_alter_table("usage_rollups") as table:
        for name in SUMS:
            table.alter_column(name, server_default=None)
    _contracts()
    _adjustments()
    op.create_table(
        "limits",
        sa.Column("scope", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("scope", "subject", name="pk_limits"),
    )


def downgrade() -> None:
    for table in ("limits", "rerates", "adjustments", "contract_alerts", "contracts"):
        op.drop_table(table)
    with op.batch_alter_table("usage_rollups") as rollups:
        for name in SUMS:
            rollups.drop_column(name)
    op.execute("DELETE FROM price_versions WHERE plan = '' OR ends <> 0")
    with op.batch_alter_table("price_versions") as prices:
        prices.drop_constraint("uq_price_versions_plan", type_="unique")
        for name in (*TERMS, "minimum_nano_usd", "accelerator_kinds", "ends"):
            prices.drop_column(name)
        prices.create_unique_constraint("uq_price_versions_plan", ["plan", "effective_ms"])


def _prices() -> None:
    with op.batch_alter_table("price_versions") as table:
        for name in TERMS:
            table.add_column(sa.Column(name, sa.Text, nullable=False, server_default=""))
        table.add_column(sa.Column("minimum_nano_usd", sa.BigInteger, nullable=False, server_default="0"))
        table.add_column(sa.Column("accelerator_kinds", sa.Text, nullable=False, server_default="[]"))
        table.add_column(sa.Column("ends", sa.Integer, nullable=False, server_default="0"))
        table.drop_constraint("uq_price_versions_plan", type_="unique")
        table.create_unique_constraint("uq_price_versions_plan", ["plan", *TERMS, "effective_ms"])
    with op.batch_alter_table("price_versions") as table:
        for name in (*TERMS, "minimum_nano_usd", "accelerator_kinds", "ends"):
            table.alter_column(name, server_default=None)


def _contracts() -> None:
    op.create_table(
        "contracts",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("used_tokens", sa.BigInteger, nullable=False),
        sa.Column("rolled_tokens", sa.BigInteger, nullable=False),
        sa.Column("lapsed_tokens", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "contract_alerts",
        sa.Column("contract", sa.Text, nullable=False),
        sa.Column("percent", sa.Integer, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_ms", sa.BigInteger, nullable=False),
        sa.Column("ended_ms", sa.BigInteger, nullable=True),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("contract", "percent", name="pk_contract_alerts"),
    )


def _adjustments() -> None:
    op.create_table(
        "adjustments",
        sa.Column("transaction_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("reference", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("quantity", sa.BigInteger, nullable=False),
        sa.Column("nano_usd", sa.BigInteger, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.UniqueConstraint("id", name="uq_adjustments_id"),
    )
    op.create_index("ix_adjustments_at_ms", "adjustments", ["at_ms"])
    op.create_table(
        "rerates",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("start_ms", sa.BigInteger, nullable=False),
        sa.Column("end_ms", sa.BigInteger, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("reversed_ms", sa.BigInteger, nullable=True),
    )
