"""The one metadata object of every SQL table, and the control plane's own tables.

The ledger's and the price book's tables are declared on the same `metadata` in `ledger` and `prices`. What is here is
what the newest migration makes; migrations never import it, so that an old one keeps doing what it did.
"""

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, String, Table, Text

# Named constraints, so that a later migration can drop them on PostgreSQL and SQLite alike.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only in a column declared INTEGER (which holds 64 bits there).
RowId = BigInteger().with_variant(Integer(), "sqlite")

# One row: the version of the whole desired state. Compare-and-commit is one UPDATE … WHERE version = expected.
state_version = Table(
    "state_version",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("created_ms", BigInteger, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("hint", String(32), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=True),
    Column("revoked_ms", BigInteger, nullable=True),
)

# `document` is the Deployment as JSON: it is read and written whole, and grows fields without a migration.
deployments = Table(
    "deployments",
    metadata,
    Column("endpoint", String(160), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("document", Text, nullable=False),
)

activity = Table(
    "activity",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("subject", String(160), nullable=False),
    Column("reason", Text, nullable=False),
    Index("ix_activity_subject", "subject", "id"),
)

# What each endpoint served within and without its SLO: a place of a window's ring holds one bucket of it.
service_counts = Table(
    "service_counts",
    metadata,
    Column("endpoint", String(160), primary_key=True),
    Column("period", String(8), primary_key=True),
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("bucket", BigInteger, nullable=False),
    Column("served", BigInteger, nullable=False),
    Column("attained", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
)
