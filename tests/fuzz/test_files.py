"""Files of every format, valid, changed, cut off or made up: rows with verdicts, or a sentence."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs._errors import InputError, JobError
from jobs._sources.format import Shape
from jobs._sources.opened import Opened
from jobs._sources.source import Text
from tests.fuzzing import JSON, Tried, fuzzed
from tests.inprocess import Bench, Way
from tests.parts import StoredBytes, records_of

MIB = 1024 * 1024
Kind = Literal["csv", "tsv", "ndjson", "parquet"]
COLUMNS = ("name", "age", "email", "team_id", "é")

cells = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", '"', '""', "a,b", "x\ny", "\r\n", "\ufeff", "7", "-1", "null", "\0", "NaN", "9" * 30]
)


@st.composite
def csv_files(draw: st.DrawFn) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=draw(st.sampled_from(",\t;")))
    writer.writerow(draw(st.permutations(COLUMNS))[: draw(st.integers(1, 5))])
    writer.writerows(draw(st.lists(st.lists(cells, min_size=1, max_size=5), max_size=8)))
    return out.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig"])))


ndjson_files = st.lists(
    st.dictionaries(st.sampled_from(COLUMNS), JSON | cells, max_size=4) | JSON, max_size=8
).map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())

SCALARS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): st.text(st.characters(codec="utf-8"), max_size=8),
    pa.binary(): st.binary(max_size=8),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.date32(): st.dates(),
    pa.timestamp("us"): st.datetimes(),
    pa.timestamp("ns"): st.integers(-(2**63), 2**63 - 1),
    pa.timestamp("ms"): st.integers(-(2**63), 2**63 - 1),
    pa.time64("ns"): st.integers(0, 86_399_999_999_999),
    pa.duration("s"): st.integers(-(2**40), 2**40),
    pa.decimal128(20, 3): st.decimals(allow_nan=False, allow_infinity=False, places=3).filter(
        lambda value: abs(value) < 10**16
    ),
    pa.list_(pa.int64()): st.lists(st.integers(-5, 5), max_size=3),
    pa.struct([("a", pa.int64())]): st.fixed_dictionaries({"a": st.integers(-5, 5)}),
    pa.map_(pa.string(), pa.int64()): st.lists(st.tuples(st.text("ab"), st.just(1)), max_size=3),
    pa.null(): st.none(),
}


@st.composite
def parquet_files(draw: st.DrawFn) -> bytes:
    columns = draw(st.permutations(COLUMNS))[: draw(st.integers(1, 4))]
    rows = draw(st.integers(0, 8))
    arrays = {}
    for name in columns:
        kind = draw(st.sampled_from(list(SCALARS)))
        values = st.none() | SCALARS[kind]
        arrays[name] = pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), kind)
    out = io.BytesIO()
    pq.write_table(
        pa.table(arrays),
        out,
        row_group_size=draw(st.integers(1, 4)),
        compression=draw(st.sampled_from(["none", "snappy", "gzip", "zstd"])),
        data_page_version=draw(st.sampled_from(["1.0", "2.0"])),
        use_dictionary=draw(st.booleans()),
        write_page_checksum=draw(st.booleans()),
    )
    return out.getvalue()


def _flipped(data: bytes, at: int, by: int) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[at % len(changed)] ^= by
    return bytes(changed)


places = st.integers(0, 4_000)
mutations: st.SearchStrategy[Callable[[bytes], bytes]] = st.one_of(
    st.builds(lambda at, by: lambda data: _flipped(data, at, by), places, st.integers(1, 255)),
    st.builds(lambda at, by: lambda data: _flipped(data, -at, by), places, st.integers(1, 255)),
    st.builds(lambda size: lambda data: data[: len(data) - size], places),
    st.builds(lambda at, size: lambda data: data[:at] + data[at + size :], places, places),
    st.builds(lambda at, size: lambda data: data[:at] + data[at : at + size] * 2, places, places),
    st.builds(lambda at, new: lambda data: data[:at] + new + data[at:], places, st.binary()),
    st.just(gzip.compress),
    st.just(zstd.compress),
    st.just(lambda data: data + data),
)


def _mutated(data: bytes, changes: list[Callable[[bytes], bytes]]) -> bytes:
    for change in changes:
        data = change(data)
    return data


files = st.builds(
    _mutated,
    csv_files() | ndjson_files | parquet_files() | st.binary(max_size=200),
    st.lists(mutations, max_size=3),
)
changed_parquet = st.builds(_mutated, parquet_files(), st.lists(mutations, min_size=1, max_size=3))
names = st.sampled_from(["x", "x.csv", "x.tsv", "x.ndjson", "x.parquet", "x.jsonl.zst", "x.csv.gz"])
encodings = st.sampled_from(
    [
        "utf-8",
        "utf-16",
        "utf-16-le",
        "utf-32",
        "latin-1",
        "cp1252",
        "utf-7",
        "shift_jis",
        "hz",
        "iso2022_jp",
        "cp037",
        "utf-8-sig",
        "big5",
        "gb18030",
        "charmap",
        "rot13",
        "idna",
        "\0",
    ]
)
shapes = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(["csv", "tsv", "ndjson", "parquet"]),
        "encoding": encodings,
        "delimiter": st.sampled_from([",", ";", "\t", " ", "|", "a"]),
    },
)


def _read(data: bytes, name: str, declared: Shape, max_rows: int) -> int:
    """Read it as a job does; its parts follow each other and have what is said of them."""
    text = Text.of(StoredBytes(data), declared.encoding)
    opened = Opened.recognised(text, name, declared)
    total, reader = opened.inspection.text_bytes, opened.reader
    columns, at = reader.columns, reader.start()
    rows = 0
    for part in reader.parts(max_rows, MIB, at):
        assert (part.number, part.span.first_row) == (at.chunk_no + part.number - 1, at.row + rows)
        assert len(part.rows) == len(part.lines) == len(part.raws) == part.span.rows
        for record in records_of(part):
            assert record.values is None or len(record.values) == len(columns)
        assert part.span.end_byte <= total
        rows += part.span.rows
    return rows


def _read_or_refuse(data: bytes, name: str, declared: dict[str, Any], max_rows: int) -> int | str:
    try:
        return _read(data, name, Shape(**declared), max_rows)
    except (InputError, ValidationError) as error:
        return str(error)


@fuzzed(600)
@given(data=files, name=names, declared=st.just({}) | shapes, max_rows=st.integers(1, 5))
def test_any_file_is_read_to_its_end_or_refused_in_a_sentence(
    data: bytes, name: str, declared: dict[str, Any], max_rows: int, tried: Tried
) -> None:
    tried.one()
    told = _read_or_refuse(data, name, declared, max_rows)
    assert isinstance(told, int) or told.strip()


@fuzzed(400)
@given(data=changed_parquet, max_rows=st.integers(1, 5))
def test_a_changed_parquet_file_is_read_to_its_end_or_refused_in_a_sentence(
    data: bytes, max_rows: int, tried: Tried
) -> None:
    tried.one()
    told = _read_or_refuse(data, "x.parquet", {}, max_rows)
    assert isinstance(told, int) or (told.strip() and "\n" not in told)


@pytest.fixture
def desk(bench: Bench, tmp_path: Path) -> Bench:
    bench.import_folders.append(tmp_path)
    return bench


@fuzzed(80)
@given(
    data=files,
    name=names,
    way=st.sampled_from(["in place", "spooled"]),
    request=st.fixed_dictionaries(
        {},
        optional={
            "on_conflict": st.sampled_from(["reject", "skip", "update"]),
            "chunk_rows": st.integers(1, 4),
            "atomic": st.booleans(),
            "max_rejects": st.integers(0, 3),
            "constants": st.just({"name": "Constant"}),
        },
    ),
)
async def test_the_import_of_any_file_gives_each_row_a_verdict_or_says_why_not(
    data: bytes,
    name: str,
    way: Way,
    request: dict[str, Any],
    desk: Bench,
    tmp_path: Path,
    tried: Tried,
) -> None:
    tried.one()
    path = tmp_path / name
    path.write_bytes(data)
    try:
        job_id = await desk.run_file(path, way, table="hero", ignore_unknown=True, **request)
    except JobError as error:
        assert str(error)  # noqa: PT017 - either way is right
        return
    report = await desk.report(job_id)
    assert report.state == "succeeded" or report.reason == "rejected", report.error
    assert report.counted == report.tally.rows
    if report.state == "succeeded":
        assert report.adds_up
