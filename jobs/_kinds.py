"""What a worker tells SQL of the jobs that it knows."""

import json
from typing import Any

from pydantic_core import PydanticSerializationError

from jobs._declaration import Job, Payload
from jobs._discovery import Jobs

_EMPTY = (dict, list)


def described(jobs: Jobs) -> list[dict[str, Any]]:
    """A row of `bulwark.kind` for each job."""
    return [_described(jobs[kind]) for kind in sorted(jobs)]


def _described(declared: Job[Any]) -> dict[str, Any]:
    defaults = declared.defaults
    return {
        "kind": declared.kind,
        "queue": defaults.queue,
        "priority": defaults.priority,
        "max_attempts": defaults.max_attempts,
        "timeout_s": defaults.timeout_s,
        "payload_defaults": json.dumps(_defaults_of(declared.payload), sort_keys=True),
    }


def _defaults_of(payload: type[Payload]) -> dict[str, Any]:
    """The fields that may be left out, as a payload's JSON has them.

    One whose default is made anew each time is none of them, nor is any where JSON lacks a value.
    """
    values = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in payload.model_fields.items()
        if not field.is_required()
        and (field.default_factory is None or field.default_factory in _EMPTY)
    }
    try:
        whole = payload.model_construct(**values)
        text = whole.model_dump_json(by_alias=True, include=set(values), warnings="error")
    except PydanticSerializationError:
        return {}
    found: dict[str, Any] = json.loads(text)
    return found
