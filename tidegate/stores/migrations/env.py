"""What Alembic runs first. It works on the connection `stores.database.migrate` hands in, inside its transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
context.run_migrations()
