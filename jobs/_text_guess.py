"""Guessing how a text with columns is written: its encoding, and what separates the values."""

import codecs
import csv
import io
from collections import Counter
from typing import Final, NamedTuple

UTF8: Final = "utf-8"
DELIMITERS: Final = (",", "\t", ";", "|")
_MARKS: Final = {
    codecs.BOM_UTF8: UTF8,
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LEAST_ZEROS: Final = 0.25
_LOOKED_AT_ROWS: Final = 200


class Guess(NamedTuple):
    """What was guessed, and what it could be as well."""

    value: str
    doubt: str | None = None


def guess_encoding(head: bytes) -> Guess:
    """Tell from the first bytes, which may end within a character."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return Guess(name)
    if _is(head, UTF8) and b"\0" not in head:
        return Guess(UTF8)
    big, little = (head[start::2].count(0) > _LEAST_ZEROS * len(head) for start in (0, 1))
    if big != little:
        return Guess("utf-16-be" if big else "utf-16-le")
    if _is(head, UTF8):
        return Guess(UTF8)
    name = "cp1252" if _is(head, "cp1252") else "latin-1"
    return Guess(name, f"the text is not UTF-8, and {name} is only likely: look at its accents")


def _is(head: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def decoded(head: bytes, encoding: str) -> str:
    """The text without its mark; what cannot be read, at its end or within, does not matter."""
    return codecs.getincrementaldecoder(encoding)("replace").decode(head).removeprefix("\ufeff")


def guess_delimiter(text: str, usual: str) -> Guess:
    """What cuts most rows into as many values as the header; the usual, if nothing does better."""
    ranks = {one: _rank(text, one) for one in DELIMITERS}
    best = max(ranks.values())
    equal = [one for one in DELIMITERS if ranks[one] == best]
    if best == _NOT_CUT or equal == [usual]:
        return Guess(usual)
    chosen = usual if usual in equal else equal[0]
    others = " or ".join(repr(one) for one in equal if one != chosen)
    return Guess(
        chosen, f"{others} could separate the values as well as {chosen!r}" if others else None
    )


_NOT_CUT: Final = (0.0, 1)


def _rank(text: str, delimiter: str) -> tuple[float, int]:
    """The share of rows that are as wide as the header, and how wide that is."""
    lines = text.splitlines(keepends=True)
    whole = "".join(lines[:-1] if len(lines) > 1 else lines)
    try:
        rows = [row for row in csv.reader(io.StringIO(whole), delimiter=delimiter) if row]
    except csv.Error:
        return _NOT_CUT
    widths = Counter(map(len, rows[:_LOOKED_AT_ROWS]))
    width = len(rows[0]) if rows else 1
    return (widths[width] / widths.total(), width) if width > 1 else _NOT_CUT
