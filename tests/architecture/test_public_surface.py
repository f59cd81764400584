"""The names that jobs and producers import are these; removing or renaming one breaks users."""

import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import jobs

ROOT = Path(__file__).parents[2]
NAMES = {
    # to write a job
    "Payload",
    "Outcome",
    "BatchResults",
    "Claim",
    "job",
    "chunked_job",
    "Schedule",
    "ChunkedRun",
    "ChunkEffect",
    "Rejected",
    "TryLater",
    "InputError",
    # to enqueue it
    "Producer",
    "Bell",
    "Enqueued",
    "Job",
    "Jobs",
    "discover_jobs",
    # what can go wrong
    "JobError",
    "DeclarationError",
    "IdempotencyConflict",
    "PayloadTooLarge",
    "UnknownJob",
}
ENQUEUE = (
    "payload session idempotency_key job_id run_at queue priority attempts timeout_s actor "
    "correlation_id"
)
ENQUEUE_MANY = (
    "payloads session idempotency_keys run_at queue priority attempts timeout_s actor "
    "correlation_id"
)


def test_the_package_jobs_gives_out_these_names_and_no_others() -> None:
    assert set(jobs.__all__) == NAMES
    assert len(jobs.__all__) == len(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_is_there(name: str) -> None:
    assert hasattr(jobs, name)


def test_every_class_and_function_that_is_given_out_says_what_it_does() -> None:
    callables = {name: getattr(jobs, name) for name in NAMES - {"Outcome", "BatchResults"}}
    assert [name for name, one in callables.items() if not inspect.getdoc(one)] == []


@pytest.mark.parametrize(
    ("method", "names"), [("enqueue", ENQUEUE), ("enqueue_many", ENQUEUE_MANY)]
)
def test_the_options_of_enqueueing_are_these(method: str, names: str) -> None:
    parameters = inspect.signature(getattr(jobs.Producer, method)).parameters
    assert list(parameters) == ["self", *names.split()]
    by_name_only = [
        name for name, one in parameters.items() if one.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    assert by_name_only == names.split()[1:]


def test_every_error_of_a_job_is_a_job_error() -> None:
    errors = {name for name in NAMES if inspect.isclass(getattr(jobs, name))} & {
        "Rejected",
        "TryLater",
        "InputError",
        "DeclarationError",
        "IdempotencyConflict",
        "PayloadTooLarge",
        "UnknownJob",
    }
    assert len(errors) == 7
    assert all(issubclass(getattr(jobs, name), jobs.JobError) for name in errors)


def test_importing_the_package_imports_no_job() -> None:
    public = [
        f"jobs.{module.name}"
        for module in pkgutil.iter_modules(jobs.__path__)
        if not module.name.startswith("_")
    ]
    script = f"import sys, jobs; print([name for name in {public!r} if name in sys.modules])"
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == "[]"


def test_no_job_is_named_like_what_the_package_gives_out() -> None:
    assert {module.name for module in pkgutil.iter_modules(jobs.__path__)}.isdisjoint(NAMES)
