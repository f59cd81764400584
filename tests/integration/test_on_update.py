"""What a model writes with every update of a row is written by a bulk update, too."""

from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from db.registry import discover_models
from jobs.insert_rows import InsertRows
from tests import unusual_models
from tests.inprocess import Bench
from tests.unusual_models import Rate


@pytest.fixture
def bench(bench: Bench, unusual_tables: None) -> Bench:
    bench.models = discover_models([unusual_models.__name__])
    return bench


async def merge(bench: Bench, values: dict[str, int], **options: Any) -> dict[str, int]:
    rows: list[dict[str, Any]] = [{"code": code, "value": value} for code, value in values.items()]
    job_id = await bench.run(
        InsertRows(table="rate in %", rows=rows, on_conflict="update", **options)
    )
    done = await bench.job(job_id)
    assert done.state == "succeeded", done.error
    return dict(await bench.counts(job_id))


async def rates(bench: Bench) -> dict[str, Rate]:
    async with bench.sessions() as session:
        return {rate.code: rate for rate in await session.scalars(sa.select(Rate))}


async def test_what_the_model_writes_with_every_update_is_written(bench: Bench) -> None:
    before = datetime.now(UTC)
    await merge(bench, {"a": 1, "b": 1, "c": 1})
    assert (await rates(bench))["a"].by_function is None
    assert await merge(bench, {"a": 2, "b": 2, "c": 1}) == {"updated": 2, "unchanged": 1}
    after = datetime.now(UTC)
    told = await rates(bench)
    one = told["a"]
    assert one.by_function is not None
    assert before < one.by_function < after
    assert one.by_sql is not None
    assert before < one.by_sql.replace(tzinfo=UTC) < after
    assert (one.by_value, one.by_json, one.by_itself) == ("it's 100% :id", {"by": ["a", None]}, 1)
    assert told["c"].by_function is None


async def test_a_function_is_called_anew_for_each_chunk(bench: Bench) -> None:
    await merge(bench, {"a": 1, "b": 1, "c": 1})
    await merge(bench, {"a": 2, "b": 2, "c": 2}, chunk_rows=2)
    told = await rates(bench)
    assert told["a"].by_function == told["b"].by_function
    first, second = told["b"].by_function, told["c"].by_function
    assert first is not None
    assert second is not None
    assert first < second
