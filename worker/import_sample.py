"""The first rows of an input, and how it is written, guessed as far as nobody has said it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from db.ledger.chunk import Span
from jobs._part import Part
from jobs._sources.format import Shape, begins_with_object, layout_of
from jobs._sources.parquet import MAGIC
from jobs._sources.place import ImportPlace
from jobs._sources.source import Text, read_fully
from jobs._text_guess import Guess, decoded, guess_delimiter, guess_encoding
from worker.import_command import Import

SAMPLE_ROWS: Final = 1000
SAMPLE_BYTES: Final = 4 * 1024 * 1024
HEAD_BYTES: Final = 256 * 1024
_FURTHER_KEYS: Final = (
    "only the keys of the first rows are known: add --ignore-unknown to leave out any other key"
)
NOTHING_DECLARED: Final = Shape()
_NO_ROWS: Final = Part(1, Span(1, 0, 0, 0, 1, 1), (), (), (), {})


@dataclass(frozen=True)
class Sample:
    """The first rows; `shape` is what was declared of `form` or, where nothing was, guessed."""

    columns: list[str]
    part: Part
    form: Mapping[str, Any]
    shape: Shape
    doubts: Sequence[str]


def read_sample(asked: Import, places: Sequence[ImportPlace]) -> Sample:
    """Read the first rows. Raises InputError when the input cannot be read so far."""
    with asked.open(places) as stored:
        declared, doubts = _declared(Text.of(stored), stored.name, asked.declared)
        opened = replace(asked, declared=declared).recognised(stored)
        columns, parts = opened.beginning(SAMPLE_ROWS, SAMPLE_BYTES)
        part = next(parts, _NO_ROWS)
        if opened.layout.format == "ndjson" and next(parts, None) is not None:
            doubts.append(_FURTHER_KEYS)
        form = {**opened.layout.model_dump(), "compression": opened.text.compression}
        return Sample(columns, part, form, declared, doubts)


def _declared(text: Text, name: str, given: Shape) -> tuple[Shape, list[str]]:
    """What was declared, with what was guessed for the rest, and what remains in doubt."""
    if read_fully(text.stored, 0, len(MAGIC)) == MAGIC:
        return given, []
    head = _head(text)
    said = "encoding" in given.model_fields_set
    encoding = Guess(given.encoding) if said else guess_encoding(head)
    beginning = decoded(head, encoding.value)
    shape = given.model_copy(update={"encoding": encoding.value})
    if (
        given.format is None
        and begins_with_object(beginning.lstrip().encode(errors="replace"))
        and not _is_ndjson(name)
    ):
        shape = shape.model_copy(update={"format": "ndjson"})
    usual = layout_of(replace(text, encoding=encoding.value), name, shape).delimiter
    delimiter = Guess("")
    if usual is not None and given.delimiter is None:
        delimiter = guess_delimiter(beginning, usual)
        if delimiter.value != usual:
            shape = shape.model_copy(update={"delimiter": delimiter.value})
    return shape, [doubt for doubt in (encoding.doubt, delimiter.doubt) if doubt]


def _head(text: Text) -> bytes:
    """The first bytes of the text, whatever its encoding."""
    head = b""
    for block in text.blocks():
        head += block
        if len(head) >= HEAD_BYTES:
            break
    return head[:HEAD_BYTES]


def _is_ndjson(name: str) -> bool:
    return not {".ndjson", ".jsonl"}.isdisjoint(Path(name.lower()).suffixes)


def shape_words(shape: Shape, known: Shape = NOTHING_DECLARED) -> list[str]:
    """The options that declare the shape, but for what is known."""
    words: list[str] = []
    for name in ("format", "encoding", "delimiter"):
        value = getattr(shape, name)
        if value is not None and value != getattr(known, name):
            words += [f"--{name}", value.replace("\t", "\\t")]
    return words
