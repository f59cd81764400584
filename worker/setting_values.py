"""What a person may write as the value of a setting, and what it is then."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode

from db.ledger.rotation import ROTATED
from jobs._sources.object_store import SCHEMES

LEAST_KEY_CHARS = 32


def _items(value: object) -> object:
    """A list as a person types it: separated by commas, or as a JSON list."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"the JSON list is broken: {error}") from None
    return [item.strip() for item in value.split(",") if item.strip()]


def _objects(value: object) -> object:
    """What is written as one JSON object with an object under each name."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"the JSON is broken: {error}") from None
    if not (isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())):
        raise ValueError('it should be JSON such as {"name": {"cron": "0 3 * * *"}}')
    return found


def _days(value: object) -> object:
    """Days by name as a person types them, hero=30,team=365, or as a JSON object."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"the JSON object is broken: {error}") from None
    pairs = [item.partition("=") for item in value.split(",") if item.strip()]
    for name, equals, days in pairs:
        if not name.strip() or not equals or not days.strip().isdecimal():
            text = f"{name}{equals}{days}".strip()
            raise ValueError(f"{text!r} is no name and days, such as hero=30")
    names = [name.strip() for name, _, _ in pairs]
    _distinct(tuple(names))
    return {name: int(days) for name, (_, _, days) in zip(names, pairs, strict=True)}


def _ledger_tables(days: dict[str, int]) -> dict[str, int]:
    known = (*ROTATED, "job", "parked")
    for name in days:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(sorted(known))}")
    return days


def _lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("it names nothing; leave it out for the default")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands in it twice")
    return names


def _module_name(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{name!r} is not the name of a Python module, such as shop.models")
    return name


def _queue_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
        raise ValueError(f"{name!r} is not the name of a queue: letters, digits and _ . - only")
    return name


def _import_place(value: object) -> object:
    """A folder as its path; one of objects as the beginning of their URIs."""
    if not isinstance(value, str) or "://" not in value:
        return Path(str(value)).expanduser().absolute()
    scheme, _, place = value.partition("://")
    if scheme not in SCHEMES or not place.strip("/"):
        example = "/srv/incoming or s3://bucket/incoming"
        raise ValueError(f"{value!r} is no place of files or objects, such as {example}")
    return value


def _seal_keys(secret: SecretStr) -> SecretStr:
    """Keys that nobody guesses who has what they have signed. Errors never repeat them."""
    keys = secret.get_secret_value().split()
    if any(len(key) < LEAST_KEY_CHARS for key in keys):
        raise ValueError(
            f"a key has fewer than {LEAST_KEY_CHARS} signs; make one with `openssl rand -hex 32`"
        )
    return secret


ModuleName = Annotated[str, AfterValidator(_module_name)]
QueueName = Annotated[str, AfterValidator(_queue_name)]
Place = Annotated[Path | str, BeforeValidator(_import_place)]
Seconds = Annotated[float, Field(allow_inf_nan=False)]
ManyOf = (NoDecode, BeforeValidator(_items))
Days = Annotated[
    dict[str, Annotated[int, Field(ge=0, le=36_500)]], NoDecode, BeforeValidator(_days)
]

LedgerDays = Annotated[Days, AfterValidator(_ledger_tables)]
Objects = Annotated[dict[str, dict[str, Any]], NoDecode, BeforeValidator(_objects)]
SealKeys = Annotated[SecretStr, AfterValidator(_seal_keys)]
Lowered = BeforeValidator(_lowered)
Distinct = AfterValidator(_distinct)
