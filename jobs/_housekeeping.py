"""How long things are kept and where archives are: settings that a worker hands to its jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jobs._sources.place import ImportPlace


@dataclass(frozen=True)
class Housekeeping:
    """Days by model for what was deleted softly, days by table for the ledger itself.

    What is named in neither is kept for good. Archives are written to, and read from, nowhere but
    in the places named. The first of the `seal_keys` signs what seals the audit; the others have
    signed before.
    """

    retention_days: Mapping[str, int] = field(default_factory=dict)
    ledger_retention_days: Mapping[str, int] = field(default_factory=dict)
    archive_folders: Sequence[ImportPlace] = ()
    seal_keys: Sequence[str] = field(default=(), repr=False)
