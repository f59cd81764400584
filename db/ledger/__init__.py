"""The system's own tables, in the schema "bulwark", each with the statements that keep it."""

from db.ledger import (
    audit,
    chunk,
    idempotency,
    job,
    ring,
    spool,
    take_back,
    verdict,
    worker,
)

__all__ = [
    "audit",
    "chunk",
    "idempotency",
    "job",
    "ring",
    "spool",
    "take_back",
    "verdict",
    "worker",
]
