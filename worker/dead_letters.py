"""What the commands on failed jobs have in common: which are meant, and since when."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

from typer import Option

from db.ledger.dead_letter import Choice
from db.ledger.job import Reason
from worker.exit_codes import BadInput

Kind = Annotated[str | None, Option("--kind", metavar="KIND", help="Only jobs of this kind.")]
WhyFailed = Annotated[
    Reason | None, Option("--reason", help="Only jobs that failed for this reason.")
]
OfQueue = Annotated[str | None, Option("--queue", help="Only jobs of this queue.")]
Since = Annotated[
    str | None,
    Option(
        "--since",
        metavar="TIME",
        help="Only jobs that failed since then: '90m', '6h', '2d', or an ISO time with its zone.",
    ),
]
_AGO = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which failed jobs a command was asked for."""

    kind: str | None
    reason: Reason | None
    queue: str | None
    since: str | None

    @property
    def choice(self) -> Choice:
        """As the ledger takes it. Raises BadInput."""
        return Choice(self.kind, self.reason, self.queue, _instant(self.since))


def _instant(text: str | None) -> datetime | None:
    """The time of --since, in UTC. Raises BadInput."""
    if text is None:
        return None
    try:
        at = _ago(text.strip()) or datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return at.astimezone(UTC)
    except OverflowError:
        raise BadInput(f"--since {text!r} is outside the years 1 to 9999.") from None
    except ValueError:
        pass
    raise BadInput(
        f"--since {text!r} is neither a time ago, such as 6h, nor an ISO time with its zone, "
        "such as 2030-12-31T23:00:00Z."
    )


def _ago(text: str) -> datetime | None:
    if (ago := _AGO.fullmatch(text)) is None:
        return None
    count, unit = ago.groups()
    return datetime.now(UTC) - timedelta(**{_UNITS[unit]: int(count)})
