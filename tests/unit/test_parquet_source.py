"""Parquet gives Python values in parts that a restart gives again, in bounded memory."""

import io
import json
import os
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs._errors import InputError
from jobs._part import Part
from jobs._sources.csv import MAX_RECORD_BYTES
from jobs._sources.parquet import ParquetReader
from tests.parts import Record, StoredBytes, all_records, comparable

MIB = 1024 * 1024


def written(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def reader(table: pa.Table, **options: Any) -> ParquetReader:
    return ParquetReader(StoredBytes(written(table, **options)))


def records(table: pa.Table, **options: Any) -> list[Record]:
    return all_records(reader(table, **options).parts(1000, MIB))


def column(values: list[Any], kind: pa.DataType) -> list[Any]:
    """The values of one column after their way through a file."""
    found = records(pa.table({"a": pa.array(values, kind)}))
    return [record.values and record.values[0] for record in found]


PARIS_WINTER = timezone(timedelta(hours=1))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.string(), "Zoë"),
        (pa.large_string(), ""),
        (pa.int64(), 2**63 - 1),
        (pa.uint64(), 2**64 - 1),
        (pa.float64(), 0.1),
        (pa.bool_(), True),
        (pa.binary(), b"\xff\0"),
        (pa.date32(), date(2020, 2, 29)),
        (pa.time64("us"), time(1, 2, 3, 4)),
        (pa.timestamp("us"), datetime.fromisoformat("2020-01-01T01:02:03.000004")),
        (pa.timestamp("ms", "UTC"), datetime(2020, 1, 1, tzinfo=UTC)),
        (pa.timestamp("us", "Europe/Paris"), datetime(2020, 1, 1, tzinfo=PARIS_WINTER)),
        (pa.decimal128(38, 10), Decimal("12345678901234567890.0123456789")),
        (pa.list_(pa.int32()), [1, None, 3]),
        (pa.struct({"x": pa.int32(), "y": pa.list_(pa.string())}), {"x": 1, "y": ["z"]}),
        (pa.map_(pa.string(), pa.int32()), {"x": 1}),
        (pa.dictionary(pa.int32(), pa.string()), "x"),
        (pa.duration("us"), timedelta(microseconds=1)),
    ],
    ids=str,
)
def test_a_value_comes_as_the_python_value_it_stands_for(kind: pa.DataType, value: Any) -> None:
    first, none = column([value, None], kind)
    assert (first, none) == (value, None)
    assert type(first) is type(value)


def test_times_finer_than_a_microsecond_are_cut_to_it() -> None:
    assert column([1_999], pa.timestamp("ns")) == [
        datetime.fromisoformat("1970-01-01T00:00:00.000001")
    ]
    assert column([1_999], pa.time64("ns")) == [time(0, 0, 0, 1)]


def test_values_that_python_or_postgresql_cannot_hold_reject_their_rows_alone() -> None:
    late = pa.array([0, 10**12, 2], pa.timestamp("s"))
    wrong = pa.array([b"ok", b"ok", b"\xff"], pa.binary()).view(pa.string())
    nul = pa.array(["a", "b", "c"])
    table = pa.table({"at": late, "text": wrong, "nul": nul})
    more = pa.table({"at": pa.array([3], pa.timestamp("s")), "text": ["x"], "nul": ["x\0y"]})
    found = records(pa.concat_tables([table, more]))
    assert [record.fault and (record.fault.code, record.fault.column) for record in found] == [
        None,
        ("unreadable", "at"),
        ("not_utf8", "text"),
        ("nul_byte", "nul"),
    ]
    assert [record.line for record in found] == [1, 2, 3, 4]


def test_a_row_larger_than_any_format_allows_is_rejected_with_its_beginning() -> None:
    large = "x" * (MAX_RECORD_BYTES + 1)
    first, bad, last = records(pa.table({"a": ["first", large, "last"], "n": [1, 2, 3]}))
    assert (first.values, last.values) == (["first", 1], ["last", 3])
    assert bad.fault is not None
    assert bad.fault.code == "row_too_large"
    assert json.loads(bad.raw) == {"a": "x" * 8192, "n": 2}


def test_the_bytes_of_a_row_are_it_as_json_that_can_be_mended() -> None:
    table = pa.table(
        {
            "name": ["Zoë"],
            "born": [date(2020, 1, 2)],
            "fee": pa.array([Decimal("1.10")], pa.decimal128(5, 2)),
            "text": [b"abc"],
            "none": pa.array([None], pa.int32()),
            "list": [[1, 2]],
        }
    )
    [record] = records(table)
    assert json.loads(record.raw) == {
        "name": "Zoë",
        "born": "2020-01-02",
        "fee": "1.10",
        "text": "abc",
        "none": None,
        "list": [1, 2],
    }


# Parts


HEROES = pa.table(
    {
        "name": [f"Hero {n}" for n in range(1000)],
        "age": list(range(1000)),
        "note": ["x" * (n % 97) for n in range(1000)],
    }
)


@pytest.mark.parametrize("group_rows", [7, 300, 1000])
@pytest.mark.parametrize(("max_rows", "max_bytes"), [(100, MIB), (1000, 2000), (64, 3000)])
def test_a_restart_after_any_part_gives_the_parts_of_an_uninterrupted_read(
    group_rows: int, max_rows: int, max_bytes: int
) -> None:
    stored = StoredBytes(written(HEROES, row_group_size=group_rows))
    whole = list(ParquetReader(stored).parts(max_rows, max_bytes))
    assert [values for part in whole for values in part.rows] == [
        tuple(row.values()) for row in HEROES.to_pylist()
    ]
    assert max(len(part.rows) for part in whole) <= max_rows
    for index, part in list(enumerate(whole))[:: max(1, len(whole) // 10)]:
        again = list(ParquetReader(stored).parts(max_rows, max_bytes, part.next))
        assert comparable(again) == comparable(whole[index + 1 :])


def test_parts_add_up_to_the_size_of_the_input() -> None:
    opened = reader(HEROES, row_group_size=300)
    spans = [part.span for part in opened.parts(70, MIB)]
    assert spans[0].start_byte == opened.start().byte
    assert all(one.end_byte == two.start_byte for one, two in pairwise(spans))
    assert spans[-1].end_byte == opened.text_bytes()


def test_a_file_without_rows_has_columns_and_no_parts() -> None:
    opened = reader(HEROES.slice(0, 0))
    assert opened.columns == ["name", "age", "note"]
    assert list(opened.parts(10, 10)) == []
    assert opened.text_bytes() == 0


def test_large_values_from_a_small_dictionary_end_a_part_by_their_size() -> None:
    indices = pa.array([0] * 20_000, pa.int32())
    values = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 100_000]))
    data = written(pa.table({"a": values}), store_schema=False)
    assert len(data) < MIB
    found: list[Part] = []
    for part in ParquetReader(StoredBytes(data)).parts(10_000, MIB):
        found.append(part)
        if len(found) == 3:
            break
    assert max(len(part.rows) for part in found) <= 128


# What cannot be read


@pytest.mark.parametrize("lost_bytes", [1, 100])
def test_a_file_that_is_cut_off_is_refused(lost_bytes: int) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        ParquetReader(StoredBytes(written(HEROES)[:-lost_bytes]))


def test_a_damaged_page_is_found_before_any_row_is_used() -> None:
    noise = pa.table({"a": [os.urandom(20) for _ in range(10_000)]})
    data = bytearray(written(noise, row_group_size=5_000, write_page_checksum=True))
    data[len(data) * 3 // 4] ^= 255
    with pytest.raises(InputError, match="damaged in row group 1"):
        ParquetReader(StoredBytes(bytes(data))).text_bytes()


@pytest.mark.parametrize("names", [["a", "a"], ["a", " "]])
def test_columns_without_names_of_their_own_are_refused(names: list[str]) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=names)
    with pytest.raises(InputError, match="without a name of its own"):
        reader(table)


# Bombs, and files that are damaged where the library does not expect it


@pytest.mark.parametrize(
    ("size", "options", "words"),
    [
        ({"columns": 15, "value_mib": 35, "rows": 1}, {"use_dictionary": False}, "pages that take"),
        ({"columns": 1, "value_mib": 65, "rows": 1}, {}, "dictionaries that take"),
        ({"columns": 1, "value_mib": 1, "rows": 300}, {}, "more than 500 times its size"),
    ],
    ids=["pages", "dictionary", "a value again and again"],
)
def test_a_small_file_that_would_take_much_memory_is_refused(
    size: dict[str, int], options: dict[str, Any], words: str
) -> None:
    value, indices = "x" * (size["value_mib"] * MIB), pa.array([0] * size["rows"], pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, [value]).cast(pa.string())
    table = pa.table({f"c{n}": column for n in range(size["columns"])})
    data = written(table, compression="zstd", **options)
    assert len(data) < MIB
    with pytest.raises(InputError, match=words):
        ParquetReader(StoredBytes(data)).text_bytes()


def test_a_column_whose_name_is_not_utf8_is_refused() -> None:
    data = written(pa.table({"Zo\u00eb": [1]})).replace("\u00eb".encode(), b"\xff\xff")
    with pytest.raises(InputError, match="name is not UTF-8"):
        ParquetReader(StoredBytes(data))


def test_a_map_has_the_keys_of_json_whatever_they_are_in_the_file() -> None:
    kind = pa.list_(pa.map_(pa.binary(), pa.int64()))
    [record] = records(pa.table({"a": pa.array([[[(b"k", 1), (b"\xff", 2)]]], kind)}))
    assert record.values == [[{"k": 1, "/w==": 2}]]
    assert json.loads(record.raw) == {"a": [{"k": 1, "/w==": 2}]}
