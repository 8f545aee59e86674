"""A project's files, read as text and syntax trees: what of Celery's stands where, and what becomes of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path

import msgspec

from ekiden import celery_settings
from ekiden.errors import ConfigurationError
from ekiden.options import call_options, declared_options
from ekiden.porting.names import Moved, instead_of, is_whole_here, moved
from ekiden.settings import Settings, is_meant_for_us, translated_setting

_NOT_READ = {"node_modules", "site-packages", "venv", "build", "dist", "__pycache__"}
_COMMAND = re.compile(
    r"(?<![\w./-])celery(?=\s+(?:-A|--app|-b|worker|beat|multi|inspect|control|purge|call|result|flower)\b)"
)
_COMMAND_FILES = {"Procfile", "Makefile", "Dockerfile", "supervisord.conf", "tox.ini"}
_COMMAND_ENDINGS = {".sh", ".yml", ".yaml", ".toml", ".service", ".conf", ".cfg", ".procfile"}
_LARGEST_FILE = 1_000_000
_TASK_DECORATORS = {"task", "shared_task", "periodic_task"}
_SENDS = {"apply_async", "send_task"}
_CALLS_MISSING = {
    "add_periodic_task": instead_of("celery.schedules", "schedule"),
    "broadcast": "ekiden sends workers no commands but revoking yet",
    "inspect": "ekiden does not ask running workers yet; `ekiden queues` shows what they have in hand",
}
"""Methods of Celery's app and control, by name."""


class Fate(StrEnum):
    """What becomes of something of Celery's."""

    STAYS = "stays"
    BECOMES = "becomes"
    MISSING = "missing"


class Finding(msgspec.Struct, frozen=True):
    """One thing of Celery's in a project: where it stands, what it is, and what becomes of it."""

    file: str
    line: int
    fate: Fate
    what: str
    text: str


class Command(msgspec.Struct, frozen=True):
    """A line of a script or a service file that runs the ``celery`` command."""

    line: int
    text: str


def files_below(path: Path) -> Iterator[Path]:
    """The files that may hold something of Celery's: ``path`` itself, or those below it."""
    if path.is_file():
        yield path
        return
    for each in sorted(path.iterdir()):
        if each.name.startswith(".") or each.name in _NOT_READ or each.is_symlink():
            continue
        if each.is_dir():
            yield from files_below(each)
        elif each.suffix == ".py" or is_command_file(each):
            yield each


def is_command_file(path: Path) -> bool:
    """Whether a file may run commands: a script, or what a service manager reads."""
    return path.name in _COMMAND_FILES or path.suffix in _COMMAND_ENDINGS


def findings_in(path: Path, shown: str) -> list[Finding]:
    """What one file holds, in the order of its lines; ``shown`` is how it is named. Raises OSError."""
    if path.stat().st_size > _LARGEST_FILE:
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".py":
        return [_command(shown, command) for command in commands_in(text)]
    if "celery" not in text.lower() and "kombu" not in text:
        return []
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        return [Finding(shown, line, Fate.MISSING, "the file", f"cannot be read as Python: {error}")]
    reader = _Reader(shown, tree)
    reader.visit(tree)
    return sorted(reader.findings, key=lambda each: each.line)


def commands_in(text: str) -> list[Command]:
    """The lines that run the ``celery`` command."""
    return [
        Command(number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if _COMMAND.search(line) and not line.lstrip().startswith("#")
    ]


def with_our_command(line: str) -> str:
    """A line with ``ekiden`` where it runs ``celery``."""
    return _COMMAND.sub("ekiden", line)


def _command(shown: str, command: Command) -> Finding:
    from ekiden.cli.celery_words import COMMANDS  # the words of the command are the command's

    for name, sentence in COMMANDS.items():
        if re.search(rf"\bcelery\b.*\s{name}\b", command.text):
            return Finding(shown, command.line, Fate.MISSING, f"celery {name}", sentence)
    return Finding(shown, command.line, Fate.BECOMES, "the command celery", with_our_command(command.text))


class _Reader(ast.NodeVisitor):
    """Collects findings of one module. ``_celery_names`` are what it has imported of Celery's, under its own names."""

    def __init__(self, shown: str, tree: ast.AST) -> None:
        self._shown = shown
        self._tree = tree
        self.findings: list[Finding] = []
        self._celery_names: set[str] = set()

    def _found(self, node: ast.AST, fate: Fate, what: str, text: str) -> None:
        self.findings.append(Finding(self._shown, getattr(node, "lineno", 1), fate, what, text))

    # Imports.

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level or not _is_celerys(module):
            return
        for alias in node.names:
            self._celery_names.add(alias.asname or alias.name)
            what = f"from {module} import {alias.name}"
            found = moved(module, alias.name)
            if found is None:
                self._found(node, Fate.MISSING, what, instead_of(module, alias.name))
            else:
                self._found(node, Fate.BECOMES, what, import_line(found, alias))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if _is_celerys(alias.name):
                self._celery_names.add((alias.asname or alias.name).partition(".")[0])
                if is_whole_here(self._tree, alias):
                    self._found(node, Fate.BECOMES, f"import {alias.name}", whole_import(alias))
                    continue
                self._found(
                    node,
                    Fate.MISSING,
                    f"import {alias.name}",
                    "import the names that are used instead: from ekiden import Ekiden, shared_task"
                    if alias.name.startswith("celery")
                    else instead_of(alias.name, "*"),
                )

    # Settings.

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id.isupper() and "CELERY" in target.id:
                self._setting(node, target.id, node.value, namespace="CELERY_")
            elif isinstance(target, ast.Attribute) and _ends_with_conf(target.value):
                self._setting(node, target.attr, node.value)
            elif isinstance(target, ast.Name) and self._is_settings_module():
                self._setting(node, target.id, node.value)
        self.generic_visit(node)

    def _is_settings_module(self) -> bool:
        return Path(self._shown).stem in {"celeryconfig", "celery_config", "celery_settings"}

    def _setting(self, node: ast.AST, name: str, value: ast.expr, *, namespace: str = "") -> None:
        bare = celery_settings.current_name(name.removeprefix(namespace)) if namespace else name
        known = celery_settings.current_name(name)
        candidate = known if celery_settings.is_celerys(known) or not namespace else bare
        if not is_meant_for_us(candidate):
            return
        try:
            literal = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            literal = _UNKNOWN
        self._found(node, *_setting_fate(name, candidate, literal))

    # Declarations and calls.

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for decorator in node.decorator_list:
            name = _last_name(decorator.func if isinstance(decorator, ast.Call) else decorator)
            if name in _TASK_DECORATORS:
                keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
                self._task(decorator, node.name, keywords)
        self.generic_visit(node)

    def _task(self, node: ast.AST, name: str, keywords: list[ast.keyword]) -> None:
        refused = False
        for keyword in keywords:
            if keyword.arg is None or keyword.arg in {"bind", "base", "name"}:
                continue
            try:
                declared_options(name, {keyword.arg: _example(keyword.value)})
            except ConfigurationError as error:
                if "there is no option" in str(error):
                    refused = True
                    self._found(keyword.value, Fate.MISSING, f"{keyword.arg}= of {name}", str(error))
        if not refused:
            self._found(node, Fate.STAYS, f"the task {name}", "declared as here")

    def visit_Call(self, node: ast.Call) -> None:
        name = _last_name(node.func)
        if name in _SENDS:
            self._sending(node)
        elif name == "update" and isinstance(node.func, ast.Attribute) and _ends_with_conf(node.func.value):
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self._setting(keyword.value, keyword.arg, keyword.value)
            for argument in node.args:
                self._settings_in(argument)
        elif isinstance(node.func, ast.Attribute) and name in _CALLS_MISSING and self._celery_names:
            self._found(node, Fate.MISSING, f"{ast.unparse(node.func)}()", _CALLS_MISSING[name])
        elif name == "Celery":
            for keyword in node.keywords:
                if keyword.arg is not None and is_meant_for_us(keyword.arg):
                    self._setting(keyword.value, keyword.arg, keyword.value)
        self.generic_visit(node)

    def _settings_in(self, argument: ast.expr) -> None:
        if isinstance(argument, ast.Dict):
            for key, value in zip(argument.keys, argument.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self._setting(value, key.value, value)

    def _sending(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg is not None and keyword.arg not in {"args", "kwargs", "name"}:
                try:
                    call_options("the call", {keyword.arg: None})
                except ConfigurationError as error:
                    self._found(keyword.value, Fate.MISSING, f"{keyword.arg}= of a call", str(error))


_UNKNOWN = object()
"""What a setting is when its value is not written in the source."""


def _setting_fate(name: str, known: str, value: object) -> tuple[Fate, str, str]:
    what = f"the setting {name}"
    try:
        found = translated_setting(known, None if value is _UNKNOWN else value)
        if found is not None and value is not _UNKNOWN:
            setattr(Settings(), *found)
    except ConfigurationError as error:
        if value is _UNKNOWN and not str(error).startswith("ekiden has no setting"):
            return Fate.STAYS, what, "its value is not known here"
        return Fate.MISSING, what, str(error)
    if found is None:
        return Fate.STAYS, what, "nothing needs to be done"
    if found[0] == known:
        return Fate.STAYS, what, "means the same"
    return Fate.STAYS, what, f"is taken for {found[0]}"


def _example(value: ast.expr) -> object:
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def import_line(found: Moved, alias: ast.alias) -> str:
    """The import of a name here under the name that the program uses."""
    return f"from {found.module} import {imported_name(found, alias)}"


def whole_import(alias: ast.alias) -> str:
    """The import of ekiden under the name that the program uses for Celery."""
    return f"import ekiden as {alias.asname or alias.name}"


def imported_name(found: Moved, alias: ast.alias) -> str:
    """A name here, and the one that the program uses where it is another one."""
    used = alias.asname or alias.name
    return found.name if used == found.name else f"{found.name} as {used}"


def _is_celerys(module: str) -> bool:
    return module.partition(".")[0] in {"celery", "kombu", "django_celery_beat", "django_celery_results"}


def _ends_with_conf(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "conf"


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def count(findings: list[Finding]) -> Mapping[Fate, int]:
    """How many of each fate there are."""
    return {fate: sum(each.fate is fate for each in findings) for fate in Fate}
