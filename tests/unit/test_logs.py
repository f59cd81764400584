"""Logs: one line for each event, nothing secret in it, and a page that lists them all."""

import ast
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog
from pydantic import BaseModel, ValidationError

from worker.logs import configure_logs, mask

ROOT = Path(__file__).parents[2]
EVENT = re.compile(r"[a-z]+\.[a-z_]+")
LEVELS = {"debug", "info", "warning", "error", "critical", "exception"}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(capsys)]


def test_an_event_is_one_line_of_json_with_an_instant_in_utc(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("info", "json")
    structlog.get_logger("bulwark.test").info("tea.ready", cups=2, who="Zoë\nand I")
    (line,) = logged(capsys)

    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line == {
        "level": "info",
        "event": "tea.ready",
        "logger": "bulwark.test",
        "cups": 2,
        "who": "Zoë\nand I",
    }


def test_events_below_the_level_are_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning", "json")
    log = structlog.get_logger("bulwark.test")
    log.info("tea.ready")
    log.warning("tea.cold")

    assert [line["event"] for line in logged(capsys)] == ["tea.cold"]


def test_what_is_bound_to_the_job_stands_in_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    with structlog.contextvars.bound_contextvars(job="j1"):
        structlog.get_logger("bulwark.test").info("tea.ready")

    assert logged(capsys)[0]["job"] == "j1"


def test_libraries_are_told_from_warning_on_under_one_event(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("debug", "json")
    for name in ("arq.worker", "sqlalchemy.engine", "redis"):
        logging.getLogger(name).info("chatter")
        logging.getLogger(name).warning("trouble with %s", "x")

    assert [(line["event"], line["message"]) for line in logged(capsys)] == [
        ("library.logged", "trouble with x")
    ] * 3


def test_what_arqs_command_line_has_set_up_is_undone(capsys: pytest.CaptureFixture[str]) -> None:
    arq = logging.getLogger("arq")
    arq.addHandler(logging.StreamHandler(sys.stderr))
    arq.setLevel(logging.INFO)
    configure_logs("info", "json")
    logging.getLogger("arq.worker").info("chatter")
    logging.getLogger("arq.worker").warning("trouble")

    assert [line["message"] for line in logged(capsys)] == ["trouble"]


def test_configuring_again_replaces_what_was(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    configure_logs("info", "json")
    structlog.get_logger("bulwark.test").info("tea.ready")

    assert len(logged(capsys)) == 1


def test_without_a_terminal_the_format_is_json_and_can_be_made_readable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("info", "auto")
    structlog.get_logger("bulwark.test").info("tea.ready")
    configure_logs("info", "console")
    structlog.get_logger("bulwark.test").info("tea.cold", cups=2)
    first, second = lines(capsys)

    assert json.loads(first)["event"] == "tea.ready"
    assert "tea.cold" in second
    assert not second.startswith("{")


def test_an_exception_stands_in_its_line_without_passwords(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("info", "json")
    try:
        raise ValueError("no route to postgresql://ann:horse@db/shop")
    except ValueError:
        structlog.get_logger("bulwark.test").exception("tea.spilt")
        logging.getLogger("a.library").exception("failed")
    ours, theirs = logged(capsys)

    assert "ValueError: no route to postgresql://ann:***@db/shop" in ours["exception"]
    assert "***@db" in theirs["exception"]


SECRET = "Natasha"


class Age(BaseModel):
    years: int


def test_a_traceback_shows_no_value_that_an_error_in_its_chain_quotes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("info", "json")
    refused = asyncpg.UniqueViolationError("duplicate key")
    refused.detail = f"Key (name)=({SECRET}) already exists."
    try:
        try:
            try:
                raise refused
            except asyncpg.PostgresError as error:
                Age.model_validate({"years": SECRET}, context=error)
        except ValidationError as error:
            raise ExceptionGroup("both", [refused, error]) from error
    except ExceptionGroup:
        structlog.get_logger("bulwark.test").exception("tea.spilt")
    (line,) = logged(capsys)
    assert SECRET in str(refused)
    assert SECRET not in line["exception"]
    for told in ("duplicate key", "years: Input should be a valid integer", "direct cause"):
        assert told in line["exception"]


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("password", "x", "***"),
        ("redis_password", "x", "***"),
        ("token", "x", "***"),
        ("api_key", "x", "***"),
        ("database_url", "x", "***"),
        ("Authorization", "x", "***"),
        ("secret_name", "x", "***"),
        ("secret_name", None, None),
        ("keys", [[1, 2]], [[1, 2]]),
        ("idempotency_key", "k", "k"),
        ("tokens_left_over", 1, "***"),
        ("url", "redis://:horse@h/0", "redis://:***@h/0"),
        ("url", "redis://h:1/0", "redis://h:1/0"),
        ("detail", {"password": "x", "rows": 1}, {"password": "***", "rows": 1}),
        ("detail", [{"password": "x"}], [{"password": "***"}]),
        ("reason", "mail to ann@example.org", "mail to ann@example.org"),
    ],
)
def test_secrets_are_masked(key: str, value: object, shown: object) -> None:
    assert mask(value, key) == shown


# The page of events


def modules_that_log() -> list[ast.Module]:
    trees = [
        ast.parse(path.read_text())
        for folder in ("db", "jobs", "worker")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    return [tree for tree in trees if "get_logger" in ast.dump(tree)]


def events_of(tree: ast.Module) -> set[str]:
    """Every text like an event's name that is neither a transaction's name nor a logger's."""
    others = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "name":
            others.add(id(node.value))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("get_logger"):
            others.update(map(id, node.args))
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in others
        and EVENT.fullmatch(node.value)
        and not node.value.startswith("bulwark.")
    }


def page() -> dict[str, set[str]]:
    """The fields of each event, as docs/events.md has them."""
    rows = re.findall(
        r"^\| `([a-z._]+)` .*\|([^|]*)\|$", (ROOT / "docs/events.md").read_text(), re.MULTILINE
    )
    return {name: set(re.findall(r"[a-z_]+", fields)) for name, fields in rows}


def test_the_page_of_events_lists_every_event_of_the_code_and_no_other() -> None:
    found = set().union(*map(events_of, modules_that_log()))

    assert sorted(page()) == sorted(found | {"library.logged"})


def test_the_page_of_events_lists_the_fields_that_are_given() -> None:
    documented = page()
    missing = []
    for tree in modules_that_log():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr not in LEVELS or not node.args:
                continue
            fields = {one.arg for one in node.keywords if one.arg} - {"exc_info"}
            for constant in ast.walk(node.args[0]):
                name = getattr(constant, "value", None)
                if isinstance(name, str) and not fields <= documented[name]:
                    missing.append((name, fields - documented[name]))

    assert missing == []
