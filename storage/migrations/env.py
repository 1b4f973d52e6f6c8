"""Alembic's entry: runs the migrations in the transaction of the connection that storage/tables.py hands over."""

from alembic import context
from sqlalchemy import text

connection = context.config.attributes["connection"]
connection.execute(text("CREATE SCHEMA IF NOT EXISTS hpo"))
context.configure(connection=connection, target_metadata=None, version_table="revision", version_table_schema="hpo")
with context.begin_transaction():
    context.run_migrations()
