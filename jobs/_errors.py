"""The errors of the job layer.

JobError
├── Rejected
├── TryLater
├── InputError
├── UnknownJob
├── DeclarationError
├── PayloadTooLarge
└── IdempotencyConflict
"""

from datetime import timedelta


class JobError(Exception):
    """A job could not be declared, enqueued or carried out."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class Rejected(JobError):
    """The job cannot succeed as it was asked for; it fails and is not tried again."""


class TryLater(JobError):
    """The job asks to be run again after a while; it costs no attempt."""

    def __init__(self, delay: timedelta, message: str | None = None) -> None:
        super().__init__(message)
        self.delay = delay


class InputError(Rejected):
    """The input as a whole cannot be used."""


class UnknownJob(JobError):
    """No job of this name is registered."""


class DeclarationError(JobError):
    """A job is not declared as one payload class and one async function."""


class PayloadTooLarge(JobError):
    """The payload is larger than a job row may carry; put the rows in a file."""


class IdempotencyConflict(JobError):
    """The idempotency key was used before with another payload."""
