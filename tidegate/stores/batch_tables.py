"""The tables of offline work."""

from sqlalchemy import BigInteger, Boolean, Column, Index, String, Table, Text

from tidegate.stores.schema import metadata

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", String(512), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=True),
    Index("ix_files_tenant", "tenant", "created_ms"),
)

# `document` is the batch as JSON: read and written whole. `open` says whether the runner still has to look at it.
batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("open", Boolean, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("document", Text, nullable=False),
    Index("ix_batches_tenant", "tenant", "created_ms"),
    Index("ix_batches_open", "open"),
)
