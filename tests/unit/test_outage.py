"""An outage is told once, and tried for at intervals that grow, but not for long."""

import structlog
from structlog.testing import capture_logs

from worker.outage import Outage

PICK_UP_S = 2.0


def an_outage() -> Outage:
    return Outage(structlog.get_logger("bulwark.test"), "gone", "there", server="redis")


def test_it_is_told_once_when_it_begins_and_once_when_it_ends() -> None:
    with capture_logs() as logs:
        outage = an_outage()
        outage.end()
        for _ in range(2):
            outage.fail("refused")
            outage.fail("refused again")
            outage.end()
            outage.end()
    told = [(line["event"], line["server"], line.get("reason")) for line in logs]
    assert told == [("gone", "redis", "refused"), ("there", "redis", None)] * 2


def test_the_waits_grow_so_far_that_the_end_is_still_noticed_soon() -> None:
    outage = an_outage()
    waits_s = [outage.fail("refused") for _ in range(2000)]
    assert waits_s == sorted(waits_s)
    assert waits_s[0] < waits_s[3] < waits_s[-1] < PICK_UP_S


def test_after_its_end_the_waits_begin_anew() -> None:
    outage = an_outage()
    first_s, second_s = outage.fail("refused"), outage.fail("refused")
    outage.end()
    assert outage.fail("refused") == first_s < second_s
