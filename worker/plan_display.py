"""How a plan is shown: what was guessed and why, what came of the sample, and the command."""

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.display import grid, make_console, to_json
from worker.import_words import shell_word
from worker.plan_document import ImportPlan

REJECTS_SHOWN = 10


def show_plan(plan: ImportPlan, *, as_json: bool) -> None:
    if as_json:
        document = to_json(plan.as_json())
        typer.echo(document.encode(errors="backslashreplace"))  # of a name that is not UTF-8
        return
    console = make_console()
    console.print(grid(("", ""), _facts(plan)))
    console.print("", _columns(plan), sep="\n")
    for heading, sentences in (("In doubt", plan.doubts), ("Worth knowing", plan.hints)):
        if sentences:
            console.print("", Text(heading, style="bold"), sep="\n")
        for sentence in sentences:
            console.print(Text(f"- {sentence}"), soft_wrap=True)
    _show_sample(console, plan)
    console.print("", Text("Nothing was written. To import:", style="bold"), sep="\n")
    console.print(Text(plan.command), soft_wrap=True)


def _facts(plan: ImportPlan) -> list[tuple[str, str]]:
    form = ", ".join(str(value) for value in plan.form.values() if value != "none")
    return [
        ("file", f"{shell_word(plan.file)} ({form})"),
        ("model", f"{plan.model}: {plan.because}"),
    ]


def _columns(plan: ImportPlan) -> Table:
    names = ("column", "values", "empty", "goes into", "because")
    rows = [
        (one.column, one.kind, f"{one.empty:,}", one.target or "-", one.why) for one in plan.columns
    ]
    return grid(names, rows, right=("empty",))


def _show_sample(console: Console, plan: ImportPlan) -> None:
    rejected = len(plan.rejects)
    left_out = f", {plan.not_selected:,} not selected" if plan.not_selected else ""
    more = f"; the first {REJECTS_SHOWN}" if rejected > REJECTS_SHOWN else ""
    sentence = f"{plan.valid:,} are valid, {rejected:,} rejected{left_out}{more}"
    console.print("", Text(f"Of the first {plan.rows:,} rows {sentence}."), sep="\n")
    if plan.rejects:
        names = ("line", "column", "code", "reason")
        rows = [
            (one.line, one.column or "", one.code, one.reason)
            for one in plan.rejects[:REJECTS_SHOWN]
        ]
        console.print(grid(names, rows, right=names[:1]))
