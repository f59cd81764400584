"""Run the migrations on the database that the caller or BULWARK_DATABASE_URL names."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from logging.config import fileConfig
from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.util import CommandError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.types import UserDefinedType
from sqlmodel import SQLModel

import db.ledger  # noqa: F401 - its tables are part of the metadata
from db.registry import discover_models
from worker.settings import Settings, SettingsError, load_settings

TURN_LOCK = 0x62756C7761726B  # "bulwark" in ASCII
"""The advisory lock of whoever migrates; a second one waits for its turn."""

TURN_TIMEOUT_MS = 600_000
LOCK_TIMEOUT_MS = 5_000
"""How long a migration may wait for a table: whoever comes after it waits as well."""

IncludeName = Callable[[str | None, str, Any], bool]


@cache
def settings() -> Settings:
    """The environment and .env, as every other command of Bulwark reads them."""
    try:
        return load_settings()
    except SettingsError as error:
        raise CommandError(str(error)) from None


def model_modules() -> list[str]:
    """The modules with models that the caller or the settings name, besides the package's."""
    given = context.config.attributes.get("model_modules")
    return list(settings().model_modules if given is None else given)


def database_url() -> sa.URL:
    stated = context.config.attributes.get("database_url")
    if stated:
        return sa.make_url(stated).set(drivername="postgresql+asyncpg")
    secret = settings().database_url
    if secret is None:
        raise CommandError(
            "BULWARK_DATABASE_URL is not set; name the database, "
            "as in postgresql+asyncpg://user:password@host/database."
        )
    return sa.make_url(secret.get_secret_value())


def lock_timeout_ms() -> int:
    return int(context.config.attributes.get("lock_timeout_ms", LOCK_TIMEOUT_MS))


def take_turn(connection: sa.Connection) -> None:
    """Wait until nobody else migrates this database, then bound every later wait for a lock.

    Inside a transaction of the caller both end with it, else with the connection.
    """
    inside = connection.in_transaction()
    set_, lock = ("SET LOCAL", "pg_advisory_xact_lock") if inside else ("SET", "pg_advisory_lock")
    connection.exec_driver_sql(f"{set_} lock_timeout = {TURN_TIMEOUT_MS}")
    connection.exec_driver_sql(f"SELECT {lock}({TURN_LOCK})")
    connection.exec_driver_sql(f"{set_} lock_timeout = {lock_timeout_ms()}")
    if not inside:
        connection.commit()


def partitions(connection: sa.Connection) -> set[tuple[str, str]]:
    """Schema and name of every partition: they come and go with the jobs, not with migrations."""
    query = (
        "SELECT n.nspname, c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind IN ('r', 'p')"
    )
    return {(schema, name) for schema, name in connection.exec_driver_sql(query)}


def ours(connection: sa.Connection) -> IncludeName:
    """What to compare with the models: their schemas, without partitions."""
    own_schemas = {None, *(table.schema for table in SQLModel.metadata.tables.values())}
    children = partitions(connection)
    default_schema = connection.dialect.default_schema_name

    def include_name(name: str | None, kind: str, parents: Any) -> bool:
        if kind == "schema":
            return name in own_schemas
        if kind == "table":
            return (parents.get("schema_name") or default_schema, name) not in children
        return True

    return include_name


def teach_own_types(connection: sa.Connection) -> None:
    """Let reflection know the column types that the models define themselves."""
    columns = (column for table in SQLModel.metadata.tables.values() for column in table.columns)
    types = (column.type for column in columns if isinstance(column.type, UserDefinedType))
    own = {type_.get_col_spec(): type(type_) for type_ in types}
    dialect: Any = connection.dialect
    dialect.ischema_names = {**dialect.ischema_names, **own}


def transaction_of(connection: sa.Connection) -> AbstractContextManager[object]:
    return nullcontext() if connection.in_transaction() else connection.begin()


def migrate(connection: sa.Connection) -> None:
    """Each migration commits on its own, unless the connection came inside a transaction."""
    take_turn(connection)
    teach_own_types(connection)
    with transaction_of(connection):
        include_name = ours(connection)
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        include_schemas=True,
        include_name=include_name,
        compare_type=True,
        compare_server_default=True,
        transaction_per_migration=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def connect_and_migrate(url: sa.URL) -> None:
    engine = create_async_engine(
        url,
        poolclass=sa.NullPool,
        connect_args={"server_settings": {"application_name": "bulwark migrate"}},
    )
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


def write_sql() -> None:
    """Print the statements in place of running them."""
    context.configure(
        dialect_name="postgresql",
        target_metadata=SQLModel.metadata,
        literal_binds=True,
        dialect_opts={"paramstyle": "named"},
        transaction_per_migration=True,
    )
    context.execute(f"SET lock_timeout = {lock_timeout_ms()}")
    with context.begin_transaction():
        context.run_migrations()


def run() -> None:
    config = context.config
    if config.cmd_opts is not None and config.config_file_name is not None:
        fileConfig(config.config_file_name, disable_existing_loggers=False)
    discover_models(model_modules())
    given = config.attributes.get("connection")
    if context.is_offline_mode():
        write_sql()
    elif given is not None and "database_url" not in config.attributes:
        with transaction_of(given):
            migrate(given)
    else:
        asyncio.run(connect_and_migrate(database_url()))


run()
