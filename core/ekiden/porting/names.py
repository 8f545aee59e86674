"""What the modules and names that programs import from Celery and kombu are here.

Whether a name exists is asked of ekiden itself, so what is added there is known here at once.
"""

from __future__ import annotations

import ast
import importlib.util
from types import ModuleType

import msgspec

from ekiden import celery_names

MODULES = {
    "celery": "ekiden",
    "celery.app": "ekiden",
    "celery.app.base": "ekiden",
    "celery.app.control": "ekiden",
    "celery.app.task": "ekiden",
    "celery.canvas": "ekiden",
    "celery.exceptions": "ekiden.exceptions",
    "celery.result": "ekiden.result",
    "celery.schedules": "ekiden.schedules",
    "celery.signals": "ekiden.signals",
    "celery.states": "ekiden.states",
    "celery.utils.log": "ekiden.logs",
    "kombu.exceptions": "ekiden.exceptions",
}
"""By Celery's module: the one here that has the same names."""

RENAMED = {"Celery": "Ekiden"}
"""Names that differ; all others are Celery's."""


class Moved(msgspec.Struct, frozen=True):
    """A name of Celery's, and where it is here."""

    module: str
    name: str


def moved(module: str, name: str) -> Moved | None:
    """Where ``from module import name`` finds it here; None where it is missing."""
    here = MODULES.get(module)
    ours = RENAMED.get(name, name)
    if here is None or not _has(here, ours):
        is_submodule = MODULES.get(f"{module}.{name}") == f"ekiden.{name}" and _is_there(f"ekiden.{name}")
        return Moved("ekiden", name) if is_submodule else None
    return Moved(here, ours)


def is_whole_here(tree: ast.AST, alias: ast.alias) -> bool:
    """Whether ``import celery`` can be ``import ekiden as celery``: what the program takes of it has its name here."""
    if alias.name != "celery":
        return False
    name = alias.asname or alias.name
    taken = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }
    return bool(taken) and all(
        each in _MODULES_HERE or moved("celery", each) == Moved("ekiden", each) for each in taken
    )


_MODULES_HERE = {"exceptions", "result", "signals", "states"}


def instead_of(module: str, name: str) -> str:
    """What to do about a name, or a whole module (``*``), that is missing here."""
    return celery_names.instead_of(module, name) or "ekiden has nothing of that name"


def _has(module: str, name: str) -> bool:
    if not _is_there(module):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:  # a name that only says what to use instead
        return False
    return found is not None and not isinstance(found, ModuleType)


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
