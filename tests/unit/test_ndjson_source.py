"""NDJSON gives each row's values exactly, and tells apart every line that is no such row."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs._errors import InputError
from jobs._part import ABSENT, Part, Position
from jobs._sources.csv import MAX_RECORD_BYTES
from jobs._sources.ndjson import MAX_COLUMNS, NdjsonReader, keys_of
from tests.parts import Bytes, Record, all_records, comparable, records_of

MIB = 1024 * 1024


def parts(data: bytes, max_rows: int = 1000, block_bytes: int = 4096) -> list[Part]:
    source = Bytes(data, block_bytes)
    return list(NdjsonReader(source, keys_of(source.blocks())).parts(max_rows, MIB))


def records(data: bytes) -> list[Record]:
    return all_records(parts(data))


def only(line: bytes) -> Record:
    """The record of a line that stands between two good ones, which it leaves alone."""
    first, found, last = records(b'{"a":"first"}\n' + line + b'\n{"a":"last"}\n')
    assert (first.fault, last.fault, found.line) == (None, None, 2)
    return found


def values(line: bytes) -> Any:
    return dict(zip(keys_of([line]), only(line).values or (), strict=False))


# Values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"null", None),
        (b'""', ""),
        (b"true", True),
        (b"12345678901234567890123456789", 12345678901234567890123456789),
        (b"1.10", Decimal("1.10")),
        (b"0.12345678901234567890123", Decimal("0.12345678901234567890123")),
        (b"1e400", Decimal("1e400")),
        (b'[1,{"b":null}]', [1, {"b": None}]),
        (b'{"b":[0.1]}', {"b": [0.1]}),
        (b"[0.12345678901234567890]", [Decimal("0.12345678901234567890")]),
        (b"[1e400]", [Decimal("1e400")]),
        ('"Zoë\u2028\x85"'.encode(), "Zoë\u2028\x85"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\\\u0000"', "\\u0000"),
    ],
)
def test_a_value_is_given_as_it_is(text: bytes, value: Any) -> None:
    found = values(b'{"a":' + text + b"}")["a"]
    assert (type(found), found) == (type(value), value)
    assert str(found) == str(value)


def test_a_missing_key_is_absent_and_null_is_none() -> None:
    [part] = parts(b'{"a":1,"b":2}\n{"b":null}\n{"c":3}\n')
    assert part.rows[1:] == [[ABSENT, None, ABSENT], [ABSENT, ABSENT, 3]]
    assert not part.complete


def test_rows_that_all_have_every_key_in_any_order_are_complete() -> None:
    [part] = parts(b'{"a":1,"b":2}\n{"b":4,"a":3}\n')
    assert [list(row) for row in part.rows] == [[1, 2], [3, 4]]
    assert part.complete


def test_a_single_column_is_a_row_of_one_value() -> None:
    [part] = parts(b'{"a":"xyz"}\n')
    assert [list(row) for row in part.rows] == [["xyz"]]


def test_columns_are_the_keys_of_all_rows_in_the_order_of_their_appearance() -> None:
    lines = [b'{"b":1}', b'{"a":1,"b":2}', b"broken", b'{"a":1,"a":2,"x":1}', b'{"late":null}']
    assert keys_of([b"\n".join(lines)]) == ["b", "a", "late"]


def test_more_keys_than_a_table_has_columns_are_refused() -> None:
    row = {f"key {n}": n for n in range(MAX_COLUMNS)}
    assert len(keys_of([json.dumps(row).encode()])) == MAX_COLUMNS
    with pytest.raises(InputError, match=f"more than {MAX_COLUMNS} different keys"):
        keys_of([json.dumps({**row, "one more": 1}).encode()])


# Lines


def test_blank_lines_make_no_row_but_count_as_lines_and_bytes() -> None:
    data = b'\xef\xbb\xbf\n{"a":1}\r\n\n  {"a":2} \n'
    [part] = parts(data)
    assert [(one.line, one.raw) for one in records_of(part)] == [
        (2, b'{"a":1}\r\n'),
        (4, b'  {"a":2} \n'),
    ]
    assert (part.span.start_byte, part.span.end_byte, part.span.next_line) == (3, len(data), 5)


@pytest.mark.parametrize(
    ("line", "code", "column", "words"),
    [
        (b'{"a":1,"a":2}', "duplicate_key", "a", "'a' stands twice"),
        (b'{"a":{"b":1,"b":2}}', "duplicate_key", "b", "'b' stands twice"),
        (b"[1,2]", "not_an_object", None, "an array"),
        (b"17", "not_an_object", None, "a number"),
        (b'"a"', "not_an_object", None, "a text"),
        (b"null", "not_an_object", None, "null"),
        (b'{"a":NaN}', "not_a_number", None, "write null"),
        (b'{"a":-Infinity}', "not_a_number", None, "write null"),
        (b'{"a":1', "invalid_json", None, "character 7"),
        (b'{"a":}', "invalid_json", None, "character 6"),
        (b'{"a":1}{"a":2}', "invalid_json", None, "character 8"),
        (b'{"a":"x\ty"}', "invalid_json", None, "character 8"),
        (b"name,age", "invalid_json", None, "character 1"),
        (b'{"a":' + b"[" * 50_000 + b"}", "invalid_json", None, "nested too deeply"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "invalid_json", None, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "number_out_of_range", None, "more digits"),
        (b'{"a":1e1000000000}', "number_out_of_range", None, "exponent"),
        (b'{"a":1e9999999999999999999999}', "number_out_of_range", None, "write it as a text"),
        (b'{"a":"x\\u0000"}', "nul_byte", "a", "remove it"),
        (b'{"a":[{"b":"\\u0000"}]}', "nul_byte", "a", "remove it"),
        (b'{"a":"\\ud800"}', "lone_surrogate", "a", "half of a surrogate pair"),
        (b'{"\\udfff":1}', "lone_surrogate", "\\udfff", "half of a surrogate pair"),
        (b'{"a":"Zo\xeb"}', "not_utf8", None, "0xeb at position 8"),
    ],
)
def test_a_line_that_is_no_row_is_rejected_alone_with_place_and_remedy(
    line: bytes, code: str, column: str | None, words: str
) -> None:
    found = only(line)
    assert found.values is None
    assert found.raw == line + b"\n"
    assert found.fault is not None
    assert (found.fault.code, found.fault.column) == (code, column)
    assert words in found.fault.message


def test_two_halves_of_objects_on_two_lines_are_two_broken_rows() -> None:
    codes = [one.fault and one.fault.code for one in records(b'{"a":1,\n"b":2}\n{"a":3}\n')]
    assert codes == ["invalid_json", "invalid_json", None]


def test_a_line_that_is_too_large_is_rejected_and_reading_goes_on() -> None:
    found = only(b'{"a":"' + b"x" * MAX_RECORD_BYTES + b'"}')
    assert found.fault is not None
    assert found.fault.code == "row_too_large"


# Parts

noise = st.lists(
    st.sampled_from(
        [
            b'{"a":1,"b":2}\n',
            b'{"a":1}\r\n',
            b"\n",
            b"{broken\n",
            b'{"a":"\xff"}\n',
            b'{"a":"\\u0000"}\n',
            '{"b":"é"}\n'.encode(),
            b'{"a":"' + b"x" * 40 + b'"}\n',
        ]
    ),
    max_size=30,
).map(b"".join)


@settings(max_examples=200)
@given(noise, st.integers(1, 5), st.integers(1, 60), st.integers(1, 50))
def test_a_restart_after_any_part_gives_the_parts_of_an_uninterrupted_read(
    data: bytes, max_rows: int, max_bytes: int, block_bytes: int
) -> None:
    source = Bytes(data, block_bytes)
    columns = keys_of(source.blocks())

    def read(start: Position | None = None) -> list[Part]:
        reader = NdjsonReader(source, columns, max_record_bytes=30)
        return list(reader.parts(max_rows, max_bytes, start))

    whole = read()
    for index, part in enumerate(whole):
        assert comparable(read(part.next)) == comparable(whole[index + 1 :])
        assert comparable(read(part.start)) == comparable(whole[index:])


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=3), st.none() | st.text() | st.integers() | st.booleans(), max_size=3
        ),
        max_size=20,
    ),
    st.integers(1, 50),
)
def test_rows_come_out_as_they_were_written(rows: list[dict[str, Any]], block_bytes: int) -> None:
    rows = [row for row in rows if "\0" not in json.dumps(row).replace("\\u0000", "\0")]
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    columns = keys_of([data])
    found = all_records(parts(data, block_bytes=block_bytes))
    assert [
        {
            name: value
            for name, value in zip(columns, record.values or (), strict=True)
            if value is not ABSENT
        }
        for record in found
    ] == rows
