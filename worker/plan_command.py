"""Planning an import: what a file is for is guessed, tried on its first rows, and shown."""

import asyncio
from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from db.catalog import qualified, read_facts
from db.registry import Model, Registry, discover_models
from jobs import _guess as guess
from jobs._column_kinds import Column, columns_of
from jobs._guess import Fit, Found
from jobs._mapping import Request
from jobs._planning import make_plan, require_given
from jobs._references import Reference
from jobs._relations import Known, Relation, relations_of
from worker.connection import Sessions
from worker.import_command import Import
from worker.import_file import STDIN
from worker.import_sample import Sample, read_sample, shape_words
from worker.plan_completion import Completion
from worker.plan_document import ImportPlan
from worker.plan_hints import Hints
from worker.plan_trial import Trial, parents_of, try_part
from worker.settings import Settings


async def plan_import(
    settings: Settings, sessions: Sessions, asked: Import, file: str, options: Sequence[str]
) -> ImportPlan:
    """Fill in what the request leaves open, and try it on the first rows; writes nothing.

    `file` and `options` are what was typed, which stays in the command. Raises InputError
    when no model fits, or several do equally well.
    """
    sample = await asyncio.to_thread(read_sample, asked, settings.import_folders)
    columns = columns_of(sample.columns, sample.part)
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
        done = Completion(self._asked.columns, fit, self._columns)
        trial = await self._try(fit.model, done.request)
        relations = self._relations(fit.model)
        hints = Hints(self._asked, self._file, self._sample, self._columns, fit, relations, trial)
        guessed = [*shape_words(self._sample.shape, self._asked.declared), *done.words()]
        rows = len(self._sample.part.rows)
        return ImportPlan(
            file=self._file,
            form=self._sample.form,
            model=fit.model.name,
            because=self._because(fit),
            columns=done.planned(),
            doubts=[*self._sample.doubts, *fit.doubts],
            hints=[*hints.all()],
            words=["bulwark", "import", fit.model.name, self._file, *options, *guessed],
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
        return relations_of(model, self._known[model.name], self._models, self._known)

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

    async def _try(self, model: Model, request: Request) -> Trial:
        """Try the request as the job would do it; raises InputError where the job would fail."""
        facts, options = self._known[model.name], self._asked.options
        plan = make_plan(request, self._sample.columns, model.name, model.create, facts)
        require_given(options.get("update", ()), plan, model.name)
        parents = parents_of(facts, plan.references, self._models, self._known)
        part, on_missing = self._sample.part, options.get("on_missing", "reject")
        return await try_part(self._session, model, plan, parents, part, on_missing)
