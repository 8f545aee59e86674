"""Modules by name: importing them, with one clear sentence when that fails, and what a module is really called."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

from ekiden.errors import ConfigurationError
from ekiden.loggers import safe_logger
from ekiden.safe_text import text_of

logger = safe_logger(__name__)

Returned = TypeVar("Returned")

_OWN_DIRECTORY = str(Path(__file__).parent)


class ModuleNamedAsAFunction(ModuleType):
    """A module of ours that has the name of a function of Celery's: who calls it is told what to do instead.

    ``from ekiden import task`` gives the module once somebody has imported that. A module takes this class by
    assigning it to its ``__class__``.
    """

    def __call__(self, *_args: object, **_kwargs: object) -> NoReturn:
        from ekiden.celery_names import missing_name  # only for a name that is not here

        package, _, name = self.__name__.partition(".")
        raise missing_name(package, name)


def import_module(name: str, wanted_by: str) -> ModuleType:
    """Import a module. Raises ConfigurationError in one sentence that says what went wrong, and where.

    So it does for a module that ends the program when it is imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigurationError(
                f"{wanted_by}: there is no module {error.name!r}; it is looked for from {Path.cwd()} on."
            ) from error
        raise _import_failed(name, wanted_by, error) from error
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        raise _import_failed(name, wanted_by, error) from error


def called(function: Callable[[], Returned], wanted_by: str) -> Returned:
    """What ``function``, of the user's, returns. Raises ConfigurationError in one sentence for whatever it raises."""
    try:
        return function()
    except ConfigurationError:
        raise
    except BaseException as error:
        if is_ctrl_c(error):
            raise
        raise ConfigurationError(f"{wanted_by}: {what_failed(error)}") from error


def is_ctrl_c(error: BaseException) -> bool:
    """Whether somebody has interrupted this program, which no worker process lets happen."""
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def what_failed(error: BaseException) -> str:
    """An error out of code of the user's, in one line, and the place that it comes from."""
    if isinstance(error, ConfigurationError):
        text = text_of(error)
    else:
        text = ": ".join(filter(None, [type(error).__name__, " ".join(text_of(error).split())]))
    return f"{text}{_place(error)}"


def is_module(name: str) -> bool:
    """Whether there is a module of this name. Imports the packages that it lies in; True where one of them fails."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
    except BaseException as error:  # a package of the user's: the import that follows reports it
        if is_ctrl_c(error):
            raise
        return True


def _import_failed(name: str, wanted_by: str, error: BaseException) -> ConfigurationError:
    if isinstance(error, SystemExit):
        return ConfigurationError(f"{wanted_by}: the module {name!r} ends the program: {what_failed(error)}")
    advice = ""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in {"celery", "kombu", "ekiden"}:
        advice = "; `ekiden port` says what to write instead"
    return ConfigurationError(f"{wanted_by}: the module {name!r} cannot be imported: {what_failed(error)}{advice}")


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f" ({error.filename}:{error.lineno})"
    place = ""
    frames = error.__traceback__
    while frames is not None:
        # The last line of the user's own: what it called of Python's or of ours says less.
        file = frames.tb_frame.f_code.co_filename
        if "importlib" not in file and not file.startswith(_OWN_DIRECTORY):
            place = f" ({file}:{frames.tb_lineno})"
        frames = frames.tb_next
    return place


def is_body_process() -> bool:
    """Whether this process was started to run bodies (``python -m ekiden.body_process``)."""
    return _program() == "ekiden.body_process"


def is_process_of_ours() -> bool:
    """Whether this is a worker process or a body process: one of several that do the same."""
    return _program() in {"ekiden.worker_process", "ekiden.body_process"}


def _program() -> str | None:
    """The module that ``python -m`` runs in this process."""
    return getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)


def import_object(path: str, wanted_by: str) -> object:
    """What ``MODULE``, or ``MODULE:ATTRIBUTE``, names. Raises ConfigurationError in one sentence."""
    module_name, colon, attribute = path.partition(":")
    module = import_module(module_name, wanted_by)
    if colon and not hasattr(module, attribute):
        raise ConfigurationError(f"{wanted_by}: the module {module_name!r} has no {attribute!r}.")
    return getattr(module, attribute) if colon else module


def places_of(source: object, names: Iterable[str]) -> dict[str, str]:
    """Where a module or class assigns these names, as ``file:line``; none for what its source does not show."""
    import ast  # only for programs that load settings from a module

    module = sys.modules.get(source.__module__) if isinstance(source, type) else source
    file = getattr(module, "__file__", None)
    if not isinstance(module, ModuleType) or not file:
        return {}
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    wanted = set(names)
    return {
        target.id: f"{file}:{node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id in wanted
    }


def public_values(source: object) -> dict[str, object]:
    """Names of a module or class that can be settings: not private, and not something imported or defined there."""
    names = [name for name in dir(source) if not name.startswith("_")]
    values = {name: getattr(source, name) for name in names}
    return {
        name: value
        for name, value in values.items()
        if not isinstance(value, ModuleType | type) and not callable(value)
    }


def import_related(
    packages: str | Iterable[str] | Callable[[], Iterable[str]] | None, related_name: str | None
) -> None:
    """Import a module of each package, where it exists; without ``packages``, of Django's apps, and run its checks.

    Raises ConfigurationError in one sentence.
    """
    of_django = packages is None
    if packages is None:
        if not _has_django_settings():
            logger.warning("autodiscover_tasks() names no packages, and no Django is set up here: it imports nothing")
            return
        packages = _django_apps()
    elif isinstance(packages, str):
        packages = [packages]
    for package in called(packages, "autodiscover_tasks(): its packages") if callable(packages) else packages:
        parent = import_module(package, "autodiscover_tasks()")
        if related_name is None or not hasattr(parent, "__path__"):
            continue  # a module has no others in it
        name = f"{parent.__name__}.{related_name}"
        if is_module(name):
            import_module(name, "autodiscover_tasks()")
    if of_django:
        _run_django_checks()


def _has_django_settings() -> bool:
    conf = sys.modules.get("django.conf")
    return bool(os.environ.get("DJANGO_SETTINGS_MODULE")) or (conf is not None and bool(conf.settings.configured))


def _run_django_checks() -> None:
    """Import what Django's checks import (URLs, admin): tasks may be declared in what only these know of."""
    checks = import_module("django.core.checks", "autodiscover_tasks()")
    called(checks.run_checks, "autodiscover_tasks(): Django's checks fail, see manage.py check")


def _django_apps() -> list[str]:
    apps = import_module("django.apps", "autodiscover_tasks() without packages").apps
    if not apps.ready:
        called(import_module("django", "autodiscover_tasks()").setup, "autodiscover_tasks(): django.setup() fails")
    return [config.name for config in apps.get_app_configs()]


def real_module_name(name: str, namespace: Mapping[str, Any]) -> str:
    """The name under which a worker imports a module that runs as a program (``__main__``) here."""
    if name != "__main__":
        return name
    spec = namespace.get("__spec__")
    if spec is not None:
        return str(spec.name).removesuffix(".__main__")
    file = namespace.get("__file__")
    if not file:
        return name
    path = Path(file).resolve()
    parts = [path.stem]
    while (path.parent / "__init__.py").exists():
        path = path.parent
        parts.append(path.name)
    return ".".join(reversed(parts))


def project_root(file: str | None) -> Path:
    """The nearest directory above ``file`` (or the current one) that holds pyproject.toml or .git, else its own."""
    start = Path(file).resolve().parent if file else Path.cwd()
    for directory in (start, *start.parents):
        if (directory / "pyproject.toml").exists() or (directory / ".git").exists():
            return directory
    return start
