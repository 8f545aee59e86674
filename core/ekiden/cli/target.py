"""The app that a command works for: its first argument, or ``-A``/``--app`` as Celery's users type it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

from ekiden.errors import EkidenError

if TYPE_CHECKING:
    from pathlib import Path

    from ekiden.app import Ekiden

_APP_OPTIONS = ["-A", "--app"]
_NOT_SEARCHED = {"node_modules", "site-packages", "tests", "venv", "build", "dist"}
_MOST_FILES_SEARCHED = 2000


class AppCommand(click.Command):
    """A command whose first argument is MODULE:APP.

    ``-A MODULE:APP``, before the command's name or behind it, says the same: ``ekiden -A shop worker``.
    """

    def __init__(self, *arguments: Any, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.params.append(click.Option(_APP_OPTIONS, expose_value=False, hidden=True, type=AppTarget()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put what ``-A`` says in the place of the first argument."""
        if ctx.resilient_parsing and args and args[-1].startswith("-"):
            args = args[:-1]  # the option whose value a shell completes: without one, click reads nothing of the line
        named = self._named(ctx, args)
        return super().parse_args(ctx, args if named is None else [named, *args])

    def _named(self, ctx: click.Context, args: Sequence[str]) -> str | None:
        before: str | None = ctx.find_root().params.get("app")
        try:
            options, _, _ = self.make_parser(ctx).parse_args(list(args))
        except click.UsageError:  # the parsing that follows reports it
            return before
        return options.get("app") or before


class AppTarget(StringParamType):
    """MODULE:APP. A shell completes it with the apps of the Python files below the current directory."""

    name = "module:app"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The apps that begin with ``incomplete``."""
        from pathlib import Path  # only where a shell completes a word

        return _items(apps_below(Path.cwd()), incomplete)


class TaskName(StringParamType):
    """The name of a task. A shell completes it with the tasks of the app that the command names."""

    name = "task"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The tasks whose names begin with ``incomplete``; the short names when it is a short one."""
        app = _named_app(ctx)
        if app is None:
            return []
        full = sorted(app.tasks)
        return _items(full, incomplete) or _items([name.rpartition(".")[2] for name in full], incomplete)


class QueueName(StringParamType):
    """The name of a queue. A shell completes it with the queues of the app that the command names."""

    name = "queue"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The queues that begin with what follows the last comma of ``incomplete``."""
        app = _named_app(ctx)
        before, comma, last = incomplete.rpartition(",")
        queues = [] if app is None else app.queues()
        return [CompletionItem(f"{before}{comma}{name}") for name in queues if name.startswith(last)]


app_argument = click.argument("target", metavar="MODULE:APP", type=AppTarget())
task_argument = click.argument("task", type=TaskName())
queue_argument = click.argument("queue", type=QueueName())


def apps_below(directory: Path) -> Iterator[str]:
    """``MODULE:APP`` for each app that a Python file here assigns at its top level, found without importing any."""
    for file in _python_files(directory):
        relative = file.relative_to(directory).with_suffix("")
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        try:
            text = file.read_text(encoding="utf-8")
            tree = ast.parse(text) if "kiden" in text else None
        except (OSError, SyntaxError, ValueError):
            continue  # what Python cannot read holds no app
        for name in [] if tree is None else _apps_assigned(tree):
            yield f"{'.'.join(parts)}:{name}"


def _python_files(directory: Path) -> Iterator[Path]:
    waiting = [directory]
    found = 0
    while waiting and found < _MOST_FILES_SEARCHED:
        for path in sorted(waiting.pop(0).iterdir()):
            if path.name.startswith(".") or path.name in _NOT_SEARCHED:
                continue
            if path.is_dir() and path.name.isidentifier():
                waiting.append(path)
            elif path.suffix == ".py":
                found += 1
                yield path


def _apps_assigned(tree: ast.Module) -> Iterator[str]:
    kinds = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == "Ekiden"
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called = node.value.func
            name = (
                called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
            )
            if name in kinds or name == "Ekiden":
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _named_app(ctx: click.Context) -> Ekiden | None:
    """The app of the command line that is being completed; None while it names none that can be loaded."""
    from ekiden.app import load_app  # the app and all that belongs to it, which a worker's supervisor does not need

    target = ctx.params.get("target")
    if not target:
        return None
    try:
        return load_app(target)
    except EkidenError:
        return None


def _items(names: Any, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
