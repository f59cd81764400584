"""The heroes of the demo: mostly good rows, some bad ones, and what must become of each."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TEAMS = 500
HEADER = "external_id,name,age,email,team\n"
_BAD_EVERY = 100
_FIRST_BAD = 37
_BLOCK_ROWS = 10_000

_FIRST_NAMES = ("Ada", "Bjørn", "Chloé", "Dmitri", "Esperança", "Fatima", "Gökhan", "Hana")
_LAST_NAMES = ("Ironside", "Quick", "Nightingale", "O'Shea", "Stormwind", "Þórsdóttir", "Zhou")


@dataclass(frozen=True)
class Row:
    """One hero as five fields of the file."""

    external_id: str
    name: str
    age: str
    email: str
    team: str

    def text(self) -> bytes:
        return ",".join(vars(self).values()).encode() + b"\n"

    def spoilt(self, **changed: str) -> bytes:
        return Row(**{**vars(self), **changed}).text()


@dataclass(frozen=True)
class Fault:
    """A way to spoil a row, and the code and column that its reject must have."""

    code: str
    column: str | None
    spoil: Callable[[Row], bytes]


FAULTS = (
    Fault("invalid", "age", lambda row: row.spoilt(age="unknown")),
    Fault("invalid", "age", lambda row: row.spoilt(age="-5")),
    Fault("invalid", "name", lambda row: row.spoilt(name="")),
    Fault("invalid", "email", lambda row: row.spoilt(email="nobody at home")),
    Fault("missing_reference", "team", lambda row: row.spoilt(team="The Unheard-of")),
    Fault("unique_violation", "external_id", lambda row: row.spoilt(external_id=external_id(0))),
    Fault("too_few_fields", None, lambda row: row.text().replace(b",", b" ", 1)),
    Fault("not_utf8", "name", lambda row: row.text().replace(row.name.encode(), b"Jos\xe9")),
)


@dataclass
class Expected:
    """What must be in the table and in the ledger when the import has ended."""

    inserted: int = 0
    ages_sum: int = 0
    rejected: Counter[tuple[str, str | None]] = field(default_factory=Counter)


def team_name(number: int) -> str:
    return f"Team {number:03}"


def external_id(number: int) -> str:
    return f"H{number:07}"


def write_heroes(path: Path, rows: int) -> Expected:
    """Write the file, the same one every time, and say what must become of it."""
    expected = Expected()
    with path.open("wb") as out:
        out.write(HEADER.encode())
        for first in range(0, rows, _BLOCK_ROWS):
            last = min(rows, first + _BLOCK_ROWS)
            out.write(b"".join(_lines(range(first, last), expected)))
    return expected


def _lines(numbers: range, expected: Expected) -> Iterator[bytes]:
    for number in numbers:
        row = _row(number)
        if number % _BAD_EVERY != _FIRST_BAD:
            expected.inserted += 1
            expected.ages_sum += int(row.age)
            yield row.text()
        else:
            fault = FAULTS[number // _BAD_EVERY % len(FAULTS)]
            expected.rejected[fault.code, fault.column] += 1
            yield fault.spoil(row)


def _row(number: int) -> Row:
    first = _FIRST_NAMES[number % len(_FIRST_NAMES)]
    last = _LAST_NAMES[number // 3 % len(_LAST_NAMES)]
    return Row(
        external_id=external_id(number),
        name=f"{first} {last}",
        age=str(16 + number % 50),
        email=f"hero{number}@example.org",
        team=team_name(number * 7 % TEAMS),
    )
