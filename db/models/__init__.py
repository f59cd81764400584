"""The domain tables, one module each; importing one imports all, since they refer to each other."""

from importlib import import_module
from pkgutil import walk_packages

MODULES = tuple(info.name for info in walk_packages(__path__, f"{__name__}."))

for _module in MODULES:
    import_module(_module)
