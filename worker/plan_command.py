"""Planning an import: what a file is for is guessed, tried on its first rows, and shown."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import TableFacts, qualified, read_facts
from db.registry import Model, Registry, discover_models
from jobs import _guess as guess
from jobs._guess import Column, Fit, Found, Known, Relation
from jobs._mapping import OWN_PREFIX, Plan, Reference, Request, make_plan, require_given
from jobs._parents import Parents
from jobs._preparation import Preparer
from worker.connection import Sessions
from worker.import_command import Import
from worker.import_file import STDIN
from worker.import_sample import Sample, read_sample, shape_words
from worker.import_words import shell_line
from worker.plan_hints import Hints
from worker.plan_trial import Reject, Trial, parents_of, try_part
from worker.settings import Settings

MOST_IGNORED_BY_NAME = 3
"""More columns than so many are left out by --ignore-unknown."""


@dataclass(frozen=True)
class PlannedColumn:
    """One column of the input: what it holds, and where it goes or why it goes nowhere."""

    column: str
    kind: str
    empty: int
    target: str | None
    why: str


@dataclass(frozen=True)
class ImportPlan:
    """An import that could be done, and what became of the sample when it was tried on it."""

    file: str
    form: Mapping[str, Any]
    model: str
    because: str
    columns: Sequence[PlannedColumn]
    doubts: Sequence[str]
    hints: Sequence[str]
    words: Sequence[str]
    rows: int
    valid: int
    not_selected: int
    rejects: Sequence[Reject]

    @property
    def command(self) -> str:
        """The words as a shell reads them."""
        return shell_line(self.words)

    def as_json(self) -> dict[str, Any]:
        """The document that `--json` promises."""
        return {
            "file": self.file,
            "form": dict(self.form),
            "model": self.model,
            "because": self.because,
            "columns": [vars(one) for one in self.columns],
            "doubts": list(self.doubts),
            "hints": list(self.hints),
            "command": self.command,
            "words": list(self.words),
            "sample": {
                "rows": self.rows,
                "valid": self.valid,
                "not_selected": self.not_selected,
                "rejected": len(self.rejects),
            },
            "rejects": [vars(one) for one in self.rejects],
        }


async def plan_import(
    settings: Settings, sessions: Sessions, asked: Import, file: str, options: Sequence[str]
) -> ImportPlan:
    """Fill in what the request leaves open, and try it on the first rows; writes nothing.

    `file` and `options` are what was typed, which stays in the command. Raises InputError
    when no model fits, or several do equally well.
    """
    sample = await asyncio.to_thread(read_sample, asked, settings.import_folders)
    columns = guess.columns_of(sample.columns, sample.part)
    models = discover_models(settings.model_modules)
    async with sessions() as session:
        planner = _Planner(session, models, asked, file, sample, columns)
        return await planner.plan(options)


class _Planner:
    """One plan in the making, on one reading transaction."""

    def __init__(
        self,
        session: AsyncSession,
        models: Registry,
        asked: Import,
        file: str,
        sample: Sample,
        columns: Sequence[Column],
    ) -> None:
        self._session = session
        self._models = models
        self._asked = asked
        self._file = file if not file.startswith("-") or file == STDIN else f"./{file}"
        self._sample = sample
        self._columns = columns
        self._known: Known = {}

    async def plan(self, options: Sequence[str]) -> ImportPlan:
        models = [one for one in self._models.values() if await self._has_table(one)]
        self._known = {one.name: await read_facts(self._session, one.table) for one in models}
        fit = await self._fit()
        request = self._request(fit)
        facts = self._known[fit.model.name]
        names = self._sample.columns
        plan = make_plan(request, names, fit.model.name, fit.model.create, facts)
        require_given(self._asked.options.get("update", ()), plan, fit.model.name)
        parents = parents_of(facts, plan.references, self._models, self._known)
        trial = await self._try(fit.model, plan, facts, parents)
        rows = len(self._sample.part.rows)
        relations = self._relations(fit.model)
        hints = Hints(
            self._asked,
            self._file,
            self._sample,
            self._columns,
            fit,
            relations,
            plan,
            facts,
            parents,
            trial,
        )
        return ImportPlan(
            file=self._file,
            form=self._sample.form,
            model=fit.model.name,
            because=self._because(fit),
            columns=[self._planned(column, fit, request) for column in self._columns],
            doubts=[*self._sample.doubts, *fit.doubts],
            hints=[*hints.all()],
            words=self._words(fit.model.name, request, options),
            rows=rows,
            valid=rows - trial.filtered - len(trial.rejects),
            not_selected=trial.filtered,
            rejects=trial.rejects,
        )

    async def _has_table(self, model: Model) -> bool:
        """Whether its migration has been applied; one that was named is known to be meant."""
        table = sa.func.to_regclass(qualified(model.table))
        named = self._asked.model and self._models.get(self._asked.model) is model
        return bool(named or await self._session.scalar(sa.select(table.is_not(None))))

    # What it is for

    async def _fit(self) -> Fit:
        """The model that fits best; values are looked up once it is known in which tables."""
        if self._asked.model:
            chosen = self._fit_to(self._models.get(self._asked.model), {})
        else:
            fits = [self._fit_to(self._models.get(name), {}) for name in self._known]
            chosen = guess.best(fits, self._file)
        return self._fit_to(chosen.model, await self._find(chosen))

    def _fit_to(self, model: Model, found: Found) -> Fit:
        name, given = self._asked.file.name, self._asked.columns
        return guess.fit(model, self._columns, self._relations(model), given, name, found)

    def _relations(self, model: Model) -> list[Relation]:
        return guess.relations_of(model, self._known[model.name], self._models, self._known)

    async def _find(self, fit: Fit) -> Found:
        """Which columns that nobody knows by name hold the natural keys of other tables' rows."""
        found: dict[str, set[str]] = {}
        facts = self._known[fit.model.name]
        for column in self._columns:
            texts = {one for one in column.values if isinstance(one, str) and "\0" not in one}
            if not texts or column.name in fit.taken or column.kind in ("int", "float", "bool"):
                continue
            for relation in self._relations(fit.model):
                for name in relation.names:
                    one = Reference(column.name, 0, "", relation.table, name, name)
                    parents = parents_of(facts, [one], self._models, self._known)
                    there = await parents.ids(self._session, {one: texts})
                    if len(there[""]) >= guess.LEAST_KNOWN * len(texts):
                        found.setdefault(column.name, set()).add(relation.target(name))
        return found

    def _because(self, fit: Fit) -> str:
        if self._asked.model:
            return "as you said"
        named = "; the file is named so" if fit.named_by_file else ""
        fields = [target.field for target in fit.taken.values()]
        return f"most columns fit it ({', '.join(fields)}){named}"

    # What is to be done

    def _request(self, fit: Fit) -> Request:
        """What was asked for, with what was guessed for the rest."""
        given = self._asked.columns
        guessed = {name: one.text for name, one in fit.taken.items() if name != one.text}
        open_names = [one.name for one in self._columns if not self._is_used(one.name, fit)]
        by_name = [name for name in open_names if name in fit.model.create.model_fields]
        others = [name for name in open_names if name not in by_name]
        all_unknown = given.ignore_unknown or len(others) > MOST_IGNORED_BY_NAME
        ignored = by_name if all_unknown else open_names
        return replace(
            given,
            map={**given.map, **guessed},
            ignore=[*given.ignore, *ignored],
            ignore_unknown=all_unknown,
        )

    def _is_used(self, name: str, fit: Fit) -> bool:
        given = self._asked.columns
        in_template = any("{" in right and f"{{{name}}}" in right for right in given.map.values())
        return (
            name in fit.taken
            or name in given.ignore
            or name in given.where
            or name == given.expect_version
            or ("{" not in given.map.get(name, "{"))
            or (in_template and name not in fit.model.create.model_fields)
            or name.startswith(OWN_PREFIX)
        )

    def _words(self, model: str, request: Request, options: Sequence[str]) -> list[str]:
        """The command: what was typed, and an option for each thing that was guessed."""
        given = self._asked.columns
        words = ["bulwark", "import", model, self._file, *options]
        words += shape_words(self._sample.shape, self._asked.declared)
        for name, text in request.map.items():
            words += [] if name in given.map else ["--map", f"{name}={text}"]
        for name in request.ignore[len(given.ignore) :]:
            words += ["--ignore", name]
        if request.ignore_unknown and not given.ignore_unknown:
            words.append("--ignore-unknown")
        return words

    def _planned(self, column: Column, fit: Fit, request: Request) -> PlannedColumn:
        target, why = self._destination(column, fit, request)
        return PlannedColumn(column.name, column.kind, column.empty, target, why)

    def _destination(self, column: Column, fit: Fit, request: Request) -> tuple[str | None, str]:
        given = self._asked.columns
        name = column.name
        if name in fit.taken:
            return fit.taken[name].text, fit.taken[name].why
        if name in given.map and "{" not in given.map[name]:
            return given.map[name], "as you said"
        made = [left for left, right in given.map.items() if f"{{{name}}}" in right]
        if made:
            return ", ".join(made), "as you said"
        if name in given.where:
            return None, "selects rows"
        if name == given.expect_version:
            return None, "the version that is expected, as you said"
        if name in given.ignore:
            return None, "left out, as you said"
        return None, f"left out: {fit.misfits.get(name, 'no field is named so')}"

    # What comes of it

    async def _try(self, model: Model, plan: Plan, facts: TableFacts, parents: Parents) -> Trial:
        on_missing = self._asked.options.get("on_missing", "reject")
        preparer = Preparer(model, plan, facts, on_missing)
        part, create = self._sample.part, on_missing == "create"
        return await try_part(self._session, preparer, parents, part, create=create)
