"""The errors of the database layer.

BulwarkError
├── NestedTransaction
├── EndsOutside
├── CommitUnknown
├── AlreadyCommitted
├── Race
├── ClaimLost
├── Cancelled
├── QueueTooDeep
├── NotAtHead
├── BadKey
├── SealsBroken
└── ModelError
    └── UnknownModel
"""

from typing import Any


class BulwarkError(Exception):
    """Something went wrong in Bulwark."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip().splitlines()[0])


class NestedTransaction(BulwarkError):
    """A transaction was opened inside another one; pass the open session on instead."""


class EndsOutside(BulwarkError):
    """Work may not commit or roll back its session: that happens when it has returned or raised."""


class CommitUnknown(BulwarkError):
    """The answer to COMMIT was lost; look at what the transaction wrote before running it again."""


class AlreadyCommitted(BulwarkError):
    """The receipt of this work is already there: an earlier try committed it."""

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.result = result


class Race(BulwarkError):
    """Another transaction changed what this one had just read; it has to be replayed."""


class ClaimLost(BulwarkError):
    """The job was taken back from this worker; nothing may be committed for it here."""


class Cancelled(BulwarkError):
    """Somebody has cancelled the job; it goes no further."""


class QueueTooDeep(BulwarkError):
    """More jobs would wait in a queue than may; none was written."""

    def __init__(self, queue: str, waiting: int, most: int) -> None:
        super().__init__()
        self.queue = queue
        self.waiting = waiting
        self.most = most


class NotAtHead(BulwarkError):
    """The database lacks migrations of this program; run `bulwark migrate`."""


class BadKey(BulwarkError):
    """A key or a cursor does not fit the primary key of its model."""


class SealsBroken(BulwarkError):
    """The chain of seals cannot be continued; run `bulwark audit verify`."""


class ModelError(BulwarkError):
    """A model does not follow the pattern of Base, table, Create, Public and Update classes."""


class UnknownModel(ModelError):
    """No model of this name is registered."""
