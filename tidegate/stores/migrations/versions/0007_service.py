"""Service levels outlive the control plane: counts by endpoint, window and place in the window's ring."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    counts = [sa.Column(name, sa.BigInteger, nullable=False) for name in ("bucket", "served", "attained", "failed")]
    op.create_table(
        "service_counts",
        sa.Column("endpoint", sa.String(160), primary_key=True),
        sa.Column("period", sa.String(8), primary_key=True),
        sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
        *counts,
    )


def downgrade() -> None:
    op.drop_table("service_counts")
