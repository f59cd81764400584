"""Rows of a table as a piece of an archive: NDJSON or Parquet, packed with zstd.

Integers and booleans are what they are; every other value is the text that PostgreSQL writes, from
which it reads exactly the same value.
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from backports import zstd

from db.catalog import TableFacts
from jobs._errors import InputError

ArchiveFormat = Literal["ndjson", "parquet"]
SUFFIXES: Final[Mapping[str, str]] = {"ndjson": ".ndjson.zst", "parquet": ".parquet"}
Texts = Mapping[str, Sequence[str | None]]
"""The values of rows by column, each as PostgreSQL writes it."""

_LEVEL: Final = 3
_INTEGERS: Final = ("smallint", "integer", "bigint")


def encode(texts: Texts, facts: TableFacts, form: ArchiveFormat) -> bytes:
    """Write rows out; it takes its time, and belongs in a thread."""
    columns = {name: _typed(values, facts.types[name]) for name, values in texts.items()}
    if form == "parquet":
        return _parquet(columns, facts)
    rows = zip(*columns.values(), strict=True)
    lines = (_line(dict(zip(columns, row, strict=True))) for row in rows)
    return zstd.compress("".join(lines).encode(), _LEVEL)


def decode(data: bytes, form: ArchiveFormat) -> dict[str, list[str | None]]:
    """Read rows back. Raises InputError for what `encode` has not written."""
    try:
        columns = _read_parquet(data) if form == "parquet" else _read_lines(data)
    except (zstd.ZstdError, ValueError, TypeError, LookupError, OSError) as error:
        raise InputError(f"The archive cannot be read as {form}: {error}") from None
    return {name: [_text(value) for value in values] for name, values in columns.items()}


def _typed(values: Sequence[str | None], type_: str) -> Sequence[Any]:
    if type_ in _INTEGERS:
        return [None if value is None else int(value) for value in values]
    if type_ == "boolean":
        return [None if value is None else value == "true" for value in values]
    return values


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def _read_lines(data: bytes) -> dict[str, list[Any]]:
    rows = [json.loads(line) for line in zstd.decompress(data).decode().split("\n") if line]
    names = list(rows[0]) if rows else []
    return {name: [row[name] for row in rows] for name in names}


def _parquet(columns: Mapping[str, Sequence[Any]], facts: TableFacts) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    def arrow_type(name: str) -> Any:
        if facts.types[name] in _INTEGERS:
            return pa.int64()
        return pa.bool_() if facts.types[name] == "boolean" else pa.large_string()

    arrays = [pa.array(values, arrow_type(name)) for name, values in columns.items()]
    out = io.BytesIO()
    parquet.write_table(pa.table(arrays, names=list(columns)), out, compression="zstd")
    return out.getvalue()


def _read_parquet(data: bytes) -> dict[str, list[Any]]:
    from pyarrow import parquet

    found: dict[str, list[Any]] = parquet.read_table(io.BytesIO(data)).to_pydict()
    return found
