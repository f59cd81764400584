"""Input that is wrong: what each fault is called, and that nothing is lost or half done."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import asyncpg
import pytest
from pydantic import ValidationError

from db.ledger.verdict import RowVerdict
from jobs._errors import InputError, JobError, PayloadTooLarge
from jobs.insert_rows import InsertRows
from tests.gzipped import gzipped
from tests.inprocess import Bench, Way

pytestmark = pytest.mark.once

MIB = 1024 * 1024
EITHER_WAY = pytest.mark.parametrize("way", get_args(Way))
Read = Callable[[str], Any]


@dataclass
class Desk:
    """Imports files into `hero` and looks at what became of them."""

    bench: Bench
    folder: Path
    connection: asyncpg.Connection

    def file(self, data: bytes, name: str = "heroes.csv") -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path

    async def run(self, data: bytes, way: Way, **request: Any) -> UUID:
        return await self.bench.run_file(self.file(data), way, table="hero", **request)

    async def names(self) -> list[str]:
        return [
            row["name"] for row in await self.connection.fetch("SELECT name FROM hero ORDER BY id")
        ]

    async def rejects(self, data: bytes, way: Way, **request: Any) -> list[RowVerdict]:
        """The rejected rows of an import that comes to its end; all its rows are accounted for."""
        job_id = await self.run(data, way, **request)
        done = await self.bench.job(job_id)
        assert done.state == "succeeded", done.error
        verdicts = await self.bench.verdicts(job_id)
        counts = dict(await self.bench.counts(job_id))
        assert counts.pop("rejected", 0) == len(verdicts)
        assert (
            sum(counts.values()) + len(verdicts) + done.outcome["filtered"] == done.outcome["rows"]
        )
        return verdicts

    async def refusal(self, path: Path, way: Way, table: str = "hero", **request: Any) -> str:
        """Why the input is refused as a whole, at the door or by the job; nothing was inserted."""
        try:
            job_id = await self.bench.run_file(path, way, table=table, **request)
        except InputError as error:
            text = str(error)
        else:
            text = await self.failure(job_id)
        assert await self.names() == []
        return text

    async def failure(self, job_id: UUID) -> str:
        """Why the job failed for good, at its first attempt."""
        done = await self.bench.job(job_id)
        assert (done.state, done.reason, done.attempt) == ("failed", "rejected", 1), done.error
        return str(done.error)


@pytest.fixture
def desk(bench: Bench, tmp_path: Path, connection: asyncpg.Connection) -> Desk:
    bench.import_folders.append(tmp_path)
    return Desk(bench, tmp_path, connection)


# Rows that cannot be read


@EITHER_WAY
@pytest.mark.parametrize(
    ("row", "code", "column"),
    [
        (b"Zo\xeb,5\n", "not_utf8", "name"),
        (b"Ann\0,5\n", "nul_byte", "name"),
        (b"Ann\n", "too_few_fields", None),
        (b"Ann,5,6\n", "too_many_fields", None),
        (b"name,age\n", "repeated_header", None),
        (b'Ann,"5\n', "unclosed_quote", "age"),
        (b"Ann,old\n", "invalid", "age"),
        (b"Ann,-1\n", "invalid", "age"),
        (b"Ann,2147483648\n", "invalid", "age"),
        (b"Ann,99999999999999999999\n", "invalid", "age"),
        (b",5\n", "invalid", "name"),
    ],
)
async def test_a_row_that_cannot_be_used_is_rejected_alone_with_its_bytes(
    row: bytes, code: str, column: str | None, way: Way, desk: Desk
) -> None:
    [bad] = await desk.rejects(b"name,age\nBob,6\n" + row + b"Cid,7\n", way)
    assert (bad.row_no, bad.line, bad.code, bad.column) == (2, 3, code, column)
    assert bad.raw == row
    assert await desk.names() == ["Bob", "Cid"]


@EITHER_WAY
async def test_a_field_of_ten_megabytes_is_rejected_and_only_its_beginning_kept(
    way: Way, desk: Desk
) -> None:
    [bad] = await desk.rejects(b"name\nBob\n" + b"x" * (10 * MIB) + b"\nCid\n", way)
    assert (bad.line, bad.code, bad.raw) == (3, "row_too_large", b"x" * 8192)
    assert f"{10 * MIB + 1} bytes" in bad.message
    assert await desk.names() == ["Bob", "Cid"]


@EITHER_WAY
async def test_a_value_that_is_longer_than_its_column_is_rejected_without_repeating_it(
    way: Way, desk: Desk
) -> None:
    row = b"x" * (MIB // 2) + b"\n"
    [bad] = await desk.rejects(b"name\nBob\n" + row, way)
    assert (bad.code, bad.column, bad.raw) == ("invalid", "name", row)
    assert len(bad.message) < 200


@EITHER_WAY
@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfname,age\nAnn,5\nBob,\n",
        b"name,age\r\nAnn,5\r\nBob,\r\n",
        b"\xef\xbb\xbfname,age\r\nAnn,5\r\nBob,",
        b'\n"name",age\n\n"Ann","5"\n"Bob",""\n\n',
        gzipped(b"name,age\nAnn,5\nBob,\n"),
        gzipped(b"name,age\nAnn,") + gzipped(b"5\nBob,\n"),
    ],
    ids=["mark", "crlf", "mark, crlf, no last end", "blank lines", "gzip", "gzip twice"],
)
async def test_what_is_only_unusual_is_accepted(data: bytes, way: Way, desk: Desk) -> None:
    assert await desk.rejects(data, way) == []
    rows = await desk.connection.fetch("SELECT name, age FROM hero ORDER BY id")
    assert [tuple(row) for row in rows] == [("Ann", 5), ("Bob", None)]


@EITHER_WAY
async def test_a_quoted_newline_is_part_of_its_value_and_counts_as_a_line(
    way: Way, desk: Desk
) -> None:
    [bad] = await desk.rejects(b'name,age\n"Ann\r\nof ""York""",5\nBob,x\n', way)
    assert (bad.row_no, bad.line) == (2, 4)
    assert await desk.names() == ['Ann\r\nof "York"']


# Inputs that cannot be used at all


@EITHER_WAY
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["empty", "0 bytes"]),
        (b"\n\r\n", ["no header"]),
        (b"\xff\xfen\0a\0", ["UTF-16", "save it as UTF-8"]),
        (b"na\xffme\nAnn\n", ["line 1", "not UTF-8"]),
        (b"name,age,name\nAnn,5,6\n", ["line 1", "'name' twice", "1 and 3"]),
        (b"name,\nAnn,5\n", ["no name for column 2"]),
        (b"Ann,5\nBob,6\n", ["'Ann' has no field in hero", "does the first line"]),
        (b"age\n5\n", ["hero.name must be given", "does the first line"]),
        (b"name,agee\nAnn,5\n", ["'agee'", "did you mean 'age'?"]),
    ],
)
async def test_an_input_without_a_usable_header_is_refused_as_a_whole(
    data: bytes, words: list[str], way: Way, desk: Desk
) -> None:
    message = await desk.refusal(desk.file(data), way)
    assert [word for word in words if word not in message] == [], message


@EITHER_WAY
async def test_a_header_alone_is_an_import_of_no_rows(way: Way, desk: Desk) -> None:
    job_id = await desk.run(b"name,age\n", way)
    done = await desk.bench.job(job_id)
    assert (done.state, done.outcome) == ("succeeded", {"rows": 0, "filtered": 0, "verdicts": {}})
    assert await desk.bench.audit(job_id) == []


@EITHER_WAY
@pytest.mark.parametrize("lost_bytes", [1, 8, 10_000])
async def test_of_a_gzip_file_that_is_cut_off_nothing_at_all_is_inserted(
    lost_bytes: int, way: Way, desk: Desk
) -> None:
    text = b"name\n" + b"".join(b"%x\n" % (n * 2654435761) for n in range(10_000))
    path = desk.file(gzipped(text)[:-lost_bytes])
    assert "cut off" in await desk.refusal(path, way, chunk_rows=10)


@EITHER_WAY
async def test_of_a_gzip_file_that_is_damaged_nothing_at_all_is_inserted(
    way: Way, desk: Desk
) -> None:
    text = b"name\n" + b"".join(b"%x\n" % (n * 2654435761) for n in range(10_000))
    packed = bytearray(gzipped(text))
    packed[-8] ^= 1  # the checksum at its end
    assert "damaged" in await desk.refusal(desk.file(bytes(packed)), way, chunk_rows=10)


@EITHER_WAY
@pytest.mark.parametrize(
    ("table", "words"),
    [("heroe", "did you mean hero"), ("villain", "hero, membership, team, transfer")],
)
async def test_an_unknown_model_is_answered_with_those_there_are(
    table: str, words: str, way: Way, desk: Desk
) -> None:
    assert words in await desk.refusal(desk.file(b"name\nAnn\n"), way, table=table)


@EITHER_WAY
@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"map": {"nam": "name"}}, ["--map", "'nam'", "did you mean 'name'?"]),
        ({"map": {"name": "nane"}}, ["hero has no field 'nane'", "did you mean 'name'?"]),
        ({"map": {"name": "tean.name"}}, ["no foreign key to 'tean'", "did you mean 'team'?"]),
        ({"map": {"name": "team.nane"}}, ["team has no column 'nane'", "did you mean 'name'?"]),
        ({"map": {"email": "{name}@{domian}"}}, ["--map email=", "'domian'"]),
        ({"map": {"email": "{name"}}, ["--map email={name", "{{"]),
        ({"where": {"nmae": "Ann"}}, ["--where", "did you mean 'name'?"]),
        ({"ignore": ["nmae"]}, ["--ignore", "did you mean 'name'?"]),
        ({"constants": {"agee": 5}}, ["hero has no field 'agee'", "did you mean 'age'?"]),
    ],
)
async def test_a_mapping_with_an_unknown_name_is_answered_with_the_near_one(
    request_: dict[str, Any], words: list[str], way: Way, desk: Desk
) -> None:
    more = {"constants": {"name": "x"}} if "." in str(request_) else {}
    message = await desk.refusal(desk.file(b"name\nAnn\n"), way, **{**more, **request_})
    assert [word for word in words if word not in message] == [], message


# Options and payloads


@pytest.mark.parametrize("option", ["max_reject", "on_conflicts", "chunk_row"])
async def test_an_unknown_option_is_refused_by_the_payload_and_by_the_worker(
    option: str, desk: Desk
) -> None:
    with pytest.raises(ValidationError, match=option):
        InsertRows.model_validate({"table": "hero", "rows": [], option: 1})
    job_id = (await desk.bench.producer.enqueue(InsertRows(table="hero", rows=[]))).job_id
    await desk.connection.execute(
        "UPDATE bulwark.job SET payload = payload || jsonb_build_object($1::text, 1)", option
    )
    await desk.bench.deliver(job_id)
    assert option in await desk.failure(job_id)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"rows": [], "source": {"type": "in_place", "path": "x"}}, {"rows": [], "chunk_rows": 0}],
    ids=["no input", "two inputs", "no rows in a chunk"],
)
def test_a_payload_that_makes_no_sense_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InsertRows.model_validate({"table": "hero", **wrong})


async def test_a_payload_of_a_mebibyte_goes_in_and_a_larger_one_is_refused(desk: Desk) -> None:
    def payload(names: int) -> InsertRows:
        return InsertRows(table="hero", rows=[{"name": "x" * 188} for _ in range(names)])

    around = len(payload(0).model_dump_json())
    fit = (MIB - around + 1) // 200  # each row is 200 bytes with its comma
    job_id = await desk.bench.run(payload(fit))
    assert dict(await desk.bench.counts(job_id)) == {"inserted": fit}
    with pytest.raises(PayloadTooLarge, match="put the rows in a file"):
        await desk.bench.producer.enqueue(payload(fit + 1))


@pytest.mark.parametrize(("text", "word"), [("Ann\0", "NUL"), ("Ann\ud800", "Unicode")])
async def test_text_that_postgresql_cannot_hold_is_refused_before_it_is_enqueued(
    text: str, word: str, desk: Desk
) -> None:
    with pytest.raises(JobError, match=word):
        await desk.bench.producer.enqueue(InsertRows(table="hero", rows=[{"name": text}]))


# Files that may not, or cannot, be read where they are


async def test_a_file_outside_the_allowed_folders_is_not_read(desk: Desk) -> None:
    path = desk.file(b"name\nAnn\n")
    desk.bench.import_folders[:] = [desk.folder / "inside"]
    message = await desk.refusal(path, "in place")
    assert "outside the allowed folders" in message
    assert "BULWARK_IMPORT_FOLDERS" in message


@pytest.mark.parametrize("detour", ["link", "linked folder", "dots"])
async def test_no_detour_leads_out_of_the_allowed_folders(detour: str, desk: Desk) -> None:
    outside = desk.file(b"name\nAnn\n")
    inside = desk.folder / "inside"
    inside.mkdir()
    desk.bench.import_folders[:] = [inside]
    (inside / "link.csv").symlink_to(outside)
    (inside / "linked").symlink_to(desk.folder)
    path = {
        "link": inside / "link.csv",
        "linked folder": inside / "linked" / outside.name,
        "dots": inside / ".." / outside.name,
    }[detour]
    assert "outside the allowed folders" in await desk.refusal(path, "in place")


@EITHER_WAY
async def test_a_file_that_is_not_there_is_named(way: Way, desk: Desk) -> None:
    message = await desk.refusal(desk.folder / "missing.csv", way)
    assert "missing.csv" in message
    assert "No such file" in message


@EITHER_WAY
async def test_a_folder_and_a_pipe_are_no_files_to_read(way: Way, desk: Desk) -> None:
    os.mkfifo(desk.folder / "pipe.csv")
    for path in (desk.folder, desk.folder / "pipe.csv"):
        assert "not a regular file" in await desk.refusal(path, way)
