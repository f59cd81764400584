"""What docs/deploy.md lets people ask PostgreSQL."""

import re
from collections.abc import Iterator

import asyncpg
import pytest

from tests.workers import ROOT


def queries() -> Iterator[str]:
    """Every query of the document, also that of the manifest that scales."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    for block in re.findall(r"^```sql\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield from filter(None, map(str.strip, block.split(";")))
    yield from re.findall(r"query: >-\n(.*?)\n +targetQueryValue", text, re.DOTALL)


@pytest.mark.parametrize("query", list(queries()))
async def test_every_query_can_be_asked(connection: asyncpg.Connection, query: str) -> None:
    await connection.fetch(query)
