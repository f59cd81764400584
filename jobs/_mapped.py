"""What a payload says about the columns of its input, for jobs whose rows are whole rows."""

from pydantic import JsonValue

from jobs._declaration import Payload
from jobs._mapping import Request


class MappedInput(Payload):
    """The columns of an input and the fields that they become."""

    map: dict[str, str] = {}
    constants: dict[str, JsonValue] = {}
    where: dict[str, str] = {}
    ignore: list[str] = []
    ignore_unknown: bool = False
    expect_version: str | None = None

    @property
    def request(self) -> Request:
        """What the columns mean."""
        return Request(
            self.map,
            self.constants,
            self.where,
            self.ignore,
            self.ignore_unknown,
            self.expect_version,
        )
