"""`bulwark import`: enqueue the import of a file, plan it, or watch a folder."""

import asyncio
import sys
from dataclasses import replace

import typer

from jobs._producer import Enqueued
from worker import import_options as ask
from worker.accepted import follow_job, tell_accepted
from worker.arguments import as_parameters
from worker.command_group import quiet_settings
from worker.connection import open_ledger
from worker.import_command import Import, submit
from worker.import_file import declared_shape, import_file, stays_in_place
from worker.import_words import one_line, typed_options, what_and_where
from worker.plan_command import plan_import
from worker.plan_display import show_plan
from worker.plan_document import ImportPlan
from worker.settings import Settings
from worker.watch_command import Told, Watching, tell_file, watch_folder


def add_to(app: typer.Typer) -> None:
    app.command("import")(import_)


@as_parameters
def import_(ctx: typer.Context, given: ask.Given) -> None:
    """Enqueue the import of a file into a table."""
    typed = typed_options(ctx)
    what, where = what_and_where(given.model, given.file, given.watch, typed, plan=given.plan)
    declared = declared_shape(given.format_, given.encoding, given.delimiter)
    stays = stays_in_place(in_place=given.in_place, spool=given.spool)
    columns, options, terms = given.columns, given.options, given.terms
    with import_file(where, sys.stdin.buffer, in_place=given.in_place) as (file, uri):
        asked = Import(what, file, columns, options, terms, stays, declared=declared, uri=uri)
        if given.plan:
            _plan(asked, where, typed, as_json=given.as_json)
        elif given.watch is not None:
            watching = Watching(given.watch, asked, given.interval_s, given.once)
            _watch_folder(watching, as_json=given.as_json)
        else:
            _import(quiet_settings(), asked, follow=given.follow, as_json=given.as_json)


def _import(settings: Settings, asked: Import, *, follow: bool, as_json: bool) -> None:
    accepted = asyncio.run(_submit(settings, asked))
    if follow:
        follow_job(settings, accepted.job_id, as_json=as_json)
    else:
        tell_accepted(accepted, as_json=as_json)


def _plan(asked: Import, file: str, typed: list[str], *, as_json: bool) -> None:
    async def make(settings: Settings) -> ImportPlan:
        async with open_ledger(settings) as sessions:
            return await plan_import(settings, sessions, asked, file, typed)

    show_plan(asyncio.run(make(quiet_settings())), as_json=as_json)


def _watch_folder(watching: Watching, *, as_json: bool) -> None:
    """Tell on stdout what becomes of each file, and on stderr what is waited for."""
    watched = watch_folder(
        quiet_settings(),
        watching,
        lambda told: tell_file(_on_one_line(told, as_json=as_json), as_json=as_json),
        lambda sentence: typer.echo(f"bulwark: {sentence}", err=True),
    )
    raise typer.Exit(asyncio.run(watched))


def _on_one_line(told: Told, *, as_json: bool) -> Told:
    return told if as_json else replace(told, file=one_line(told.file))


async def _submit(settings: Settings, asked: Import) -> Enqueued:
    async with open_ledger(settings) as sessions:
        return await submit(settings, sessions, asked)
