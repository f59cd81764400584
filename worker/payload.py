"""A job's payload as its declaration wants it."""

from typing import Any

from pydantic import ValidationError

from db.ledger.job import Claim
from db.ledger.stored_json import UnreadableJson
from jobs._declaration import Job, Payload
from jobs._errors import Rejected


def payload_of(declared: Job[Any], held: Claim) -> Payload:
    """Raises Rejected, with the fields that do not fit but without their values."""
    if isinstance(held.payload, UnreadableJson):
        raise Rejected(f"the payload cannot be read: {held.payload}; enqueue one that is simpler")
    try:
        payload: Payload = declared.payload.model_validate(held.payload)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        text = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'payload'}: {problem['msg']}"
            for problem in problems
        )
        raise Rejected(f"the payload does not fit {declared.payload.__name__}: {text}") from None
    return payload
