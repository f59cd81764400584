"""The commands of `bulwark`, one module each, found by walking the package."""

from importlib import import_module
from pkgutil import iter_modules

import typer


def add_commands(app: typer.Typer) -> None:
    """Add what each module gives to the program by its function `add_to`."""
    for info in iter_modules(__path__):
        import_module(f"{__name__}.{info.name}").add_to(app)
