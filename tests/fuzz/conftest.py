"""What the fuzz tests share: the count of what they try, and a look at whether a worker goes on."""

from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from redis.asyncio import Redis

from tests.fuzzing import PROPERTY, Tried


@pytest.fixture
def tried(record_property: Callable[[str, object], None]) -> Iterator[Tried]:
    """Counts what this test tries, and has it told at the end of the run."""
    count = Tried()
    yield count
    record_property(PROPERTY, count.inputs)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """Redis as anybody has it who may write to it."""
    async with Redis.from_url(redis_url) as client:
        yield client
