"""The grammar of the csv module, with one delimiter, and without its limit on a field's size."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_NO_DELIMITERS = '"\r\n\0'


def checked_delimiter(given: str) -> str:
    """The delimiter as it is; raises ValueError when the grammar cannot have it."""
    if len(given) != 1 or not given.isascii() or given in _NO_DELIMITERS:
        raise ValueError(f"{given!r} is no delimiter: one ASCII character, no quote or line end")
    return given


@dataclass(frozen=True)
class Grammar:
    """How lines of text become rows of fields."""

    delimiter: str = ","

    def rows(self, texts: Sequence[str]) -> list[list[str]] | None:
        """A row for each line; None when a row has several, or a field that csv finds too large."""
        if not texts:
            return []
        try:
            rows = list(csv.reader(texts, delimiter=self.delimiter))
        except csv.Error:
            return None
        if len(rows) != len(texts) or self.parse(texts[-1:])[1]:
            return None
        return rows

    def parse(self, texts: Sequence[str]) -> tuple[list[str], bool]:
        """The fields of the one row in these lines, and whether a quote is open at their end."""
        # the line added here is asked for only inside an open quote
        reader = csv.reader([*texts, ""], delimiter=self.delimiter)
        try:
            fields = next(reader)
        except csv.Error:
            return self.parse_large("".join(texts))
        return fields, reader.line_num > len(texts)

    def parse_large(self, text: str) -> tuple[list[str], bool]:
        """Do what the csv module does, without its process-wide limit on the size of a field."""
        fields: list[str] = []
        for found in self._field.finditer(text):
            if found["quoted"] is None:
                fields.append(found["bare"])
            else:
                fields.append(found["quoted"].replace('""', '"') + found["rest"])
                if not found["closing"]:
                    return fields, True
            if not found["delimiter"]:
                break
        return fields, False

    def raw_fields(self, raw: bytes) -> list[bytes]:
        """The fields of one row as they came, with their quotes."""
        return [found[1] for found in self._raw_field.finditer(raw.rstrip(b"\r\n"))]

    @cached_property
    def _field(self) -> re.Pattern[str]:
        one = re.escape(self.delimiter)
        return re.compile(
            r'(?:"(?P<quoted>[^"]*+(?:""[^"]*+)*+)(?P<closing>"?)(?P<rest>[^D\r\n]*)'
            r"|(?P<bare>[^D\r\n]*))(?P<delimiter>D?)".replace("D", one)
        )

    @cached_property
    def _raw_field(self) -> re.Pattern[bytes]:
        one = re.escape(self.delimiter).encode()
        return re.compile(rb'(?:^|D)("[^"]*+(?:""[^"]*+)*+(?:"[^D]*)?|[^D]*)'.replace(b"D", one))
