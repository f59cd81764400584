"""The system's own tables, in the schema "bulwark", each with the statements that keep it."""

from db.ledger import (
    adoption,
    audit,
    chunk,
    halt,
    idempotency,
    job,
    parked,
    progress,
    ring,
    rotation,
    schedule,
    seal,
    spool,
    take_back,
    verdict,
    worker,
)

__all__ = [
    "adoption",
    "audit",
    "chunk",
    "halt",
    "idempotency",
    "job",
    "parked",
    "progress",
    "ring",
    "rotation",
    "schedule",
    "seal",
    "spool",
    "take_back",
    "verdict",
    "worker",
]
