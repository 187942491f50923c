"""Why a request was served by another endpoint than the one called."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

AWAY = sa.text("overflow_from <> ''")


def upgrade() -> None:
    for name in ("overflow_from", "overflow_reason"):
        op.add_column("usage_records", sa.Column(name, sa.Text, nullable=False, server_default=""))
    op.create_index(
        "ix_usage_records_overflow", "usage_records", ["arrived_ms"], sqlite_where=AWAY, postgresql_where=AWAY
    )


def downgrade() -> None:
    op.drop_index("ix_usage_records_overflow", "usage_records")
    with op.batch_alter_table("usage_records") as table:
        for name in ("overflow_reason", "overflow_from"):
            table.drop_column(name)
