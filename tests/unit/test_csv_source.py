"""CSV inputs are read as the csv module reads them, and every faulty row is told apart."""

import csv
import io
import re
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs._errors import InputError
from jobs._part import Part, Position
from jobs._sources.csv import MAX_RECORD_BYTES, CsvReader
from jobs._sources.grammar import Grammar
from jobs._sources.lines import KEPT_BYTES
from tests.parts import Bytes, Record, all_records, comparable, records_of

MIB = 1024 * 1024


def chunks(data: bytes, max_rows: int = 1000, max_bytes: int = MIB) -> list[Part]:
    return list(CsvReader(Bytes(data)).parts(max_rows, max_bytes))


def texts_of(record: Record) -> list[str] | None:
    """The fields as they stand in the input; an empty one is no value."""
    if record.values is None:
        return None
    assert "" not in record.values
    return [value or "" for value in record.values]


def records(data: bytes) -> list[Record]:
    return all_records(chunks(data))


def only(data: bytes) -> Record:
    [record] = records(data)
    return record


def faults(data: bytes) -> list[str | None]:
    return [record.fault.code if record.fault else None for record in records(data)]


def refusal(data: bytes) -> str:
    with pytest.raises(InputError) as refused:
        CsvReader(Bytes(data)).header()
    return str(refused.value)


# Reading as the csv module does


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        (b"1,Ann\n", ["1", "Ann"]),
        (b"1,Ann\r\n", ["1", "Ann"]),
        (b"1,Ann\r", ["1", "Ann"]),
        (b"1,Ann", ["1", "Ann"]),
        (b"1,\n", ["1", ""]),
        (b'1,"Ann"\n', ["1", "Ann"]),
        (b'1,"Ann, of York"\n', ["1", "Ann, of York"]),
        (b'1,"Ann ""Ace"" Lee"\n', ["1", 'Ann "Ace" Lee']),
        (b'1,Ann "Ace" Lee\n', ["1", 'Ann "Ace" Lee']),
        (b'1,"Ann" Lee\n', ["1", "Ann Lee"]),
        (b'1,"two\nlines"\n', ["1", "two\nlines"]),
        (b'1,"two\r\nlines"\r\n', ["1", "two\r\nlines"]),
        (b'1,"two\rlines"\r', ["1", "two\rlines"]),
        (b'1, "Ann"\n', ["1", ' "Ann"']),
        ("1,Zoë\x0b\x1c\u2028\x85\n".encode(), ["1", "Zoë\x0b\x1c\u2028\x85"]),
    ],
)
def test_a_row_has_the_fields_that_the_csv_module_finds(row: bytes, fields: list[str]) -> None:
    record = only(b"id,name\n" + row)
    assert (record.line, texts_of(record), record.raw, record.fault) == (2, fields, row, None)


def test_blank_lines_make_no_row_but_count_as_lines_and_bytes() -> None:
    data = b"\n\nid,name\n\r\n1,Ann\n\n\n2,Bob\n\n"
    [chunk] = chunks(data)
    assert [(record.line, record.raw) for record in records_of(chunk)] == [
        (5, b"1,Ann\n"),
        (8, b"2,Bob\n"),
    ]
    assert (chunk.span.start_byte, chunk.span.end_byte) == (10, len(data) - 1)
    assert (chunk.span.first_line, chunk.span.next_line - 1) == (4, 8)


def test_a_quoted_empty_value_alone_is_a_row_and_not_a_blank_line() -> None:
    assert [texts_of(record) for record in records(b'name\n\n""\nAnn\n')] == [[""], ["Ann"]]


def test_lines_are_counted_through_values_of_several_lines() -> None:
    data = b'id,note\n1,"a\nb\r\nc"\n2,x\n3,"y\n"\n4,z\n'
    assert [record.line for record in records(data)] == [2, 5, 6, 8]
    assert chunks(data)[0].span.next_line == 9


def test_a_value_of_half_a_megabyte_is_accepted_under_the_csv_modules_own_limit() -> None:
    assert csv.field_size_limit() == 131072
    large = "x" * 500_000
    for row in (f"1,{large}\n", f'1,"{large}"\n', f'1,"{large[:250_000]}\n""{large[:250_000]}"\n'):
        record = only(b"id,name\n" + row.encode())
        assert record.fault is None
        assert record.values is not None
        assert len(record.values[1]) == 500_000 + 2 * row.count("\n") - 2
    assert csv.field_size_limit() == 131072


line_ends = st.sampled_from(["\n", "\r\n", "\r"])
texts = st.text(
    st.one_of(
        st.sampled_from('ab,"\r\n é\U0001f9b8'),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=8,
)
tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(texts, min_size=width, max_size=width), max_size=30)
)


def written(rows: list[list[str]], line_end: str, quoting: Literal[0, 1]) -> bytes:
    """CSV text; where quotes are optional, with the one line end for which csv.writer adds them."""
    if quoting == csv.QUOTE_MINIMAL and len(line_end) == 1:
        rows = [[re.sub("[\r\n]", line_end, value) for value in row] for row in rows]
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator=line_end, quoting=quoting).writerows(rows)
    return stream.getvalue().encode()


@given(tables, line_ends, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.integers(1, 50))
def test_tables_come_out_as_the_csv_module_reads_them_and_raw_bytes_add_up_to_the_input(
    table: list[list[str]], line_end: str, quoting: Literal[0, 1], block_bytes: int
) -> None:
    names = [f"column {place}" for place in range(len(table[0]) if table else 1)]
    body = written(table, line_end, quoting)
    source = Bytes(written([names], line_end, quoting) + body, block_bytes)
    found = all_records(CsvReader(source).parts(7, 64))
    expected = list(csv.reader(io.StringIO(body.decode(), newline="")))
    assert [texts_of(record) for record in found] == expected
    assert b"".join(record.raw for record in found) == body
    assert all(record.fault is None for record in found)


@given(st.lists(st.text('ab,"', max_size=6), max_size=4), line_ends)
def test_the_parser_for_large_values_does_what_the_csv_module_does(
    lines: list[str], line_end: str
) -> None:
    """Compared on what that parser is for: the lines of one row, complete or still open."""
    row: list[str] = []
    for line in lines:
        row.append(line + line_end)
        if not Grammar().parse(row)[1]:
            break
    if "".join(row).strip("\r\n"):
        assert Grammar().parse_large("".join(row)) == Grammar().parse(row)


# Anything at all, against a slow and simple model


class Expected(NamedTuple):
    line: int
    raw: bytes
    fields: list[str] | None
    code: str | None


def closed_row(lines: list[bytes]) -> list[str] | None:
    """The one row in these lines, or None when a further line would still belong to it."""
    found = list(csv.reader([*(line.decode() for line in lines), "sentinel"]))
    return found[0] if found[1:] == [["sentinel"]] else None


def expected_at(lines: list[bytes], at: int, limit_bytes: int) -> tuple[Expected, int]:
    if len(lines[at]) > limit_bytes:
        return Expected(at + 2, lines[at], None, "row_too_large"), at + 1
    for stop in range(at + 1, len(lines) + 1):
        raw = b"".join(lines[at:stop])
        if len(raw) > limit_bytes:
            break
        fields = closed_row(lines[at:stop])
        if fields is not None:
            return Expected(at + 2, raw, fields, None), stop
    return Expected(at + 2, lines[at], None, "unclosed_quote"), at + 1


def model(body: bytes, limit_bytes: int) -> list[Expected]:
    lines, found, at = body.splitlines(keepends=True), list[Expected](), 0
    while at < len(lines):
        expected, at = expected_at(lines, at, limit_bytes)
        if expected.fields != []:
            found.append(expected)
    return found


COUNTS = {"too_few_fields", "too_many_fields", "repeated_header"}


@settings(max_examples=500)
@given(st.text('ab,,""\r\n\né', max_size=60), st.integers(1, 40), st.integers(8, 30))
def test_any_text_gives_the_rows_of_the_model_wherever_the_blocks_are_cut(
    text: str, block_bytes: int, limit_bytes: int
) -> None:
    source = Bytes(b"x,y\n" + text.encode(), block_bytes)
    reader = CsvReader(source, max_record_bytes=limit_bytes)
    found = all_records(reader.parts(1000, MIB))
    expected = model(text.encode(), limit_bytes)
    assert [(record.line, record.raw) for record in found] == [(e.line, e.raw) for e in expected]
    for record, wanted in zip(found, expected, strict=True):
        code = record.fault.code if record.fault else None
        if wanted.code is None and len(wanted.fields or []) == 2:
            assert (texts_of(record), code) == (wanted.fields, None)
        else:
            assert record.values is None
            assert code == wanted.code or (wanted.code is None and code in COUNTS)


# Chunks


def test_a_chunk_ends_at_its_number_of_rows() -> None:
    data = b"id\n" + b"".join(b"%d\n" % number for number in range(5))
    found = chunks(data, max_rows=2)
    assert [(chunk.number, chunk.span.first_row, len(chunk.rows)) for chunk in found] == [
        (1, 1, 2),
        (2, 3, 2),
        (3, 5, 1),
    ]
    assert [(chunk.span.start_byte, chunk.span.end_byte) for chunk in found] == [
        (3, 7),
        (7, 11),
        (11, 13),
    ]
    assert [(chunk.span.first_line, chunk.span.next_line - 1) for chunk in found] == [
        (2, 3),
        (4, 5),
        (6, 6),
    ]


def test_a_chunk_ends_as_soon_as_its_bytes_are_reached_and_holds_at_least_one_row() -> None:
    data = b"id\n" + b"11\n" + b"2222222222\n" + b"33\n44\n55\n"
    found = chunks(data, max_bytes=6)
    assert [[texts_of(record) for record in records_of(chunk)] for chunk in found] == [
        [["11"], ["2222222222"]],
        [["33"], ["44"]],
        [["55"]],
    ]
    assert [len(chunk.rows) for chunk in chunks(data, max_bytes=1)] == [1] * 5


@pytest.mark.parametrize(("max_rows", "max_bytes"), [(0, 1), (1, 0)])
def test_a_chunk_limit_below_one_is_refused(max_rows: int, max_bytes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(CsvReader(Bytes(b"id\n1\n")).parts(max_rows, max_bytes))


noise = st.lists(
    st.sampled_from(
        [
            b"1,a\n",
            b"\r\n",
            b'2,"b\nc"\r\n',
            b'"open\n',
            b"3\n",
            b"\xff,d\n",
            b"x,y\n",
            b'""\r',
            b"e",
        ]
    ),
    max_size=40,
).map(b"".join)


@settings(max_examples=300)
@given(noise, st.integers(1, 5), st.integers(1, 40), st.integers(1, 30), st.integers(8, 30))
def test_a_restart_after_any_chunk_gives_the_chunks_of_an_uninterrupted_read(
    body: bytes, max_rows: int, max_bytes: int, block_bytes: int, limit_bytes: int
) -> None:
    source = Bytes(b"\xef\xbb\xbfx,y\n" + body, block_bytes)

    def read(start: Position | None = None) -> list[Part]:
        reader = CsvReader(source, max_record_bytes=limit_bytes)
        return list(reader.parts(max_rows, max_bytes, start))

    whole = read()
    for index, chunk in enumerate(whole):
        assert comparable(read(chunk.next)) == comparable(whole[index + 1 :])
        assert comparable(read(chunk.start)) == comparable(whole[index:])
    for one, following in pairwise(whole):
        assert (one.span.end_byte, one.span.next_line) == (
            following.span.start_byte,
            following.span.first_line,
        )


@given(noise, st.integers(1, 5))
def test_rows_do_not_depend_on_the_size_of_the_chunks(body: bytes, max_rows: int) -> None:
    data = b"x,y\n" + body
    one_by_one = all_records(chunks(data, max_rows))
    assert one_by_one == records(data)


# Faulty rows


def test_a_row_that_is_not_utf8_is_told_with_its_column_and_leaves_the_others_alone() -> None:
    data = b"id,name\n1,Ann\n2,Zo\xeb\n3,Bob\n"
    first, bad, last = records(data)
    assert (texts_of(first), texts_of(last)) == (["1", "Ann"], ["3", "Bob"])
    assert (bad.line, texts_of(bad), bad.raw) == (3, None, b"2,Zo\xeb\n")
    assert bad.fault is not None
    assert (bad.fault.code, bad.fault.column) == ("not_utf8", "name")
    assert "0xeb at position 4" in bad.fault.message


def test_bytes_that_are_not_utf8_behind_the_last_column_have_no_column() -> None:
    fault = only(b"id,name\n1,Ann,\xff\n").fault
    assert fault is not None
    assert (fault.code, fault.column) == ("not_utf8", None)


def test_a_row_that_is_not_utf8_keeps_its_quoted_line_ends() -> None:
    assert only(b'id,name\n1,"a\n\xff"\n').raw == b'1,"a\n\xff"\n'


def test_a_nul_byte_is_told_with_its_column() -> None:
    first, bad = records(b"id,name\n1,Ann\n2,B\0b\n")
    assert first.fault is None
    assert bad.fault is not None
    assert (bad.fault.code, bad.fault.column, bad.raw) == ("nul_byte", "name", b"2,B\0b\n")


@pytest.mark.parametrize(
    ("row", "code", "count"),
    [(b"1\n", "too_few_fields", 1), (b"1,Ann,x,y\n", "too_many_fields", 4)],
)
def test_a_wrong_number_of_fields_is_told_with_both_numbers(
    row: bytes, code: str, count: int
) -> None:
    good, bad = records(b"id,name\n0,Al\n" + row)
    assert good.fault is None
    assert bad.fault is not None
    assert bad.fault.code == code
    assert f"has {count} fields and the header 2" in bad.fault.message


def test_a_row_that_repeats_the_header_is_rejected_even_if_it_is_quoted_differently() -> None:
    assert faults(b'id,name\n1,Ann\nid,name\r\n"id","name"\nid,Name\n') == [
        None,
        "repeated_header",
        "repeated_header",
        None,
    ]


def test_a_quote_open_at_the_end_costs_only_the_line_that_opened_it() -> None:
    found = records(b'id,name\n1,"Ann\n2,Bob\n3,Cid\n')
    assert [(record.line, record.raw, texts_of(record)) for record in found] == [
        (2, b'1,"Ann\n', None),
        (3, b"2,Bob\n", ["2", "Bob"]),
        (4, b"3,Cid\n", ["3", "Cid"]),
    ]
    assert found[0].fault is not None
    assert (found[0].fault.code, found[0].fault.column) == ("unclosed_quote", "name")


def test_a_quote_that_closes_beyond_the_largest_row_costs_only_the_line_that_opened_it() -> None:
    rows = b"2,Bob\n" * (MAX_RECORD_BYTES // 6 + 1)
    found = records(b'id,name\n1,"Ann\n' + rows + b'3,Cid"\n')
    assert [record.line for record in found if record.fault] == [2]
    assert found[0].raw == b'1,"Ann\n'
    assert texts_of(found[-1]) == ["3", 'Cid"']
    assert len(found) == 1 + rows.count(b"\n") + 1


def test_a_row_of_several_lines_may_be_exactly_as_large_as_a_row_may_be() -> None:
    start, end = b'1,"', b'"\n'
    filling = b"line\n" * ((MAX_RECORD_BYTES - len(start) - len(end)) // 5)
    spare = b"x" * (MAX_RECORD_BYTES - len(start + filling + end))
    assert only(b"id,name\n" + start + filling + spare + end).fault is None
    first, *_ = records(b"id,name\n" + start + filling + spare + b"x" + end)
    assert first.fault is not None
    assert (first.fault.code, first.raw) == ("unclosed_quote", b'1,"line\n')


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_line_that_is_too_large_is_rejected_with_its_beginning_and_reading_goes_on(
    line_end: bytes,
) -> None:
    large = b"2," + b"x" * 3 * MIB + line_end
    data = b"id,name\n1,Ann" + line_end + large + b"3,Bob" + line_end
    first, bad, last = records(data)
    assert (texts_of(first), texts_of(last), last.line) == (["1", "Ann"], ["3", "Bob"], 4)
    assert (bad.line, texts_of(bad), bad.raw) == (3, None, large[:KEPT_BYTES])
    assert bad.fault is not None
    assert bad.fault.code == "row_too_large"
    assert f"{len(large)} bytes" in bad.fault.message
    assert "first 8192 bytes" in bad.fault.message
    assert [chunk.span.end_byte for chunk in chunks(data, max_bytes=4 * MIB)] == [len(data)]


def test_the_largest_line_is_accepted_and_one_byte_more_is_not() -> None:
    largest = b"1," + b"x" * (MAX_RECORD_BYTES - 3) + b"\n"
    assert len(largest) == MAX_RECORD_BYTES
    assert faults(b"id,name\n" + largest) == [None]
    assert faults(b"id,name\nx" + largest) == ["row_too_large"]


def test_an_open_quote_in_front_of_a_line_that_is_too_large_costs_only_its_own_line() -> None:
    data = b'id,name\n1,"Ann\n2,Bob\n' + b"x" * 2 * MIB + b'"\n3,Cid\n'
    assert faults(data) == ["unclosed_quote", None, "row_too_large", None]


class HugeLine:
    """A good row, one line of 300 MB made as it is read, and another good row."""

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        head = b"id,name\n1,Ann\n2,"[offset:]
        yield head
        filling = b"x" * (256 * 1024)
        for _ in range(1200):
            yield filling
        yield b"\r"
        yield b"\n3,Bob\r\n"


def test_memory_stays_bounded_while_a_huge_line_is_passed_over() -> None:
    tracemalloc.start()
    try:
        [chunk] = CsvReader(HugeLine()).parts(1000, MIB * 1000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [texts_of(record) for record in records_of(chunk)] == [["1", "Ann"], None, ["3", "Bob"]]
    assert chunk.span.end_byte == 16 + 1200 * 256 * 1024 + 9
    assert peak_bytes < 8 * MIB


class OpenQuotes:
    """Half a megabyte of lines that each leave a quote open."""

    lines = 8 * 8192

    def blocks(self, offset: int = 0) -> Iterator[bytes]:
        yield b"id,name\n"[offset:]
        for _ in range(8):
            yield b'a"bc,"d\n' * 8192


def test_rows_that_never_close_their_quotes_are_rejected_one_by_one_in_bounded_memory() -> None:
    tracemalloc.start()
    try:
        found = 0
        for chunk in CsvReader(OpenQuotes(), max_record_bytes=64 * 1024).parts(1000, MIB):
            assert {fault.code for fault in chunk.faults.values()} == {"unclosed_quote"}
            found += len(chunk.rows)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == OpenQuotes.lines
    assert peak_bytes < 16 * MIB


# Headers


def test_a_header_tells_its_names_bytes_and_lines() -> None:
    header = CsvReader(Bytes(b'id,"full\nname"\r\n1,Ann\n')).header()
    assert header == (["id", "full\nname"], b'id,"full\nname"\r\n', 16, 2)


def test_a_byte_order_mark_is_passed_over_but_counted() -> None:
    data = b'\xef\xbb\xbf"id",name\n1,Ann\n'
    header = CsvReader(Bytes(data, block_bytes=1)).header()
    assert header == (["id", "name"], b'"id",name\n', 13, 1)
    assert only(data) == (2, ["1", "Ann"], b"1,Ann\n", None)


@pytest.mark.parametrize("data", [b"id,name", b"id,name\n", b"id,name\r\n\r\n"])
def test_a_header_without_rows_gives_no_chunk(data: bytes) -> None:
    assert chunks(data) == []


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_another_unicode_encoding_is_named_with_the_remedy(encoding: str) -> None:
    message = refusal("\ufeffid,name\n1,Ann\n".encode(encoding))
    assert encoding[:6].upper() in message
    assert "UTF-8" in message


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"", ["no header", "add a line"]),
        (b"\xef\xbb\xbf", ["no header"]),
        (b"\n\r\n\n", ["no header", "blank lines"]),
        (b"id,,name\n", ["line 1", "no name for column 2"]),
        (b"\nid, \n", ["line 2", "no name for column 2"]),
        (b"id,name,age,name\n", ["line 1", "'name' twice", "columns 2 and 4"]),
        (b"id,Zo\xeb\n1,x\n", ["line 1", "not UTF-8 from its byte 5"]),
        ("id,name\n".encode("utf-16-le"), ["line 1", "NUL", "UTF-16"]),
        (b'id,"name\n1,x\n', ["line 1", "quote"]),
        (b"x" * (MAX_RECORD_BYTES + 1) + b"\n1\n", ["line 1", "bytes"]),
    ],
)
def test_an_unusable_header_is_refused_with_place_and_reason(data: bytes, parts: list[str]) -> None:
    message = refusal(data)
    assert [part for part in parts if part not in message] == []


def test_a_faulty_row_below_does_not_spoil_the_header() -> None:
    header = CsvReader(Bytes(b'id,name\n1,\xff\n2,"open\n')).header()
    assert header.columns == ["id", "name"]
