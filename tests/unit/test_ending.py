"""How runs end, and what is told of it."""

from datetime import timedelta
from uuid import uuid4

import pytest
from structlog.testing import capture_logs
from uuid6 import uuid7

from db.ledger.job import Claim, Reason
from worker.ending import outlived

A_DAY = timedelta(days=1)


def held(age: timedelta, attempt: int) -> Claim:
    age_s = age.total_seconds()
    return Claim(uuid7(), uuid4(), uuid4(), "test", {}, attempt, 3, 60, None, None, 0, age_s)


@pytest.mark.parametrize("reason", [Reason.TIMED_OUT, None])
@pytest.mark.parametrize("attempt", [0, 2])
def test_time_that_ran_out_in_an_outage_is_told_as_such_once_the_job_is_too_old(
    reason: Reason | None, attempt: int
) -> None:
    claim = held(2 * A_DAY, attempt)
    with capture_logs() as logs:
        outlived(claim, A_DAY, reason, "it took too long").tell(claim)
    [told] = logs
    if attempt == 2:
        assert (told["event"], told["reason"]) == ("job.failed", reason or "attempts_exhausted")
    else:
        assert (told["event"], told["attempt"]) == ("job.retried", 1)
