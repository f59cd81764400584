"""The registry: which models there are, found by their names and not by a list."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pkgutil import walk_packages
from types import MappingProxyType, ModuleType

import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy.exc import InvalidRequestError
from sqlmodel import SQLModel

from db import models
from db.columns import is_sensitive
from db.errors import ModelError, UnknownModel
from db.on_update import on_update


@dataclass(frozen=True)
class Model:
    """A table and the classes that say what goes into it and what comes out."""

    name: str
    table: sa.Table
    table_class: type[SQLModel]
    create: type[BaseModel]
    public: type[BaseModel]
    update: type[BaseModel]

    @property
    def sensitive_columns(self) -> frozenset[str]:
        return frozenset(column.name for column in self.table.columns if is_sensitive(column))


class Registry:
    """Models by the name of their table; the name of the class is understood in any case."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = MappingProxyType(dict(models))
        self._by_class = {model.table_class.__name__.lower(): model for model in models.values()}

    def get(self, name: str) -> Model:
        """The model of this table or class; UnknownModel tells which name comes near."""
        model = self._models.get(name) or self._by_class.get(name.lower())
        if model is None:
            raise UnknownModel(self._unknown(name))
        return model

    def __getitem__(self, name: str) -> Model:
        return self.get(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._models or name.lower() in self._by_class)

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def values(self) -> tuple[Model, ...]:
        return tuple(self._models.values())

    def _unknown(self, name: str) -> str:
        near = get_close_matches(name.lower(), [*self._models, *self._by_class], n=1)
        if near:
            return f"No model is named {name!r}: did you mean {self.get(near[0]).name}?"
        known = ", ".join(sorted(self._models)) or "none"
        return f"No model is named {name!r}; the models are: {known}."


def discover_models(extra_modules: Sequence[str] = ()) -> Registry:
    """Collect the models of `db.models` and of the modules named; a package is walked.

    Raises ModelError when a module cannot be imported or has no model, when a class of a model is
    missing or does not fit its table, when a sensitive column is in a primary key, when an
    onupdate is of no use to a statement of many rows, and when two models have one table name.
    """
    found: dict[str, Model] = {}
    modules = [import_module(name) for name in models.MODULES]
    for extra in dict.fromkeys(extra_modules):
        modules.extend(_imported(extra))
    for table_class in dict.fromkeys(c for module in modules for c in _table_classes(module)):
        model = _model(table_class)
        if model.name in found:
            raise ModelError(
                f"Two models have the table name {model.name!r}: "
                f"{_place(found[model.name].table_class)} and {_place(table_class)}; rename one."
            )
        found[model.name] = model
    return Registry(found)


def _imported(name: str) -> list[ModuleType]:
    """The named module, and those below it when it is a package."""
    try:
        top = import_module(name)
        below = [info.name for info in walk_packages(getattr(top, "__path__", []), f"{name}.")]
        modules = [top, *map(import_module, below)]
    except (ImportError, InvalidRequestError) as error:
        raise ModelError(f"The model module {name!r} cannot be imported: {error}") from error
    if not any(_table_classes(module) for module in modules):
        raise ModelError(
            f"The model module {name!r} has no model: define a class with table=True in it."
        )
    return modules


def _table_classes(module: ModuleType) -> list[type[SQLModel]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, SQLModel)
        and value.__module__ == module.__name__
        and value.model_config.get("table") is True
    ]


def _model(table_class: type[SQLModel]) -> Model:
    table = sa.inspect(table_class).local_table
    if not isinstance(table, sa.Table):
        raise ModelError(f"{_place(table_class)} is not mapped to a table.")
    model = Model(
        table.name,
        table,
        table_class,
        create=_companion(table_class, "Create"),
        public=_companion(table_class, "Public"),
        update=_companion(table_class, "Update"),
    )
    _check_fields(model)
    _check_key(model)
    for sql in on_update(table).values():
        sql()
    return model


def _companion(table_class: type[SQLModel], suffix: str) -> type[BaseModel]:
    name = f"{table_class.__name__}{suffix}"
    found = getattr(import_module(table_class.__module__), name, None)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ModelError(
            f"The module {table_class.__module__} has the table class {table_class.__name__} "
            f"but no class {name}; define it there."
        )
    return found


def _check_fields(model: Model) -> None:
    columns = set(model.table.columns.keys())
    for written in (model.create, model.update):
        if strange := sorted(set(written.model_fields) - columns):
            raise ModelError(
                f"{_place(written)} has the field {strange[0]!r}, which is no column of the "
                f"table {model.name}; remove it or add the column."
            )
        computed = {column.key for column in model.table.columns if column.computed is not None}
        if vain := sorted(set(written.model_fields) & computed):
            raise ModelError(
                f"{_place(written)} has the field {vain[0]!r}, which the database computes; remove "
                "it."
            )
    if shown := sorted(model.sensitive_columns & set(model.public.model_fields)):
        raise ModelError(
            f"{_place(model.public)} shows the sensitive column {shown[0]!r}; remove the field."
        )


def _check_key(model: Model) -> None:
    key = {column.name for column in model.table.primary_key}
    if told := sorted(model.sensitive_columns & key):
        raise ModelError(
            f"{_place(model.table_class)} has the sensitive column {told[0]!r} in its primary key, "
            "which audit and log show; take another key, such as db.columns.Identified gives."
        )


def _place(of: type[BaseModel]) -> str:
    return f"{of.__module__}.{of.__name__}"
