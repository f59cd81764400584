"""What a plan adds to the options that were given: where each column goes, and in which words."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jobs._column_kinds import Column
from jobs._guess import Fit
from jobs._mapping import OWN_PREFIX, Request
from worker.plan_document import PlannedColumn

MOST_IGNORED_BY_NAME = 3
"""More columns than so many are left out by --ignore-unknown."""


@dataclass(frozen=True)
class Completion:
    """The request of a person, completed by how its columns fit a model."""

    given: Request
    fit: Fit
    columns: Sequence[Column]

    @cached_property
    def request(self) -> Request:
        """What was asked for, with what was guessed for the rest."""
        given, fit = self.given, self.fit
        guessed = {name: one.text for name, one in fit.taken.items() if name != one.text}
        open_names = [one.name for one in self.columns if not self._is_used(one.name)]
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

    def _is_used(self, name: str) -> bool:
        given, fit = self.given, self.fit
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

    def words(self) -> list[str]:
        """An option for each thing that was guessed."""
        words: list[str] = []
        for name, text in self.request.map.items():
            words += [] if name in self.given.map else ["--map", f"{name}={text}"]
        for name in self.request.ignore[len(self.given.ignore) :]:
            words += ["--ignore", name]
        if self.request.ignore_unknown and not self.given.ignore_unknown:
            words.append("--ignore-unknown")
        return words

    def planned(self) -> list[PlannedColumn]:
        """Where each column goes, and why."""
        return [
            PlannedColumn(one.name, one.kind, one.empty, *self._destination(one.name))
            for one in self.columns
        ]

    def _destination(self, name: str) -> tuple[str | None, str]:
        given, fit = self.given, self.fit
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
