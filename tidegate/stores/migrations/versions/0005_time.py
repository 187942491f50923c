"""Accelerator time by state, deliveries of usage events, how far back usage records are kept."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "accelerator_states",
        sa.Column("hour_ms", sa.BigInteger, nullable=False),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("accelerator", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("mode", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("lender", sa.Text, nullable=False),
        sa.Column("held_us", sa.BigInteger, nullable=False),
        sa.Column("share_us", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint(
            "hour_ms",
            "node",
            "accelerator",
            "kind",
            "endpoint",
            "mode",
            "state",
            "lender",
            name="pk_accelerator_states",
        ),
    )
    op.create_table(
        "time_marks",
        sa.Column("node", sa.Text, primary_key=True),
        sa.Column("until_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "deliveries",
        sa.Column("sink", sa.Text, primary_key=True),
        sa.Column("delivered", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "retention",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("records_from_ms", sa.BigInteger, nullable=False),
    )
    op.execute("INSERT INTO retention (id, records_from_ms) VALUES (1, 0)")


def downgrade() -> None:
    for table in ("retention", "deliveries", "time_marks", "accelerator_states"):
        op.drop_table(table)
