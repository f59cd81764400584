"""What stands in a queue in Redis."""

from dataclasses import dataclass
from enum import IntEnum


class Owner(IntEnum):
    """Whose a message is; one that is like ours is told apart by whether there is such a job."""

    SOMEBODY = 0
    LIKE_OURS = 1
    OURS = 2


@dataclass(frozen=True)
class Message:
    """What was due in a queue: a ring of ours, or what some arq client put there.

    It `is_low` when it is a ring of a priority below 0, as that of bulk jobs.
    """

    queue: str
    arq_id: bytes
    content: bytes | None
    owner: Owner
    is_low: bool = False

    @property
    def is_ring(self) -> bool:
        """Whether it is a ring beyond doubt; Redis has it no more then."""
        return self.owner is Owner.OURS
