"""A PostgreSQL whose roles are those of docs/permissions.md, made by the SQL that stands there."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
from sqlalchemy.engine import make_url

from db.migrations import upgrade
from tests.own_servers import own_postgres
from tests.sample_jobs.act_out import NOTES
from tests.stage import connected

PAGE = (Path(__file__).parents[1] / "docs/permissions.md").read_text()
PASSWORD = "of-all-roles"
ROLES = ("owner", "worker", "operator", "producer", "reader", "auditor")


@dataclass(frozen=True)
class House:
    """One database, and its address for each role."""

    superuser_url: str

    def url(self, role: str) -> str:
        url = make_url(self.superuser_url).set(username=f"bulwark_{role}", password=PASSWORD)
        return url.render_as_string(hide_password=False)


def sql_blocks(section: str) -> list[str]:
    """The SQL of a section, as it stands on the page."""
    text = PAGE.split(f"\n## {section}")[1].split("\n## ")[0]
    return re.findall(r"^```sql\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@contextmanager
def house() -> Iterator[House]:
    """Follow the page from its beginning to its end, on a server of its own."""
    with own_postgres() as server:
        built = House(server.url)
        asyncio.run(_execute(built.superuser_url, *sql_blocks("1."), *sql_blocks("2.")))
        passwords = [f"ALTER ROLE bulwark_{role} PASSWORD '{PASSWORD}'" for role in ROLES]
        asyncio.run(_execute(built.superuser_url, *passwords))
        upgrade(built.url("owner"))
        for _ in range(2):  # the page says that it may be repeated
            asyncio.run(_execute(built.url("owner"), *sql_blocks("3."), *sql_blocks("4.")))
        asyncio.run(_execute(built.url("owner"), NOTES))
        yield built


async def _execute(url: str, *statements: str) -> None:
    async with connected(url) as connection:
        for statement in statements:
            await connection.execute(statement)


async def refused(url: str, statement: str) -> str | None:
    """Why a statement is refused to the role, if it is for want of a right."""
    async with connected(url) as connection:
        try:
            async with connection.transaction():
                await connection.execute(statement)
                raise asyncpg.PostgresError("it was carried out")
        except asyncpg.InsufficientPrivilegeError as error:
            return str(error)
        except asyncpg.PostgresError:
            return None
