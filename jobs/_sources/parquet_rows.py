"""Columns of Parquet as rows of Python values, and why those that cannot be are refused."""

import json
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from db.refusal import Refusal
from jobs._part import Values
from jobs._sources.csv import MAX_RECORD_BYTES
from jobs._sources.lines import KEPT_BYTES

if TYPE_CHECKING:
    import pyarrow as pa


def rows_of(batch: "pa.RecordBatch") -> tuple[list[Values], dict[int, Refusal]]:
    """The rows as Python values, and why those that cannot be are none."""
    faults: dict[int, Refusal] = {}
    columns = [
        _values(name, column, faults)
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    rows: list[Values] = list(zip(*columns, strict=True))
    if batch.nbytes > MAX_RECORD_BYTES:
        _refuse_large(rows, faults)
    return rows, faults


def _values(name: str, column: "pa.Array", faults: dict[int, Refusal]) -> list[Any]:
    column = _in_python_units(column)
    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError):
        values = [_value(name, column, index, faults) for index in range(len(column))]
    if _holds_map(column.type):
        values = [_with_text_keys(value) for value in values]
    if _holds_nul(column, values):
        for index, value in enumerate(values):
            if value is not None and "\0" in value:
                message = "The value holds a NUL, which a PostgreSQL text cannot hold; remove it."
                faults.setdefault(index, Refusal("nul_byte", message, name))
    return values


def _in_python_units(column: "pa.Array") -> "pa.Array":
    """Times to the microsecond, which is what Python and PostgreSQL have, and instants in UTC."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_timestamp(kind):
        unit = "us" if kind.unit == "ns" else kind.unit
        return column.cast(pa.timestamp(unit, tz=kind.tz and "UTC"), safe=False)
    if pa.types.is_time64(kind):
        return column.cast(pa.time64("us"), safe=False)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pa.duration("us"), safe=False)
    return column.cast(pa.float32()) if pa.types.is_float16(kind) else column


def _value(name: str, column: "pa.Array", index: int, faults: dict[int, Refusal]) -> Any:
    try:
        return column[index].as_py(maps_as_pydicts="strict")
    except UnicodeDecodeError:
        message = "The text is not UTF-8, as Parquet has it; mend it or make the column binary."
        faults.setdefault(index, Refusal("not_utf8", message, name))
    except (ValueError, OverflowError, KeyError) as error:
        message = f"The value cannot be read ({first_line(error)}); mend it."
        faults.setdefault(index, Refusal("unreadable", message, name))
    return None


def _holds_map(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    inner = (kind.field(n).type for n in range(kind.num_fields))
    return bool(pa.types.is_map(kind)) or any(_holds_map(one) for one in inner)


def _with_text_keys(value: Any) -> Any:
    """Maps with the keys that JSON has: those of others as the text that stands for them."""
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) else str(_json_value(key)): _with_text_keys(inner)
            for key, inner in value.items()
        }
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _holds_nul(column: "pa.Array", values: list[Any]) -> bool:
    import pyarrow as pa

    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text and "\0" in "".join(filter(None, values))


def _refuse_large(rows: list[Values], faults: dict[int, Refusal]) -> None:
    """Refuse rows that are larger than a row of any format may be, and keep their beginnings."""
    for index, values in enumerate(rows):
        size = sum(len(value) for value in values if isinstance(value, (str, bytes)))
        if size > MAX_RECORD_BYTES:
            message = (
                f"The row has {size} characters and at most {MAX_RECORD_BYTES} are allowed; shorten"
                f" it (only the first {KEPT_BYTES} of each value are kept here)."
            )
            faults[index] = Refusal("row_too_large", message)
            rows[index] = [
                value[:KEPT_BYTES] if isinstance(value, (str, bytes)) else value for value in values
            ]


class AsJson(Sequence[bytes]):
    """Rows as lines of NDJSON, made only of those that somebody asks for."""

    def __init__(self, columns: list[str], rows: Sequence[Values]) -> None:
        self._columns = columns
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        row = dict(zip(self._columns, self._rows[index], strict=True))
        return json.dumps(row, ensure_ascii=False, default=_json_value).encode()


def _json_value(value: Any) -> Any:
    """A value that JSON does not have, as the text that a Create class takes in its place."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def first_line(error: Exception) -> str:
    """What the library says, ready to stand within a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
