"""Which tables a purge concerns, and since when their rows must have been deleted."""

from collections.abc import Mapping, Sequence

from db.errors import UnknownModel
from db.registry import Model, Registry
from jobs._errors import Rejected

SETTING = "BULWARK_RETENTION_DAYS"


def retentions(
    models: Registry,
    tables: Sequence[str] | None,
    days: Mapping[str, int],
    overridden: Mapping[str, int],
) -> dict[str, int]:
    """Days by table: of the tables named, or of all that have a retention.

    Raises Rejected for a table that is unknown, has none, or is not deleted softly.
    """
    known = {_named(models, name).name: kept for name, kept in {**days, **overridden}.items()}
    wanted = list(known) if tables is None else [_named(models, name).name for name in tables]
    if not wanted:
        raise Rejected(f"No table has a retention; set {SETTING}, such as hero=30, or name one.")
    if without := [name for name in wanted if name not in known]:
        raise Rejected(f"The table {without[0]} has no retention; add it to {SETTING}.")
    return {name: known[name] for name in wanted}


def _named(models: Registry, name: str) -> Model:
    try:
        model = models.get(name)
    except UnknownModel as error:
        raise Rejected(str(error)) from None
    if "deleted_at" not in model.table.columns:
        raise Rejected(f"The table {model.name} has no deleted_at, so nothing of it is purged.")
    return model
