"""Writes the parts of these pages that come from the code: ``python docs/generate.py``.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. A test holds every page to what this would
write.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import click
import ekiden
import msgspec
from ekiden import Ekiden, memory, options, plugins, signals
from ekiden import settings as app_settings
from ekiden.celery_settings import settings_of_celery as celery_settings_here
from ekiden.cli import ekiden as command_line
from ekiden.hooks import ALL
from ekiden.memory import MemoryBackend, MemoryConsumer, MemoryTransport
from ekiden.runner import Runner
from ekiden.transport import TransportDescription
from ekiden.urls import BrokerURL

_CORE = Path(ekiden.__file__).parent
_PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def generated(page: str) -> str:
    """``page`` with every generated part as it should be."""
    return _PART.sub(lambda match: f"{match[1]}\n{PARTS[match['name']]()}\n\n{match[3]}", page)


def settings() -> str:
    """Every setting: default, environment variable, meaning."""
    rows = [(f"`{name}`", _value(default), meaning) for name, _kind, default, meaning in app_settings.setting_docs()]
    return _table(("setting", "default", "meaning"), rows)


def task_options() -> str:
    """Every option of ``@app.task``, with its default where that is no setting."""
    defaults = {name: _option_default(name) for name in options.TaskOptions.__struct_fields__}
    return _table(("option", "unless it is said"), [(f"`{name}`", text) for name, text in defaults.items()])


def celery_settings() -> str:
    """Celery's settings that mean the same under their name or another, and what stands for those that do not."""
    rows = [(f"`{name}`", _sentence(here)) for name, here in celery_settings_here()]
    return _table(("Celery", "ekiden"), rows)


def transports() -> str:
    """What each transport of this repository says of itself."""
    descriptions = {name: _description(name) for name in _SCHEMES}
    rows = [(label, *(text(each) for each in descriptions.values())) for label, text in _TRANSPORT_ROWS]
    return _table(("", *(f"`{each.url_example}`" for each in descriptions.values())), rows)


def url_options() -> str:
    """The options of each transport's URL."""
    rows = []
    for name in _SCHEMES:
        kind = _description(name).options
        assert kind is not None
        hints = get_type_hints(kind, include_extras=True)
        rows += [
            (f"`{name}://`", f"`{field.name}`", _kind(hints[field.name]), _value(field.default))
            for field in msgspec.structs.fields(kind)
        ]
    return _table(("URL", "option", "value", "default"), rows)


def all_signals() -> str:
    """Every signal: when it is sent, with which fields."""
    rows = [(f"`{each.name}`", each.meaning, ", ".join(f"`{name}`" for name in each.fields) or "none") for each in ALL]
    assert all(hasattr(signals, each.name) for each in ALL)
    return _table(("signal", "when", "fields"), rows)


def commands() -> str:
    """What each command says with --help."""
    return "\n\n".join(_help_of(command_line, "ekiden"))


def frames() -> str:
    """The functions that one call passes through, from the top of each thread down, as a trace of one finds them."""
    lines = [
        f"    {file:<20} {name}" if file else f"\n{name}"
        for moment, stack in trace_a_call().items()
        for file, name in [("", moment), *stack]
    ]
    return "```text" + "\n".join(["", *lines])[1:] + "\n```"


PARTS: dict[str, Callable[[], str]] = {
    "celery-settings": celery_settings,
    "commands": commands,
    "frames": frames,
    "settings": settings,
    "signals": all_signals,
    "task-options": task_options,
    "transports": transports,
    "url-options": url_options,
}

_SCHEMES = ("memory", "sqlite", "redis", "amqp", "mongodb", "couchdb")
"""One for each transport of this repository."""


def _shortest_lease(each: TransportDescription) -> str:
    return "none: the connection" if each.connection_is_lease else f"{each.shortest_lease:g} s"


def _when_it_comes_back(each: TransportDescription) -> str:
    if each.connection_is_lease:
        return f"when the connection ends, {each.dead_consumer_noticed_within:g} s later where nobody ends it"
    return f"{each.dead_consumer_noticed_within:g} s after the lease"


_TRANSPORT_ROWS: tuple[tuple[str, Callable[[TransportDescription], str]], ...] = (
    ("what it is", lambda each: each.summary),
    ("what survives", lambda each: each.durability),
    ("several processes", lambda each: _yes(each.shared_between_processes)),
    ("a restart", lambda each: _yes(each.survives_restart)),
    ("how work is handed over", lambda each: each.hand_over),
    ("how who waits is woken", lambda each: each.wake_up),
    ("if the wake-up is lost", lambda each: f"within {each.wakes_within:g} s"),
    ("shortest lease", _shortest_lease),
    ("a dead worker's messages come back", _when_it_comes_back),
    ("says which messages it held already", lambda each: _yes(each.names_duplicates)),
    ("looking at a message counts as handing it out", lambda each: _yes(each.browsing_counts)),
    ("browses delayed messages", lambda each: _yes(each.browses_delayed)),
    ("browses leased messages", lambda each: _yes(each.browses_leased)),
    ("purges delayed messages", lambda each: _yes(each.purges_delayed)),
    ("counts delayed messages", lambda each: _yes(each.counts_delayed)),
    ("counts leased messages", lambda each: _yes(each.counts_leased)),
)


Stack = list[tuple[str, str]]


def trace_a_call() -> dict[str, Stack]:
    """Makes one call, on the broker in memory, and notes where it passes through which functions of ekiden."""
    app = Ekiden("shop", broker="memory://frames")

    @app.task(name="shop.add")
    def add(x: int, y: int) -> int:
        return x + y

    body = add.run
    moments = {
        MemoryTransport.publish.__code__: "In your process: the message is published",
        MemoryConsumer.receive.__code__: "In the worker, receiving thread: it is received",
        Runner.submit.__code__: "In the worker, receiving thread: it is handed out",
        body.__code__: "In the worker, one of its threads: the body runs",
        MemoryBackend.put.__code__: "In the worker, settling thread: the result is stored",
        MemoryConsumer.settle.__code__: "In the worker, settling thread: the message is settled",
        MemoryBackend.wait.__code__: "In your process: the result is waited for",
    }
    found: dict[str, Stack] = {}

    def note(frame: FrameType, event: str, _argument: object) -> None:
        moment = moments.get(frame.f_code) if event == "call" else None
        if moment is not None and moment not in found:
            found[moment] = _stack(frame, body.__code__)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        with app.worker(threads=1):
            add.delay(2, 3).get(timeout=10)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        memory.discard("frames")
    return {moment: found[moment] for moment in moments.values()}


def _stack(frame: FrameType | None, body: CodeType) -> Stack:
    stack: Stack = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if frame.f_code is body:
            stack.append(("shop.py", "add"))
        elif path.is_relative_to(_CORE) and not frame.f_code.co_qualname.startswith("InProcessWorker."):
            stack.append((str(path.relative_to(_CORE)), frame.f_code.co_qualname))
        frame = frame.f_back
    return stack[::-1]


def _description(scheme: str) -> TransportDescription:
    return plugins.transport_class(BrokerURL(text=f"{scheme}://", scheme=scheme)).description


def _help_of(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    settings = {**command.context_settings, "terminal_width": 100}
    context = click.Context(command, info_name=name.rpartition(" ")[2], parent=parent, **settings)
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    yield f"## {name}\n\n```text\n" + "\n".join(lines) + "\n```"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from _help_of(found, f"{name} {each}", context)


def _option_default(name: str) -> str:
    default = getattr(options.TaskOptions(), name)
    if default is not msgspec.UNSET:
        return _value(default)
    if name == "queue":
        return "a route of `task_routes`, else `task_default_queue`"
    if name == "priority":
        return "a route of `task_routes`, else `task_default_priority`"
    if name == "retry_backoff":
        return "`True`, unless `default_retry_delay` or its setting says something"
    known = {each for each, *_ in app_settings.setting_docs()}
    setting = next(
        each
        for each in (f"task_{name}", f"task_default_{name}", f"task_{name.removeprefix('default_')}", f"worker_{name}")
        if each in known
    )
    return f"the setting `{setting}`"


def _value(value: Any) -> str:
    if value in ((), {}):
        return "none"
    if isinstance(value, float) and value == int(value):
        value = int(value)
    if value is None or value == "":
        return "none"
    return f"`{value}`" if isinstance(value, str) else f"`{value!r}`"


def _kind(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _kind(get_args(kind)[0])  # its bounds are told where they are refused
    if get_origin(kind) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(kind))
    if get_origin(kind) is Annotated:
        return _kind(get_args(kind)[0])
    return " or ".join(_kind(each) for each in get_args(kind) if each is not NoneType) or f"`{kind.__name__}`"


def _yes(said: bool) -> str:
    return "yes" if said else "no"


def _sentence(advice: str) -> str:
    names = {each for each, *_ in app_settings.setting_docs()}
    return re.sub(r"\b[a-z]+(?:_[a-z]+)+\b", lambda match: f"`{match[0]}`" if match[0] in names else match[0], advice)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    for page in sorted(Path(__file__).parent.glob("*.md")):
        before = page.read_text("utf-8")
        after = generated(before)
        if after != before:
            page.write_text(after, "utf-8")
            sys.stdout.write(f"{page.name} was written\n")
