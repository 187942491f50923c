"""Alembic migrations, run by `stores.database.migrate` when the control plane starts."""
