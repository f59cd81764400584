"""The steps between claim, chunk, commit and answer, at which tests let a process die or pause."""

from enum import IntEnum


class Step(IntEnum):
    """Where a job comes by, in this order; from FENCED to COMMITTED it does with each chunk."""

    CLAIMED = 1
    """The claim is committed."""
    FENCED = 2
    RECEIPTED = 3
    """A chunk's receipt is taken; a job of one transaction has none but its ending."""
    COPYING = 4
    """A part of a COPY is sent, and its end is not."""
    APPLIED = 5
    """The effects are in; what is said of them, or the ending of one transaction, is not."""
    COMMITTING = 6
    """All is in, and COMMIT comes next."""
    COMMITTED = 7
    """COMMIT was answered, and nobody has heard of it."""
    ENDING = 8
    """The ending is about to be written, in a transaction of its own."""
    ENDED = 9
    """How the run ended is committed and told."""


def reached(step: Step) -> None:
    """Do nothing: this is here for tests to replace, and for nobody else."""
