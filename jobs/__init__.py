"""What the work is, one public module per job, and the names that jobs and producers import."""

from db.ledger.job import Claim
from jobs._bell import Bell
from jobs._declaration import BatchResults, Job, Outcome, Payload, chunked_job, job
from jobs._discovery import Jobs, discover_jobs
from jobs._errors import (
    DeclarationError,
    IdempotencyConflict,
    InputError,
    JobError,
    PayloadTooLarge,
    Rejected,
    TryLater,
    UnknownJob,
)
from jobs._producer import Enqueued, Producer
from jobs._run import ChunkedRun, ChunkEffect
from jobs._schedule import Schedule

__all__ = [
    "BatchResults",
    "Bell",
    "ChunkEffect",
    "ChunkedRun",
    "Claim",
    "DeclarationError",
    "Enqueued",
    "IdempotencyConflict",
    "InputError",
    "Job",
    "JobError",
    "Jobs",
    "Outcome",
    "Payload",
    "PayloadTooLarge",
    "Producer",
    "Rejected",
    "Schedule",
    "TryLater",
    "UnknownJob",
    "chunked_job",
    "discover_jobs",
    "job",
]
