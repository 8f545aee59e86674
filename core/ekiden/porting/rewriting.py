"""Rewrites what a machine can: imports of names that ekiden has, and lines that run the command. All else is left."""

from __future__ import annotations

import ast

from ekiden.porting.names import is_whole_here, moved
from ekiden.porting.reading import commands_in, imported_name, whole_import, with_our_command


def rewritten_python(text: str) -> str:
    """A module with Celery's imports written for ekiden. What ekiden does not have keeps its import, on a line below.

    Raises SyntaxError for what is not Python.
    """
    lines = text.splitlines(keepends=True)
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and len(node.names) == 1 and is_whole_here(tree, node.names[0]):
            line, start, end = node.lineno - 1, node.col_offset, node.end_col_offset
            if not lines[line][:start].strip() and node.end_lineno == node.lineno:
                lines[line] = lines[line][:start] + whole_import(node.names[0]) + lines[line][end:]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in sorted(imports, key=lambda each: each.lineno, reverse=True):
        module = node.module or ""
        found = [(alias, moved(module, alias.name)) for alias in node.names]
        if node.level or not any(here for _, here in found):
            continue
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        if lines[first][: node.col_offset].strip() or lines[last][node.end_col_offset :].split("#")[0].strip():
            continue  # it shares its line with another statement
        indent = lines[first][: node.col_offset]
        comment = lines[last][node.end_col_offset :].rstrip("\r\n")
        ending = "\r\n" if lines[last].endswith("\r\n") else "\n"
        by_module: dict[str, list[str]] = {}
        for alias, here in found:
            if here is not None:
                by_module.setdefault(here.module, []).append(imported_name(here, alias))
        new = [f"from {ours} import {', '.join(names)}" for ours, names in by_module.items()]
        left = [_as_written(alias) for alias, here in found if here is None]
        if left:
            new.append(f"from {module} import {', '.join(left)}")
        new[0] += comment
        lines[first : last + 1] = [f"{indent}{line}{ending}" for line in new]
    return "".join(lines)


def rewritten_commands(text: str) -> str:
    """A script with ``ekiden`` where it runs ``celery``."""
    wanted = {command.line for command in commands_in(text)}
    lines = text.splitlines(keepends=True)
    return "".join(with_our_command(line) if number in wanted else line for number, line in enumerate(lines, 1))


def _as_written(alias: ast.alias) -> str:
    return alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
