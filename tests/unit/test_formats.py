"""What an input is: told by its name and first bytes, declared, or contradicted in one sentence."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from pydantic import ValidationError

from jobs._errors import InputError
from jobs._sources.csv import CsvReader
from jobs._sources.format import Layout, Shape
from jobs._sources.opened import Opened
from jobs._sources.source import Text
from tests.gzipped import gzipped
from tests.parts import Bytes, StoredBytes, all_records

CSV = b"name,age\nAnn,1\n"
NDJSON = b'{"name":"Ann"}\n'


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"name": ["Ann"]}), out)
    return out.getvalue()


def opened(stored: bytes, name: str, declared: Shape) -> Opened:
    text = Text.of(StoredBytes(stored), declared.encoding)
    return Opened.recognised(text, name, declared)


def layout(stored: bytes, name: str = "rows", **declared: str) -> Layout:
    return opened(stored, name, Shape.model_validate(declared)).layout


def refusal(stored: bytes, name: str = "rows", **declared: str) -> str:
    with pytest.raises(InputError) as refused:
        assert opened(stored, name, Shape.model_validate(declared)).inspection
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "stored", "found"),
    [
        ("rows.csv", CSV, "csv"),
        ("rows.CSV.GZ", gzipped(CSV), "csv"),
        ("rows.tsv.zst", zstd.compress(CSV), "tsv"),
        ("rows.ndjson", NDJSON, "ndjson"),
        ("rows.jsonl.gz", gzipped(NDJSON), "ndjson"),
        ("rows.parquet", parquet(), "parquet"),
        ("rows.txt", CSV, "csv"),
        ("rows", parquet(), "parquet"),
        ("csv", CSV, "csv"),
    ],
)
def test_the_format_is_told_by_the_name_and_otherwise_by_the_first_bytes(
    name: str, stored: bytes, found: str
) -> None:
    assert layout(stored, name).format == found


def test_what_is_declared_stands_above_the_name() -> None:
    assert layout(NDJSON, "rows.csv", format="ndjson").format == "ndjson"
    assert layout(CSV, "rows.ndjson", format="csv", delimiter=";").delimiter == ";"


@pytest.mark.parametrize(("name", "delimiter"), [("r.csv", ","), ("r.tsv", "\t")])
def test_the_delimiter_is_that_of_the_format(name: str, delimiter: str) -> None:
    assert layout(CSV, name).delimiter == delimiter


@pytest.mark.parametrize(
    ("name", "stored", "words"),
    [
        (
            "rows.csv",
            parquet(),
            "taken for CSV, but it is Parquet; declare it with --format parquet",
        ),
        ("rows.ndjson", parquet(), "taken for NDJSON, but it is Parquet"),
        ("rows.csv", b"\xef\xbb\xbf\n" + NDJSON, "object of JSON; declare it with --format ndjson"),
        ("rows.tsv.gz", gzipped(NDJSON), "object of JSON; declare it with --format ndjson"),
        ("rows.parquet", CSV, "does not begin with PAR1; declare its format"),
        ("rows.parquet.gz", gzipped(parquet()), "Parquet packed with gzip"),
        ("rows.json", b'\n{ "name": "Ann"}', "object of JSON; declare it with --format ndjson"),
        ("rows.json", b'{\n\t"name": "Ann"\n}', "object of JSON; declare it with --format ndjson"),
        ("rows.json", b'[{"name":"Ann"}]', "is a JSON array"),
        ("rows.csv", b'\xef\xbb\xbf[\n  {"name":"Ann"}\n]', "as `jq -c '.[]'` does"),
        ("rows.tsv", b'[["name"], ["Ann"]]', "is a JSON array"),
        ("rows.ndjson", b'[\n{"name":"Ann"},\n]', "is a JSON array"),
        ("rows.ndjson", b'[\n{"name":"Ann"},\n{"name":"Bob"}\n]', "is a JSON array"),
        ("rows.ndjson", b'[{"name":"Ann"},\n {"name":"Bob"}]', "is a JSON array"),
        ("rows.ndjson", b'[{"name":"Ann"}]', "is a JSON array"),
        ("rows.ndjson", CSV, "Line 1: The line is no JSON at its character 1"),
        ("rows.ndjson", b'{\n  "name": "Ann"\n}', "Line 1: The line is no JSON at its character 2"),
        ("rows.ndjson", b'\n{"n": 1' + b"0" * 10_000 + b"}", "Line 2: A number has more digits"),
        ("rows.ndjson", b'{"n": "\\u0000"}', "Line 1: The value holds \\u0000"),
        ("rows.ndjson", b'{"n": "\\ud800"}', "Line 1: The value holds half of a surrogate pair"),
        ("rows.ndjson", b'{"n": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested too deeply"),
        ("rows.ndjson", b"\n\n", "only blank lines or nothing"),
        ("rows.ndjson", b"{}\n", "Line 1: The object has no keys"),
        ("rows.ndjson", b"", "empty (0 bytes)"),
    ],
)
def test_a_content_that_contradicts_the_format_is_refused_with_the_remedy(
    name: str, stored: bytes, words: str
) -> None:
    assert words in refusal(stored, name)


def test_a_line_of_ndjson_that_is_an_array_is_one_bad_row_and_no_array_of_rows() -> None:
    assert layout(b'[1]\n{"name":"Ann"}\n', "rows.ndjson").format == "ndjson"
    assert opened(b'["a"]\n{"name":"Ann"}\n', "rows.ndjson", Shape()).inspection.columns == ["name"]


def test_a_header_with_brackets_or_braces_is_no_json() -> None:
    assert layout(b"[id],[name]\n1,Ann\n", "rows.csv").format == "csv"
    assert layout(b"{id},{name}\n1,Ann\n", "rows.csv").format == "csv"


def test_the_keys_behind_a_mark_count() -> None:
    stored = b'\xef\xbb\xbf{"name":"Ann","age":1}\n{"name":"Bob"}\n'
    assert opened(stored, "rows.ndjson", Shape()).reader.columns == ["name", "age"]


def test_the_beginning_of_ndjson_has_its_own_keys_and_reads_no_further() -> None:
    stored = b"".join(b'{"k%d":1}\n' % number for number in range(9)) + b"\xff"
    source = opened(stored, "rows.ndjson", Shape())
    columns, parts = source.beginning(3, 1000)
    assert columns == ["k0", "k1", "k2"]
    assert [len(part.rows) for part in parts] == [3, 3, 3, 1]
    assert "inspection" not in vars(source)


def test_an_option_that_the_format_has_no_use_for_is_refused() -> None:
    assert "leave --delimiter out" in refusal(NDJSON, "rows.ndjson", delimiter=";")
    assert "leave --encoding out" in refusal(parquet(), "rows.parquet", encoding="cp1252")


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n", "é", "\0"])
def test_what_cannot_separate_fields_is_no_delimiter(delimiter: str) -> None:
    with pytest.raises(ValidationError, match="is no delimiter"):
        Shape(delimiter=delimiter)


@pytest.mark.parametrize("delimiter", ["\t", ";", "|", "^", "]", "\\", "-", " ", "\x01"])
def test_any_delimiter_has_the_grammar_of_the_csv_module(delimiter: str) -> None:
    rows = [["a", f"b{delimiter}c", 'd"e', "f\ng"], ["", "x" * 200_000, f'{delimiter}"', "1"]]
    lines = [delimiter.join('"' + value.replace('"', '""') + '"' for value in row) for row in rows]
    data = "\n".join([delimiter.join("klmn"), *lines]).encode()
    found = all_records(CsvReader(Bytes(data, 50), delimiter).parts(10, 1_000_000))
    assert [[value or "" for value in record.values or ()] for record in found] == rows


def test_too_many_fields_are_told_with_the_sign_that_separates_them() -> None:
    [record] = all_records(CsvReader(Bytes(b"a\tb\n1\t2\t3\n"), "\t").parts(10, 1000))
    assert record.fault is not None
    assert "quote a value that holds a tab" in record.fault.message


def test_bytes_without_a_character_reject_their_row_with_byte_place_and_column() -> None:
    declared = Shape(encoding="cp1252")
    stored = "name,note\nZoë,x\nAnn,".encode("cp1252") + b"\xeb\x81\nBob,y\n"
    first, bad, last = all_records(
        opened(stored, "r.csv", declared).reader.parts(
            10, 1000, opened(stored, "r.csv", declared).reader.start()
        )
    )
    assert (first.values, last.values) == (["Zoë", "x"], ["Bob", "y"])
    assert bad.fault is not None
    assert (bad.line, bad.fault.code, bad.fault.column) == (3, "not_decoded", "note")
    assert "Byte 0x81 at character 5 of the row is not cp1252" in bad.fault.message
