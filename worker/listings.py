"""The lists that the reading commands print: for people as tables, for programs as JSON lines."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import typer
from rich.text import Text
from sqlalchemy.dialects import postgresql

from db.columns import is_sensitive
from db.ledger.depth import Depth
from db.ledger.verdict import RowVerdict
from db.registry import Model
from worker.display import grid, make_console, moment, number, say, state_text, to_json
from worker.health import Health
from worker.schedule_report import ScheduleReport

REJECTS_SHOWN = 50
_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]  # no types there in SQLAlchemy
_SHORT_ID_CHARS = 12  # of the end: the beginning is the time, which neighbours share


def short(job_id: UUID) -> str:
    """Enough of an id to name the job with."""
    return str(job_id)[-_SHORT_ID_CHARS:]


def _lines(documents: Iterable[Mapping[str, Any]]) -> None:
    for one in documents:
        typer.echo(to_json(one))


def show_jobs(found: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _lines(found)
        return
    if not found:
        say("There are no such jobs.")
        return
    rows = [
        (
            short(one["job_id"]),
            " ".join(filter(None, (one["kind"], one["table_name"]))),
            state_text(one["state"], one["reason"]),
            moment(one["created_at"]),
            number(one["run_s"]),
            number(one["rows_read"]),
            number(one["rejected"]),
        )
        for one in found
    ]
    names = ("job", "work", "state", "accepted (UTC)", "seconds", "rows", "rejected")
    make_console().print(grid(names, rows, right=names[4:]))


def show_rejects(job_id: UUID, found: Sequence[RowVerdict], most: int) -> None:
    """The table of the first `most`, and whether there are more."""
    if not found:
        say("The job has rejected no row.")
        return
    names = ("line", "column", "code", "reason")
    rows = [(one.line or "", one.column or "", one.code, one.message) for one in found[:most]]
    make_console().print(grid(names, rows, right=names[:1]))
    if len(found) > most:
        say(f"... and more: bulwark rejects {short(job_id)} --csv rejects.csv")


def show_audit(found: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _lines(found)
        return
    if not found:
        say("There are no such entries.")
        return
    rows = [
        (
            moment(one["at"]),
            short(one["job_id"]),
            one["chunk_no"],
            one["actor"] or "",
            one["action"],
            one["table_name"],
            number(one["rows"]),
            keys_text(one["keys"]),
        )
        for one in found
    ]
    names = ("at (UTC)", "job", "chunk", "actor", "action", "table", "rows", "keys")
    make_console().print(grid(names, rows, right=("chunk", "rows")))


def show_failed(
    found: Sequence[Mapping[str, Any]], counts: Sequence[Mapping[str, Any]], *, as_json: bool
) -> None:
    """The jobs; for people also how many there are in all."""
    if as_json:
        _lines(found)
        return
    if not found:
        say("There are no such jobs.")
        return
    rows = [
        (
            short(one["job_id"]),
            one["kind"],
            moment(one["finished_at"]),
            one["reason"],
            number(one["attempt"]),
            " ".join((one["error"] or "").split()),
        )
        for one in found
    ]
    names = ("job", "work", "failed (UTC)", "reason", "attempts", "error")
    make_console().print(grid(names, rows, right=("attempts",)))
    totals = (f"{number(one['jobs'])} {one['kind']} {one['reason']}" for one in counts)
    say(f"In all: {', '.join(totals)}. Run one again: bulwark retry {short(found[0]['job_id'])}")


def show_depths(found: Sequence[Depth], *, as_json: bool) -> None:
    if as_json:
        _lines(asdict(one) for one in found)
        return
    if not found:
        say("No job waits, and no queue has a limit.")
        return
    rows = [
        (one.queue, number(one.queued), "any number" if one.most is None else number(one.most))
        for one in found
    ]
    names = ("queue", "jobs that wait", "may wait")
    make_console().print(grid(names, rows, right=names[1:]))


def show_parked(found: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    if as_json:
        _lines(found)
        return
    if not found:
        say("There are no such messages.")
        return
    rows = [
        (
            number(one["number"]),
            moment(one["parked_at"]),
            one["queue"],
            one["arq_id"],
            one["kind"] or "",
            one["reason"],
            number(one["bytes"]),
        )
        for one in found
    ]
    names = ("number", "parked (UTC)", "queue", "arq id", "function", "reason", "bytes")
    make_console().print(grid(names, rows, right=("number", "bytes")))


def show_schedules(found: Sequence[ScheduleReport], *, as_json: bool) -> None:
    if as_json:
        _lines(one.as_json() for one in found)
        return
    if not found:
        say("No job declares a schedule.")
        return
    rows = [
        (
            one.name,
            one.kind,
            one.cron,
            one.timezone,
            "on" if one.on else f"off: {one.off_because}",
            moment(one.next_at),
            moment(one.last_at),
            number(one.lag_s),
            one.outcome or "",
            "" if one.job_id is None else short(one.job_id),
            state_text(one.state or "", one.reason),
        )
        for one in found
    ]
    names = ("schedule", "work", "cron", "time zone", "", "next (UTC)", "last (UTC)", "lag s")
    make_console().print(grid((*names, "outcome", "job", "state"), rows, right=("lag s",)))


def keys_text(keys: Mapping[str, Any]) -> str:
    """Which rows an audit entry is about."""
    if "ranges" in keys:
        return ", ".join(f"{first} to {last}" for first, last in keys["ranges"])
    named = [" ".join(map(str, key)) for key in keys.get("keys", ())]
    return ", ".join(named[:3]) + (f" and {len(named) - 3:,} more" if len(named) > 3 else "")


def show_models(found: Sequence[Model], *, as_json: bool) -> None:
    described = [describe_model(one) for one in found]
    if as_json:
        _lines(described)
        return
    console = make_console()
    for one in described:
        console.print(Text(one["model"], style="bold"), Text(f"({one['class']})"))
        rows = [(column["column"], column["type"], _traits(column)) for column in one["columns"]]
        console.print(grid(("column", "type", ""), rows))
        console.print(Text("unique: " + "; ".join(" + ".join(key) for key in one["unique"])), "\n")


def describe_model(model: Model) -> dict[str, Any]:
    """The document that `bulwark models --json` promises for each model."""
    return {
        "model": model.name,
        "class": model.table_class.__name__,
        "columns": [_describe_column(model, column) for column in model.table.columns],
        "unique": _unique_keys(model.table),
    }


def _describe_column(model: Model, column: sa.Column[Any]) -> dict[str, Any]:
    field = model.create.model_fields.get(column.name)
    return {
        "column": column.name,
        "type": column.type.compile(_DIALECT).lower(),
        "given": field is not None,
        "required": field is not None and field.is_required(),
        "sensitive": is_sensitive(column),
        "references": next((key.target_fullname for key in column.foreign_keys), None),
    }


def _traits(column: Mapping[str, Any]) -> str:
    traits = [
        ("set by the database", not column["given"]),
        ("required", column["required"]),
        ("sensitive", column["sensitive"]),
        (f"refers to {column['references']}", column["references"] is not None),
    ]
    return ", ".join(name for name, holds in traits if holds)


def _unique_keys(table: sa.Table) -> list[list[str]]:
    groups = [list(table.primary_key.columns)]
    groups += [
        list(one.columns) for one in table.constraints if isinstance(one, sa.UniqueConstraint)
    ]
    groups += [list(index.columns) for index in table.indexes if index.unique]
    return sorted([column.name for column in group] for group in groups)


def show_health(found: Health, *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json(found.as_json()))
        return
    console = make_console()
    word = Text("healthy", style="green") if found.healthy else Text("not healthy", style="red")
    console.print(word)
    for fault in found.faults:
        console.print(Text(f"- {fault}"))
    facts = [("migration", f"{found.revision or 'none'} of {found.head}")] if found.head else []
    if found.queues is not None:
        oldest = number(found.queues.oldest_queued_s, "s") or "none waits"
        facts += [
            ("workers alive", number(found.queues.live_workers)),
            ("of this host", number(found.queues.live_workers_here)),
            ("jobs running", number(found.queues.running)),
            ("jobs queued", number(found.queues.queued)),
            ("longest wait", oldest),
        ]
    if found.pool is not None:
        facts.append(("pool", f"{found.pool.checked_out} of {found.pool.capacity} in use"))
    if facts:
        console.print(grid(("", ""), facts))
