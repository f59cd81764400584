"""An import that could be done, as a plan tells it to people and programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.import_words import shell_line
from worker.plan_trial import Reject


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
