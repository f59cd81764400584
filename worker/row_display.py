"""How rows of models are shown: a page of them, and one with all that belongs to it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import typer
from pydantic import BaseModel
from rich.text import Text

from db.ledger.row_history import RowHistory
from db.reading.pages import Page
from db.reading.rows import Related, RowView
from db.registry import Model
from worker.display import grid, make_console, moment, number, say, to_json
from worker.listings import short


def show_page(model: Model, found: Page, again: Sequence[str], *, as_json: bool) -> None:
    """The rows, and how to see those behind them with the options `again`."""
    if as_json:
        rows = [one.model_dump(mode="json") for one in found.rows]
        typer.echo(to_json({"rows": rows, "next": found.next}))
        return
    if not found.rows:
        say("There are no such rows.")
        return
    _show_table([one.model_dump() for one in found.rows])
    if found.next is not None:
        options = " ".join(again)
        say(f"... and more: bulwark list {model.name} --after {found.next} {options}")


def show_row(model: Model, key: Sequence[str], view: RowView, *, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json({"model": model.name, **_view_document(view)}))
        return
    console = make_console()
    console.print(Text(f"{model.name} {' '.join(key)}", style="bold"))
    console.print(grid(("", ""), [(name, _cell(v)) for name, v in _cells(view.itself).items()]))
    for name, children in view.children.items():
        if children.rows:
            _say_heading(name, cut=children.more)
            _show_table([_cells(one) for one in children.rows])
    _show_history(view.history)


def _view_document(view: RowView) -> dict[str, Any]:
    children = {
        name: {"rows": [_document(one) for one in some.rows], "more": some.more}
        for name, some in view.children.items()
    }
    audit = {"lines": view.history.lines, "complete": view.history.complete}
    return {"row": _document(view.itself), "related": children, "audit": audit}


def _document(found: Related) -> dict[str, Any]:
    parents = {
        name: None if one is None else one.model_dump(mode="json")
        for name, one in found.parents.items()
    }
    return {**found.row.model_dump(mode="json"), **parents}


def _cells(found: Related) -> dict[str, Any]:
    parents = {name: "" if one is None else _label(one) for name, one in found.parents.items()}
    return {**found.row.model_dump(), **parents}


def _label(row: BaseModel) -> str:
    """What people call the row by: the first text in it."""
    values = row.model_dump().values()
    return next((value for value in values if isinstance(value, str)), "")


def _say_heading(name: str, *, cut: bool) -> None:
    more = "; there are more, see --limit" if cut else ""
    make_console().print(Text.assemble("\n", (name, "bold"), more))


def _show_table(rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(rows[0])
    numeric = [name for name in names if all(isinstance(one[name], int) for one in rows)]
    cells = [[_cell(one[name]) for name in names] for one in rows]
    make_console().print(grid(names, cells, right=numeric))


def _cell(value: Any) -> str:
    if isinstance(value, datetime):
        return moment(value) if value.tzinfo else value.isoformat(" ")
    return "" if value is None else str(value)


def _show_history(history: RowHistory) -> None:
    if history.lines:
        _say_heading("audit", cut=not history.complete)
        names = ("at (UTC)", "job", "actor", "action", "version", "before")
        rows = [
            (
                moment(one["at"]),
                short(one["job_id"]),
                one["actor"] or "",
                one["action"],
                number(one["version"]),
                "" if one["before"] is None else json.dumps(one["before"], ensure_ascii=False),
            )
            for one in history.lines
        ]
        make_console().print(grid(names, rows, right=("version",)))
