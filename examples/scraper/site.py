"""A site to crawl without a network: the standard library of the running Python, a page per module.

A page shows its module's docstring, functions and classes, and links to the modules that it imports and to those that
import it. The modules are read with ``ast``; nothing is imported. A site of any size hangs together: its modules are
taken in the order in which imports lead to them.
"""

from __future__ import annotations

import ast
import html
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FRONT_PAGE = "/"
FIRST_MODULES = ("asyncio", "http.server", "email", "concurrent.futures", "xml.dom", "unittest", "sqlite3", "zipfile")
SUFFIX = " · The standard library"
ROBOTS = "User-agent: *\nDisallow: /source/\n"


@dataclass(frozen=True, slots=True)
class Definition:
    """A function or class as its page shows it."""

    head: str
    summary: str


@dataclass(frozen=True, slots=True)
class Module:
    """What one source file says about itself. ``imports`` are full names, and may lead out of the site."""

    name: str
    path: Path
    docstring: str
    definitions: tuple[Definition, ...]
    imports: frozenset[str]


class Site:
    """Modules and the page of each. Never changes after it is made, so any thread may read it."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.modules = modules
        self.neighbours = {name: frozenset(self._linked_from(module)) for name, module in modules.items()}

    def _linked_from(self, module: Module) -> Iterator[str]:
        package = module.name.rpartition(".")[0]
        for name in (*module.imports, package):
            if name in self.modules and name != module.name:
                yield name

    @property
    def paths(self) -> list[str]:
        """The path of every page that a crawler should find."""
        return [FRONT_PAGE, *map(module_path, self.modules)]

    def page(self, path: str) -> str | None:
        """The HTML at this path, or None where there is no page."""
        if path == FRONT_PAGE:
            return self._front_page()
        module = self.modules.get(path.strip("/").replace("/", "."))
        return self._module_page(module) if module is not None else None

    def source(self, path: str) -> str | None:
        """The source text at this path, which robots are asked to leave alone, or None."""
        module = self.modules.get(path.removeprefix("/source/").replace("/", "."))
        return module.path.read_text(encoding="utf-8", errors="replace") if module is not None else None

    def _front_page(self) -> str:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        reached = {linked for name in self.modules for linked in self.neighbours[name]}
        first = [name for name in self.modules if name in FIRST_MODULES or name not in reached]
        return document(
            f"Python {version}",
            f"<p>{len(self.modules)} modules, one page each. Here are some to begin with.</p>{link_list(first)}",
        )

    def _module_page(self, module: Module) -> str:
        importers = [name for name, linked in self.neighbours.items() if module.name in linked]
        definitions = "".join(
            f"<dt><code>{html.escape(one.head)}</code></dt><dd>{html.escape(one.summary)}</dd>"
            for one in module.definitions
        )
        return document(
            module.name,
            f'<p><a href="/source{module_path(module.name)}">Source</a></p>'
            f"<pre>{html.escape(module.docstring)}</pre>"
            f"<h2>Needs</h2>{link_list(self.neighbours[module.name])}"
            f"<h2>Needed by</h2>{link_list(importers)}"
            f"<h2>Contents</h2><dl>{definitions}</dl>",
        )


def module_path(name: str) -> str:
    return "/" + name.replace(".", "/")


def link_list(names: Iterable[str]) -> str:
    items = "".join(f'<li><a href="{module_path(name)}">{name}</a></li>' for name in sorted(names))
    return f"<ul>{items}</ul>" if items else "<p>None.</p>"


def document(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}{SUFFIX}</title>'
        "<style>body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em}"
        "ul{columns:3;padding-left:1em}pre{white-space:pre-wrap}dd{color:#666}</style></head>"
        f'<body><nav><a href="{FRONT_PAGE}">All of it</a></nav><h1>{title}</h1>{body}</body></html>\n'
    )


def read_site(page_count: int) -> Site:
    """A site of this many pages, the front page among them, or of as many as there are modules for."""
    library = Library(Path(sysconfig.get_path("stdlib")))
    modules: dict[str, Module] = {}
    for module in library.walk((*FIRST_MODULES, *sorted(sys.stdlib_module_names))):
        if len(modules) >= page_count - 1:
            break
        modules[module.name] = module
    return Site(modules)


@dataclass(frozen=True, slots=True)
class Library:
    """A directory of Python source files."""

    root: Path

    def walk(self, names: Iterable[str]) -> Iterator[Module]:
        """These modules and all that they import, directly or not: breadth first, each once."""
        seen: set[str] = set()
        for name in names:
            waiting = [name]
            for name in waiting:
                path = self.find(name)
                if name in seen or path is None:
                    continue
                seen.add(name)
                module = read_module(name, path, library=self)
                waiting += [name.rpartition(".")[0], *sorted(module.imports)]
                yield module

    def find(self, name: str) -> Path | None:
        """The source file of a module; None for one that is written in C or no part of the library."""
        if name.partition(".")[0] not in sys.stdlib_module_names:
            return None
        stem = self.root.joinpath(*name.split("."))
        for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")):
            if path.is_file():
                return path
        return None


def read_module(name: str, path: Path, *, library: Library) -> Module:
    """Parse one file. Blocks for as long as that takes: up to a tenth of a second for the largest."""
    tree = ast.parse(path.read_bytes(), filename=str(path))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports = {
        found for node in statements(tree) for found in imported_names(node, package=package) if library.find(found)
    }
    definitions = tuple(
        Definition(head=definition_head(node), summary=first_line(ast.get_docstring(node)))
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    )
    return Module(name, path, ast.get_docstring(tree) or "", definitions, frozenset(imports))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement inside a node. Unlike ``ast.walk`` it leaves expressions alone, and so takes half the time."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from statements(child)


def imported_names(node: ast.AST, *, package: str) -> Iterator[str]:
    """The names that an import statement may mean: ``from a import b`` is ``a``, and ``a.b`` where that is a module."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        origin = ".".join([*above, *([node.module] if node.module else [])])
        yield origin
        for alias in node.names:
            yield f"{origin}.{alias.name}"


def definition_head(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(map(ast.unparse, node.bases))})".replace("()", "")
    return f"{node.name}({ast.unparse(node.args)})"


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
