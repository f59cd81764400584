"""Objects are read from their store, in one version, and only from where that is allowed."""

import os
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from jobs._errors import InputError, SourceAway
from jobs._input import InPlace
from jobs._sources.object_store import RANGE_BYTES, ObjectSource
from jobs._sources.place import open_place
from jobs._sources.source import raw_blocks
from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from tests.object_store import ObjectStore, object_store

pytestmark = pytest.mark.once

PLACE = "/bucket/in/some teams.csv"
TEAMS = b"name\n" + b"".join(b"Team %d\n" % n for n in range(1000))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with object_store() as opened:
        for name, value in opened.environment().items():
            monkeypatch.setenv(name, value)
        opened.objects[PLACE] = TEAMS
        yield opened


@pytest.fixture
def bench(bench: Bench) -> Bench:
    bench.import_folders.append("s3://bucket/in")
    return bench


async def run(bench: Bench, uri: str, **request: Any) -> UUID:
    source = InPlace(type="in_place", path=uri)
    return await bench.run(InsertRows(table="team", source=source, **request))


async def failure(bench: Bench, uri: str) -> str:
    done = await bench.job(await run(bench, uri))
    assert (done.state, done.reason, done.attempt) == ("failed", "rejected", 1)
    return str(done.error)


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_an_object_of_any_store_is_read_by_ranges_from_any_offset(
    store: ObjectStore, scheme: str
) -> None:
    data = os.urandom(2 * RANGE_BYTES + 5)
    store.objects[PLACE] = data
    with ObjectSource(f"{scheme}:/{PLACE}") as source:
        assert (source.size_bytes, source.name) == (len(data), "some teams.csv")
        assert b"".join(raw_blocks(source)) == data
        store.requests.clear()
        assert source.read_at(len(data) - 3, 10) == data[-3:]
        assert source.read_at(len(data), 10) == b""
        assert store.requests == []


async def test_an_object_is_imported_from_where_it_is(store: ObjectStore, bench: Bench) -> None:
    job_id = await run(bench, f"s3:/{PLACE}", chunk_rows=100)
    assert dict(await bench.counts(job_id)) == {"inserted": 1000}


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://bucket/inside/teams.csv", "outside the allowed places"),
        ("s3://other/in/teams.csv", "outside the allowed places"),
        ("gs://bucket/in/teams.csv", "outside the allowed places"),
        ("s3://bucket/in/../out/teams.csv", "names no object"),
        ("s3://bucket/in/none.csv", "There is no object"),
        ("http://bucket/in/teams.csv", "known are file, s3, gs, az"),
        ("file://elsewhere/teams.csv", "names no file of this machine"),
        ("file:///etc/passwd", "outside the allowed folders"),
    ],
)
async def test_what_is_elsewhere_or_not_there_is_refused(
    store: ObjectStore, bench: Bench, uri: str, words: str
) -> None:
    assert words in await failure(bench, uri)


@pytest.mark.parametrize("status", [HTTPStatus.FORBIDDEN, HTTPStatus.UNAUTHORIZED])
async def test_a_store_that_refuses_the_credentials_fails_the_job_with_its_words(
    store: ObjectStore, bench: Bench, status: HTTPStatus
) -> None:
    store.refuses = status
    assert f"{status} {status.phrase}" in await failure(bench, f"s3:/{PLACE}")


async def test_while_a_store_does_not_answer_the_job_is_put_off_at_no_attempts_cost(
    store: ObjectStore, bench: Bench
) -> None:
    store.refuses = HTTPStatus.SERVICE_UNAVAILABLE
    job_id = await run(bench, f"s3:/{PLACE}")
    done = await bench.job(job_id)
    assert (done.state, done.attempt) == ("queued", 0)
    assert done.run_at > done.created_at


def test_a_store_that_is_not_there_is_told_apart_from_one_that_refuses(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(SourceAway, match="cannot be read"):
        open_place(f"s3:/{PLACE}")


def test_an_object_that_is_replaced_while_it_is_read_ends_the_reading(store: ObjectStore) -> None:
    store.objects[PLACE] = os.urandom(2 * RANGE_BYTES)
    with ObjectSource(f"s3:/{PLACE}") as source:
        assert source.read_at(0, 1)
        store.objects[PLACE] = os.urandom(2 * RANGE_BYTES)
        with pytest.raises(InputError, match="was changed while the job read it"):
            source.read_at(RANGE_BYTES, 1)


def test_a_uri_of_a_file_is_its_path(tmp_path: Path) -> None:
    path = tmp_path / "some teams.csv"
    path.write_bytes(TEAMS)
    uri = path.as_uri()
    assert "%20" in uri
    with open_place(uri, [tmp_path]) as source:
        assert b"".join(raw_blocks(source)) == TEAMS
