"""The errors of the job layer.

JobError
├── Rejected
│   └── InputError
├── TryLater
│   └── SourceAway
├── GivenBack
├── WrongResults
├── UnknownJob
├── DeclarationError
├── PayloadTooLarge
├── IdempotencyConflict
├── QueueFull
└── Unadoptable
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from db.ledger.parked import Reason
from db.ledger.verdict import RowVerdict

SOURCE_AWAY_DELAY = timedelta(seconds=30)


class JobError(Exception):
    """A job could not be declared, enqueued or carried out."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class Rejected(JobError):
    """The job cannot succeed as it was asked for; it fails and is not tried again.

    A job of one transaction, whose own verdicts are rolled back, hands over what became of its
    rows: `counts` by verdict, and the rows that need a look. They are written with its failure.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        counts: Mapping[str, int] | None = None,
        verdicts: Sequence[RowVerdict] = (),
    ) -> None:
        super().__init__(message)
        self.counts = counts
        self.verdicts = verdicts


class TryLater(JobError):
    """The job asks to be run again after a while; it costs no attempt."""

    def __init__(self, delay: timedelta, message: str | None = None) -> None:
        super().__init__(message)
        if not isinstance(delay, timedelta):
            raise TypeError(f"a job is put off by a timedelta, not by {delay!r}")
        self.delay = delay


class GivenBack(JobError):
    """The worker ends; the job goes on elsewhere behind what it has committed."""


class SourceAway(TryLater):
    """The store that holds the input does not answer."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(SOURCE_AWAY_DELAY, message)


class InputError(Rejected):
    """The input as a whole cannot be used."""


class WrongResults(JobError):
    """A batch form returned another number of results than it was given orders."""


class UnknownJob(JobError):
    """No job of this name is registered."""


class DeclarationError(JobError):
    """A job is not declared as one payload class and one async function."""


class PayloadTooLarge(JobError):
    """The payload is larger than a job row may carry; put the rows in a file."""


class IdempotencyConflict(JobError):
    """The idempotency key was used before with another payload."""


class QueueFull(JobError):
    """As many jobs wait in the queue as may; none of these was accepted."""


class Unadoptable(JobError):
    """No job can be made of a message that came through arq."""

    def __init__(self, reason: Reason, kind: str | None = None) -> None:
        super().__init__(f"no job can be made of the message: {reason}")
        self.reason = reason
        self.kind = kind
