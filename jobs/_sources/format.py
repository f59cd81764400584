"""What an input is: its format, its encoding, and what separates its fields."""

import codecs
import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict

from jobs._errors import InputError
from jobs._sources.encoding import UTF8, encoding_name
from jobs._sources.grammar import checked_delimiter
from jobs._sources.parquet import MAGIC
from jobs._sources.source import Text, read_fully

Format = Literal["csv", "tsv", "ndjson", "parquet"]

_PACKED: Final = (".gz", ".zst")
_SUFFIXES: Final[Mapping[str, Format]] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".parquet": "parquet",
}
_OBJECT: Final = re.compile(rb'\{\s*"')
_ARRAY: Final = re.compile(rb'\[\s*[\[{"]')
ARRAY: Final = (
    "The input is a JSON array, and its rows must stand a line each; make one object a line of it,"
    " as `jq -c '.[]'` does, and import that as NDJSON."
)
_DELIMITERS: Final[Mapping[str, str]] = {"csv": ",", "tsv": "\t"}


class Shape(BaseModel):
    """What is declared about an input; what is not is recognised, or is what is usual."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Format | None = None
    encoding: Annotated[str, AfterValidator(encoding_name)] = UTF8
    delimiter: Annotated[str, AfterValidator(checked_delimiter)] | None = None


class Layout(BaseModel):
    """What an input is, with nothing left to recognise; `delimiter` is None where it has none."""

    model_config = ConfigDict(frozen=True)
    format: Format
    encoding: str
    delimiter: str | None


def layout_of(text: Text, name: str, declared: Shape) -> Layout:
    """Find out what is not declared, from the name and the first bytes, and check what is.

    Raises InputError when the content, or a further option, contradicts the format.
    """
    found = declared.format or _by_name(name)
    head = read_fully(text.stored, 0, len(MAGIC))
    if found is None:
        found = "parquet" if head == MAGIC else "csv"
    if found == "parquet":
        _require_parquet(text, head)
    elif head == MAGIC:
        raise _contradiction(found, "it is Parquet", "parquet")
    else:
        _require_no_other_json(found, first_bytes(text))
    _require_fitting(found, declared)
    return Layout(
        format=found,
        encoding=declared.encoding,
        delimiter=declared.delimiter or _DELIMITERS.get(found),
    )


def _by_name(name: str) -> Format | None:
    lowered = name.lower()
    for packed in _PACKED:
        lowered = lowered.removesuffix(packed)
    return next((known for end, known in _SUFFIXES.items() if lowered.endswith(end)), None)


def _require_parquet(text: Text, head: bytes) -> None:
    if text.compression != "none":
        raise InputError(
            f"The input is Parquet packed with {text.compression}, which cannot be read in place of"
            " its own compression; unpack it."
        )
    if head != MAGIC:
        raise InputError(
            "The input is no Parquet: it does not begin with PAR1; declare its format with"
            f" --format {'|'.join(get_args(Format))}."
        )


def _require_no_other_json(found: Format, first: bytes) -> None:
    """Of NDJSON a line may be an array, which is then one bad row."""
    whole_line = first.split(b"\n", 1)[0].rstrip().endswith(b"]")
    if begins_with_array(first) and not (found == "ndjson" and whole_line):
        raise InputError(ARRAY)
    if found != "ndjson" and begins_with_object(first):
        raise _contradiction(found, "it begins with an object of JSON", "ndjson")


def begins_with_object(text: bytes) -> bool:
    """Whether it can only be meant as JSON."""
    return _OBJECT.match(text) is not None


def begins_with_array(text: bytes) -> bool:
    """Whether it can only be meant as JSON."""
    return _ARRAY.match(text) is not None


def first_bytes(text: Text) -> bytes:
    """The first block of the text, without a mark and blanks in front."""
    return next(text.blocks(), b"").removeprefix(codecs.BOM_UTF8).lstrip()


def _require_fitting(found: Format, declared: Shape) -> None:
    if declared.delimiter is not None and found not in _DELIMITERS:
        raise InputError(f"{found} has no delimiter; leave --delimiter out.")
    if declared.encoding != UTF8 and found == "parquet":
        raise InputError("Parquet has no encoding to declare; leave --encoding out.")


def _contradiction(found: str, what: str, instead: str) -> InputError:
    return InputError(
        f"The input is taken for {found.upper()}, but {what}; declare it with --format {instead}."
    )
