"""A job is checked when its module is imported, and found without being listed anywhere."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

import jobs
from db.ledger.job import Claim
from jobs import (
    ChunkedRun,
    DeclarationError,
    Job,
    Jobs,
    Outcome,
    Payload,
    Rejected,
    UnknownJob,
    chunked_job,
    discover_jobs,
    job,
)

if TYPE_CHECKING:
    from decimal import Decimal

SOURCE = """
from sqlalchemy.ext.asyncio import AsyncSession
from jobs import Payload, job

class {payload}(Payload):
    team_id: int

@job()
async def {name}(session: AsyncSession, payload: {payload}) -> None: ...
"""
numbers = itertools.count()


class RenameTeam(Payload):
    team_id: int
    name: str = "Red"


class MoveTeam(Payload):
    team_id: int


@job(queue="slow", timeout_s=10, max_age=timedelta(hours=2))
async def rename_team(session: AsyncSession, payload: RenameTeam) -> None:
    """Never run here."""


@chunked_job()
async def move_team(run: ChunkedRun, payload: MoveTeam) -> None:
    """Never run here."""


WriteModule = Callable[[str, str], str]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package of its own, which is forgotten afterwards."""
    name = f"shop_{next(numbers)}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    for module in [one for one in sys.modules if one.split(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def write(package: str, tmp_path: Path) -> WriteModule:
    """Writes a module of the package and returns its name."""

    def write_module(name: str, source: str) -> str:
        (tmp_path / package / f"{name}.py").write_text(dedent(source))
        return f"{package}.{name}"

    return write_module


def job_source(name: str, payload: str = "Order") -> str:
    return SOURCE.format(name=name, payload=payload)


# Declaring


def test_a_job_is_named_after_its_function_and_takes_its_payload_class() -> None:
    assert (rename_team.kind, rename_team.payload, rename_team.chunked) == (
        "rename_team",
        RenameTeam,
        False,
    )
    assert (move_team.kind, move_team.payload, move_team.chunked) == ("move_team", MoveTeam, True)


def test_options_that_are_given_take_the_place_of_the_defaults() -> None:
    given, default = rename_team.defaults, move_team.defaults
    assert (given.queue, given.timeout_s, given.max_age) == ("slow", 10, timedelta(hours=2))
    assert given.max_attempts == default.max_attempts


def test_a_chunked_job_comes_behind_others_unless_it_says_otherwise() -> None:
    assert (rename_team.defaults.priority, move_team.defaults.priority) == (0, -1)
    urgent: Job[MoveTeam] = chunked_job(priority=3)(move_team.run)
    assert urgent.defaults.priority == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"timout_s": 10}, "unknown option 'timout_s'; did you mean 'timeout_s'?"),
        ({"retries": 10}, "unknown option 'retries'; there is max_age, max_attempts, priority, "),
        ({"timeout_s": 0}, "timeout_s 0 is out of range; use 1 to 604800"),
        ({"timeout_s": "10"}, "timeout_s '10' is not a whole number"),
        ({"max_attempts": True}, "max_attempts True is not a whole number"),
        ({"max_attempts": 1001}, "max_attempts 1001 is out of range; use 1 to 1000"),
        ({"priority": 10}, "priority 10 is out of range; use -9 to 9"),
        ({"queue": "two words"}, "'two words' is not the name of a queue"),
        ({"queue": None, "priority": -10}, "priority -10 is out of range"),
        ({"max_age": 60}, "max_age 60 is not a timedelta above zero"),
        ({"max_age": timedelta(0)}, "max_age datetime.timedelta(0) is not a timedelta above"),
    ],
)
def test_an_option_that_cannot_be_is_refused_when_the_job_is_declared(
    options: dict[str, Any], complaint: str
) -> None:
    async def resize(run: Any, payload: MoveTeam) -> None: ...

    for declare in (job, chunked_job):
        with pytest.raises(DeclarationError) as refused:
            declare(**options)(resize)
        assert f"job resize: {complaint}" in str(refused.value)


def plain(session: AsyncSession, payload: MoveTeam) -> None: ...


async def without_payload(session: AsyncSession) -> None: ...


async def with_one_more(session: AsyncSession, payload: MoveTeam, more: int) -> None: ...


async def with_two_more(
    session: AsyncSession, payload: MoveTeam, held: Claim, more: int
) -> None: ...


async def without_annotation(session, payload) -> None:  # type: ignore[no-untyped-def]  # what is refused
    """Nothing says what it takes."""


async def with_a_dict(session: AsyncSession, payload: dict[str, int]) -> None: ...


async def with_a_late_import(session: AsyncSession, payload: "Decimal") -> None: ...


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (plain, "it must be an `async def` function"),
        (without_payload, "must be annotated with a Payload class"),
        (with_one_more, "its third parameter must be annotated with Claim"),
        (with_two_more, "must be annotated with a Payload class"),
        (without_annotation, "must be annotated with a Payload class"),
        (with_a_dict, "must be annotated with a Payload class"),
        (with_a_late_import, "outside `if TYPE_CHECKING`"),
    ],
)
def test_a_function_that_cannot_be_a_job_is_refused(function: Any, complaint: str) -> None:
    with pytest.raises(DeclarationError, match=f"job {function.__name__}: .*{complaint}"):
        job()(function)


async def rename_many(
    session: AsyncSession, orders: Sequence[tuple[RenameTeam, Claim]]
) -> list[Outcome | Rejected]:
    return [None for _ in orders]


async def of_one(session: AsyncSession, payload: RenameTeam) -> None: ...


async def of_payloads(session: AsyncSession, orders: Sequence[RenameTeam]) -> None: ...


async def of_a_list(session: AsyncSession, orders: list[tuple[RenameTeam, Claim]]) -> None: ...


async def of_another(session: AsyncSession, orders: Sequence[tuple[MoveTeam, Claim]]) -> None: ...


async def of_one_more(
    session: AsyncSession, orders: Sequence[tuple[RenameTeam, Claim]], more: int
) -> None: ...


def not_awaited(session: AsyncSession, orders: Sequence[tuple[RenameTeam, Claim]]) -> None: ...


def test_a_job_may_have_a_batch_form() -> None:
    async def rename(session: AsyncSession, payload: RenameTeam, held: Claim) -> None: ...

    declared = job(timeout_s=10, batch=rename_many)(rename)
    assert declared.batch is rename_many
    assert (declared.claimed, declared.defaults.timeout_s) == (True, 10)
    assert rename_team.batch is None


@pytest.mark.parametrize(
    "batch", [of_one, of_payloads, of_a_list, of_another, of_one_more, without_annotation]
)
def test_a_batch_form_for_anything_but_its_orders_is_refused(batch: Any) -> None:
    async def rename(session: AsyncSession, payload: RenameTeam) -> None: ...

    with pytest.raises(DeclarationError) as refused:
        job(batch=batch)(rename)
    assert "job rename: its batch form must take a session and a " in str(refused.value)
    assert "Sequence[tuple[RenameTeam, Claim]]" in str(refused.value)


def test_a_batch_form_that_is_not_awaited_is_refused() -> None:
    async def rename(session: AsyncSession, payload: RenameTeam) -> None: ...

    refused: Any = not_awaited
    with pytest.raises(DeclarationError, match="its batch form must be an `async def` function"):
        job(batch=refused)(rename)


def test_a_chunked_job_has_no_batch_form() -> None:
    async def move(run: ChunkedRun, payload: MoveTeam) -> None: ...

    options: dict[str, Any] = {"batch": rename_many}
    with pytest.raises(DeclarationError, match="unknown option 'batch'"):
        chunked_job(**options)(move)


def test_a_payload_does_not_change_and_takes_no_unknown_field() -> None:
    payload = RenameTeam(team_id=1)
    with pytest.raises(ValidationError, match="frozen"):
        payload.team_id = 2  # type: ignore[misc]  # what is refused
    with pytest.raises(ValidationError, match="tem_id"):
        RenameTeam.model_validate({"team_id": 1, "tem_id": 2})


# All declared jobs


def test_jobs_are_found_by_kind_and_by_payload() -> None:
    known = Jobs([rename_team, move_team])
    assert (list(known), len(known)) == (["rename_team", "move_team"], 2)
    assert known["move_team"] is move_team
    assert known.of(RenameTeam(team_id=1)) is rename_team


def test_an_unknown_kind_says_which_one_comes_near() -> None:
    known = Jobs([rename_team, move_team])
    with pytest.raises(UnknownJob, match="'rename_teams'; did you mean 'rename_team'"):
        known["rename_teams"]
    with pytest.raises(UnknownJob, match="'xyz'; there is move_team, rename_team"):
        known["xyz"]
    assert ("rename_team" in known, "rename_teams" in known) == (True, False)


def test_the_payload_of_another_job_is_unknown_even_when_it_inherits() -> None:
    class RenameTeamTwice(RenameTeam): ...

    with pytest.raises(UnknownJob, match="no job takes a RenameTeamTwice"):
        Jobs([rename_team]).of(RenameTeamTwice(team_id=1))


def test_two_jobs_of_one_name_fail_and_both_places_are_named() -> None:
    other: Job[Any] = Job("rename_team", MoveTeam, move_team.run, chunked=True)
    with pytest.raises(DeclarationError, match=r"two jobs are named 'rename_team'.*rename one"):
        Jobs([rename_team, other])


def test_two_jobs_of_one_payload_class_fail() -> None:
    other: Job[Any] = Job("rename_again", RenameTeam, rename_team.run, chunked=False)
    with pytest.raises(
        DeclarationError, match="'rename_team' and 'rename_again' both take a RenameTeam"
    ):
        Jobs([rename_team, other])


# Discovery


def test_every_public_module_of_the_package_is_a_job_and_no_other_is() -> None:
    folder = Path(jobs.__file__).parent
    public = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert "insert_rows" in public
    assert set(discover_jobs()) == public


def test_a_named_module_is_found_once_however_often_it_is_named(write: WriteModule) -> None:
    name = write("paint_team", job_source("paint_team"))
    assert "paint_team" in discover_jobs([name, name])
    assert "paint_team" not in discover_jobs()


def test_of_a_named_package_every_public_module_is_found(package: str, write: WriteModule) -> None:
    write("paint_team", job_source("paint_team"))
    write("wash_team", job_source("wash_team", "Wash"))
    write("_plumbing", "nothing = 1")
    assert set(discover_jobs([package])) - set(discover_jobs()) == {"paint_team", "wash_team"}


def test_payload_classes_of_the_same_name_in_two_modules_are_two(
    package: str, write: WriteModule
) -> None:
    write("paint_team", job_source("paint_team"))
    write("wash_team", job_source("wash_team"))
    assert {"paint_team", "wash_team"} <= set(discover_jobs([package]))


def test_a_job_named_like_one_that_is_there_fails(write: WriteModule) -> None:
    name = write("insert_rows", job_source("insert_rows"))
    with pytest.raises(DeclarationError, match=rf"in jobs\.insert_rows and {name}; rename one"):
        discover_jobs([name])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("empty", "nothing = 1"),
        ("paint_team", job_source("wash_team")),
        ("paint_team", job_source("paint_team") + job_source("wash_team", "Wash")),
    ],
)
def test_a_module_that_does_not_declare_the_one_job_of_its_name_fails(
    write: WriteModule, name: str, source: str
) -> None:
    module = write(name, source)
    with pytest.raises(
        DeclarationError, match=f"{module} must declare exactly one job, a function named '{name}'"
    ):
        discover_jobs([module])


def test_a_module_may_import_the_job_of_another(package: str, write: WriteModule) -> None:
    first = write("paint_team", job_source("paint_team"))
    second = write(
        "wash_team", f"from {first} import paint_team\n" + job_source("wash_team", "Wash")
    )
    assert {"paint_team", "wash_team"} <= set(discover_jobs([first, second]))


def test_a_module_that_is_missing_fails_with_its_name() -> None:
    with pytest.raises(DeclarationError, match="'no_such_shop' cannot be imported: No module"):
        discover_jobs(["no_such_shop"])


def test_a_module_whose_own_import_fails_says_so(write: WriteModule) -> None:
    name = write("paint_team", "import no_such_brush")
    with pytest.raises(DeclarationError, match=f"'{name}' cannot be imported.*no_such_brush"):
        discover_jobs([name])


def test_a_module_may_not_hide_a_name_that_its_package_gives_out(
    package: str, write: WriteModule, tmp_path: Path
) -> None:
    (tmp_path / package / "__init__.py").write_text('paint_team = 1\n__all__ = ["paint_team"]\n')
    name = write("paint_team", job_source("paint_team"))
    with pytest.raises(DeclarationError, match=f"module {name} hides a name of the package"):
        discover_jobs([package])
