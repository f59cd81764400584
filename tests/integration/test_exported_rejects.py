"""The export of rejects is a file that an import reads as just those rows, however often."""

import csv
import io
from pathlib import Path
from uuid import UUID

import asyncpg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import JsonValue

from jobs._sources.format import Shape
from jobs.insert_rows import InsertRows
from tests.inprocess import Bench
from worker import rejects

MIB = 1024 * 1024
OWN = b"bulwark_line,bulwark_reason,"


class Desk:
    """Imports files into a table, and exports what was rejected."""

    def __init__(self, bench: Bench, connection: asyncpg.Connection, folder: Path) -> None:
        self.bench = bench
        self.path = folder / "input.csv"
        self._connection = connection

    async def imported(self, data: bytes, table: str = "hero") -> UUID:
        self.path.write_bytes(data)
        job_id = await self.bench.run_file(self.path, "spooled", table=table)
        done = await self.bench.job(job_id)
        assert done.state == "succeeded", done.error
        return job_id

    async def exported(self, job_id: UUID) -> bytes:
        out = io.BytesIO()
        await rejects.export(self.bench.sessions, job_id, out)
        return out.getvalue()

    async def codes(self, job_id: UUID) -> list[str]:
        return [one.code for one in await self.bench.verdicts(job_id)]

    async def names(self, table: str = "hero") -> list[str]:
        rows = await self._connection.fetch(f"SELECT name FROM {table} ORDER BY id")
        return [row["name"] for row in rows]


@pytest.fixture
def desk(bench: Bench, connection: asyncpg.Connection, tmp_path: Path) -> Desk:
    return Desk(bench, connection, tmp_path)


def rows_of(export: bytes) -> list[list[str]]:
    text = export.decode(errors="surrogateescape")
    return list(csv.reader(io.StringIO(text, newline="")))


# An export that is imported and exported again

ROWS = (
    b'"Ann, the ""A""\nof B",-1,"x,y"\n',
    b"Bob,old,\n",
    b"Cid\n",
    b'Dee\xff,1,"z"\n',
    b'"",,\n',
    b"Eve,1,e,more\n",
)


async def test_an_export_that_is_imported_is_exported_with_the_same_header_and_rows(
    desk: Desk,
) -> None:
    first = await desk.exported(await desk.imported(b'name,"age",external_id\n' + b"".join(ROWS)))
    second = await desk.exported(await desk.imported(first))
    third = await desk.exported(await desk.imported(second))

    for export in (first, second, third):
        assert export.startswith(OWN + b'name,"age",external_id\n')
        assert export.count(b"bulwark_") == 2
        assert [row in export for row in ROWS] == [True] * len(ROWS)
        assert [len(row) for row in rows_of(export)] == [5, 5, 5, 3, 5, 5, 6]


async def test_rejects_can_be_mended_in_two_rounds(desk: Desk) -> None:
    first = await desk.exported(await desk.imported(b"name,age\nAnn,-1\nBob,-2\n"))
    second = await desk.exported(await desk.imported(first.replace(b"Ann,-1", b"Ann,1")))
    last = await desk.imported(second.replace(b"Bob,-2", b"Bob,2"))

    assert await desk.names() == ["Ann", "Bob"]
    assert await desk.exported(last) == OWN + b"name,age\n"


async def test_the_columns_of_an_export_are_left_out_wherever_they_stand(desk: Desk) -> None:
    data = b'name,"bulwark_reason",age,bulwark_line\r\nAnn,"a, ""b""",-1,7\r\n'
    export = await desk.exported(await desk.imported(data))

    assert export.startswith(OWN + b"name,age\r\n")
    assert export.endswith(b",Ann,-1\r\n")
    assert [len(row) for row in rows_of(export)] == [4, 4]


async def test_a_row_too_short_to_have_come_from_an_export_is_kept_whole(desk: Desk) -> None:
    data = OWN + b"name,age\nonly this\n"
    export = await desk.exported(await desk.imported(data))
    again = await desk.imported(export)

    assert b'"only this"' in export
    assert await desk.codes(again) == ["too_many_fields"]


async def test_rows_of_a_payload_are_exported_without_the_columns_of_an_export(
    desk: Desk,
) -> None:
    row: dict[str, JsonValue] = {
        "bulwark_line": "7",
        "bulwark_reason": "old",
        "name": "Ann",
        "age": -1,
    }
    job_id = await desk.bench.run(InsertRows(table="hero", rows=[row]))
    header, (line, _, *values) = rows_of(await desk.exported(job_id))

    assert header == ["bulwark_line", "bulwark_reason", "age", "name"]
    assert (line, values) == ("1", ["-1", "Ann"])


# Rows that would spoil the file

WIDTHS = (b"name,age", b"name,age,external_id,email,secret_name")
TOO_LARGE = {
    "plain": b"x" * (MIB + 1),
    "cut inside quotes": b'"' + b"x" * (MIB + 1) + b'"',
    "cut inside a character": b"x" + "é".encode() * MIB,
    "all quotes": b'"' * (MIB + 2),
}


@pytest.mark.parametrize("header", WIDTHS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("row", TOO_LARGE.values(), ids=TOO_LARGE)
async def test_a_row_that_was_too_large_to_keep_spoils_no_other(
    desk: Desk, header: bytes, end: bytes, row: bytes
) -> None:
    commas = b"," * (header.count(b",") - 1)
    await _a_row_between_two_others_spoils_none(
        desk, header, end, row + b",1" + commas, "row_too_large"
    )


@pytest.mark.parametrize("header", WIDTHS)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("row", [b'Bad,"1', b'"Bad, ""1"",', b'Bad\xff,"\0', b'Bad,1,"2,3'])
async def test_a_row_with_an_open_quote_spoils_no_other(
    desk: Desk, header: bytes, end: bytes, row: bytes
) -> None:
    await _a_row_between_two_others_spoils_none(desk, header, end, row, "unclosed_quote")


async def _a_row_between_two_others_spoils_none(
    desk: Desk, header: bytes, end: bytes, row: bytes, code: str
) -> None:
    commas = b"," * (header.count(b",") - 1)
    rows = [b"Ann,-1" + commas, row, b"Bob,-2" + commas]
    first = await desk.imported(end.join([header, *rows, b""]))
    export = await desk.exported(first)
    again = await desk.imported(export.replace(b"Ann,-1", b"Ann,1").replace(b"Bob,-2", b"Bob,2"))

    assert await desk.codes(first) == ["invalid", code, "invalid"]
    columns = header.count(b",") + 1
    assert [len(fields) - columns for fields in rows_of(export)] == [2, 2, 3, 2]
    assert await desk.codes(again) == ["too_many_fields"]
    assert await desk.names() == ["Ann", "Bob"]
    assert rows_of(await desk.exported(again))[1][2:] == rows_of(export)[2][2:]


async def test_the_text_of_a_row_with_an_open_quote_is_there_to_be_mended(desk: Desk) -> None:
    export = await desk.exported(await desk.imported(b'name,age\nBad,"1\n'))
    text = rows_of(export)[1][2]
    spoilt = export.splitlines(keepends=True)[-1]
    await desk.imported(export.replace(spoilt, b"2,," + text.encode() + b'"\n'))

    assert text == 'Bad,"1'
    assert await desk.names() == ["Bad"]


async def test_a_row_that_its_reason_makes_too_long_spoils_no_other(desk: Desk) -> None:
    lines = b"x\n" * (MIB // 2 - 10)
    data = b'name,age\nAnn,-1\n"' + lines + b'",1\nBob,-2\n'
    export = await desk.exported(await desk.imported(data))
    again = await desk.imported(export)

    assert await desk.codes(again) == ["invalid", "row_too_large", "invalid"]


async def test_a_repeated_header_is_refused_again(desk: Desk) -> None:
    export = await desk.exported(await desk.imported(b"name\nRed\nname\n", "team"))
    again = await desk.imported(export, "team")

    assert await desk.codes(again) == ["too_many_fields"]
    assert await desk.names("team") == ["Red"]


# Other formats


async def test_a_tsv_is_exported_with_tabs_and_can_be_mended(desk: Desk) -> None:
    desk.path = desk.path.with_suffix(".tsv")
    rows = b'"Ann\tof ""York"""\t-1\nBob, Jr.\told\n'
    export = await desk.exported(await desk.imported(b"name\tage\n" + rows))
    again = await desk.imported(export.replace(b"\t-1", b"\t1").replace(b"old", b"2"))

    assert export.startswith(b"bulwark_line\tbulwark_reason\tname\tage\n")
    assert await desk.codes(again) == []
    assert await desk.names() == ['Ann\tof "York"', "Bob, Jr."]


async def test_a_declared_encoding_and_delimiter_come_back_as_utf8_with_that_delimiter(
    desk: Desk,
) -> None:
    desk.path.write_bytes("name;age\nZoë;-1\nBöb\x81;2\n".encode("latin-1"))
    shape = Shape(encoding="cp1252", delimiter=";")
    job_id = await desk.bench.run_file(desk.path, "spooled", table="hero", declared=shape)
    export = await desk.exported(job_id)

    assert await desk.codes(job_id) == ["invalid", "not_decoded"]
    first, second = export.splitlines()[1:]
    assert first.decode().endswith(";Zoë;-1")
    assert second.startswith(b'3;"Byte 0x81 at character 3 of the row is not cp1252;')


NDJSON_ROWS = (
    b'{"name": "Ann", "age": -1, "external_id": "\xc3\xab"}',
    b'{"name": "Bob", "age": "old"}',
    b'{"name": "Cid", "name": "Sid"}',
    b'{"name": "Dee", "age": ',
    b'{"name": "Eve\xff"}',
    b"[1, 2]",
    b'{"name": "' + b"x" * MIB + b'"}',
    b"{}",
)


async def test_an_export_of_ndjson_is_ndjson_that_refuses_the_same_rows_until_they_are_mended(
    desk: Desk,
) -> None:
    desk.path = desk.path.with_suffix(".ndjson")
    job_id = await desk.imported(b'{"name": "Al"}\n' + b"\n".join(NDJSON_ROWS))
    export = await desk.exported(job_id)
    again = await desk.imported(export)
    twice = await desk.exported(again)

    codes = ["invalid", "invalid", "duplicate_key", "invalid_json", "not_utf8", "not_an_object"]
    assert await desk.codes(job_id) == [*codes, "row_too_large", "invalid"]
    assert await desk.codes(again) == [*codes, "not_an_object", "invalid"]
    assert twice.count(b'"bulwark_line"') == export.count(b'"bulwark_line"') == 6
    for row, line in zip(NDJSON_ROWS[:5], export.splitlines(), strict=False):
        assert line.startswith(b'{"bulwark_line": ')
        assert line.endswith(row[1:].strip())

    mended = (
        export.replace(b"-1", b"1").replace(b'"old"', b"2").replace(b'"age":\n', b'"age": 3}\n')
    )
    await desk.imported(mended.replace(b"\xff", b"").replace(b', "name": "Sid"', b""))
    assert sorted(await desk.names()) == ["Al", "Ann", "Bob", "Cid", "Dee", "Eve"]


async def test_rows_of_parquet_are_exported_as_ndjson_that_can_be_mended(desk: Desk) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"name": ["Ann", "Bob"], "age": [-1, 2]}), out)
    desk.path = desk.path.with_suffix(".parquet")
    export = await desk.exported(await desk.imported(out.getvalue()))
    desk.path = desk.path.with_suffix(".ndjson")
    await desk.imported(export.replace(b"-1", b"1"))

    assert sorted(await desk.names()) == ["Ann", "Bob"]


async def test_an_export_without_rejects_is_an_empty_file_of_lines(desk: Desk) -> None:
    desk.path = desk.path.with_suffix(".ndjson")
    assert await desk.exported(await desk.imported(b'{"name": "Al"}')) == b""
