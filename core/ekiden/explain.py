"""What will happen to a call of a task, step by step, read from the code that does it.

A call is really made: of a task that does nothing but has the same options and settings, on a broker in memory. Every
function of ekiden that is called on its way is noted; those with a docstring are the steps. What a worker does as well
when there is no message is left out. Methods of the memory broker are shown as those of the app's own transport and
backend, because these will run instead. The user's function, handlers and signal receivers are never called.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from types import CodeType, FrameType, FunctionType
from typing import Any, Self

import msgspec
from msgspec.structs import replace

import ekiden
from ekiden import body_process, hooks, memory, plugins, probe
from ekiden.app import Ekiden
from ekiden.body_frames import Run
from ekiden.memory import MemoryBackend, MemoryConsumer, MemoryTransport
from ekiden.message import Message
from ekiden.options import TaskOptions, policy
from ekiden.plan import WorkerOptions
from ekiden.results import Backend
from ekiden.settings import Settings
from ekiden.task import Task
from ekiden.transport import Consumer, Transport
from ekiden.worker import Worker

HERE, BROKER, WORKER, HOME = "in your process", "at the broker", "in the worker", "back home"
IDLE = "in a worker that has nothing to do"

_PACKAGE = os.path.dirname(ekiden.__file__) + os.sep
_DEADLINE_SECONDS = 20.0
_NOT_THE_APPS = {"broker_url", "result_backend", "include", "worker_queues", "worker_threads"}


class Step(msgspec.Struct, frozen=True):
    """One function that a call passes through: where, its name, what it says of itself, and where it is written.

    ``depth`` is the number of steps that it is inside of.
    """

    number: int
    where: str
    depth: int
    name: str
    does: str
    file: str
    line: int


class Fact(msgspec.Struct, frozen=True):
    """Something that holds for this call, and who said so."""

    name: str
    value: str
    said_by: str


class Explanation(msgspec.Struct, frozen=True):
    """What will happen to a call of ``task``."""

    task: str
    facts: list[Fact]
    steps: list[Step]


def explain(app: Ekiden, task: Task[..., Any]) -> Explanation:
    """Explain a call of ``task``. Takes a fraction of a second, and asks no broker but one in memory."""
    return Explanation(task.name, facts_of(app, task), list(steps_of(app, task)))


# What holds.


def facts_of(app: Ekiden, task: Task[..., Any]) -> list[Fact]:
    """Where a call goes, how it is treated, and who said so."""
    sending = app.route(task.name, None, None)
    broker, backend = app.broker_url(), app.backend_url()
    kind = plugins.transport_class(broker)
    facts = [
        Fact("function", task.parameters.declared, task.declared_at),
        Fact("queue", sending.queue, sending.queue_from),
        Fact("priority", str(sending.priority), sending.priority_from),
        Fact("broker", str(broker), _said_by(app.conf.broker_url, "broker_url")),
        Fact("transport", _name_of(kind), kind.description.summary),
        Fact("hand-over", kind.description.hand_over, _name_of(kind)),
        Fact("durability", kind.description.durability, _name_of(kind)),
    ]
    facts += [
        Fact("results", str(backend), _said_by(app.conf.result_backend, "result_backend")),
        Fact("backend", _name_of(plugins.backend_class(backend)), "its URL"),
    ]
    bare = policy(app.conf, TaskOptions())
    for name, value in msgspec.structs.asdict(app.policy(task)).items():
        said_by = "the settings" if value == getattr(bare, name) else "the task's declaration"
        facts.append(Fact(name, repr(value), said_by))
    facts += [Fact("handler", name, _name_of(type(task))) for name in _overridden(type(task))]
    facts += [
        Fact("receiver", _name_of(receiver), f"the signal {signal.name}")
        for signal in hooks.ALL
        for receiver, sender in signal.receivers
        if sender in (None, task, task.name)
    ]
    return facts


def _overridden(kind: type) -> list[str]:
    """The methods of Task that the user's own class replaces."""
    return [
        name
        for name, method in inspect.getmembers(kind, inspect.isfunction)
        if hasattr(Task, name) and not method.__module__.startswith(f"{ekiden.__name__}.")
    ]


def _said_by(value: object, setting: str) -> str:
    return f"the default of the setting {setting}" if value is None else f"the setting {setting}"


def _name_of(found: object) -> str:
    name = getattr(found, "__qualname__", None)
    return repr(found) if name is None else f"{getattr(found, '__module__', '?')}.{name}"


# What happens.


def steps_of(app: Ekiden, task: Task[..., Any]) -> Iterator[Step]:
    """Send a call through the probe, and tell what it passed through."""
    stand_ins = _StandIns(app, task)
    told: set[tuple[str, str]] = set()
    above: dict[int, list[int]] = {}
    for where, noted in _probe(app, task):
        callers = above.setdefault(noted.thread, [])
        while callers and callers[-1] >= noted.depth:
            callers.pop()
        shown = None if where == IDLE else stand_ins.of(noted)
        if shown is None:
            continue
        place = BROKER if where == HERE and shown.is_transport else where
        depth = len(callers)
        callers.append(noted.depth)
        if (place, shown.name) not in told:
            told.add((place, shown.name))
            yield Step(len(told), place, depth, shown.name, shown.sentence, shown.file, shown.line)


class Noted(msgspec.Struct, frozen=True):
    """A call of a function of ekiden: its code and module, whose code called it, in which thread, how deep."""

    code: CodeType
    module: str
    called_from: str
    thread: int
    depth: int


class Tracer:
    """Notes the calls of ekiden's functions: of all threads started while it is entered, and of ``traced`` blocks.

    ``depth`` counts the functions of ekiden that the call is inside of.
    """

    def __init__(self) -> None:
        self.calls: list[Noted] = []
        self._depths: dict[int, int] = {}

    def __enter__(self) -> Self:
        threading.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)

    @contextmanager
    def traced(self) -> Iterator[None]:
        """Note what this thread calls in the block."""
        before = sys.getprofile()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _note(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event not in {"call", "return"} or code.co_filename == __file__ or not code.co_filename.startswith(_PACKAGE):
            return
        thread = threading.get_ident()
        depth = self._depths.get(thread, 0)
        if event == "return":
            self._depths[thread] = depth - 1
            return
        self._depths[thread] = depth + 1
        caller = "" if frame.f_back is None else frame.f_back.f_globals.get("__name__", "")
        self.calls.append(Noted(code, frame.f_globals["__name__"], caller, thread, depth))


def _probe(app: Ekiden, task: Task[..., Any]) -> Iterator[tuple[str, Noted]]:
    """Every call that a call of ``task`` leads to, in order, and where it happens."""
    body = probe.nothing_async if task.is_async else probe.nothing
    with _dressed_as(app, task, body), probe.app:
        queue = probe.app.route(body.name, None, None).queue
        probe.app.transport.purge(queue)
        idle = {noted.code for noted in _calls_of_a_worker(queue)} - {MemoryConsumer.receive.__code__}

        sending = Tracer()
        with sending.traced():
            result = body.delay()
        (seen,) = probe.app.transport.browse(queue)
        yield from ((HERE, noted) for noted in sending.calls)

        for noted in _until_it_stops(_calls_of_a_worker(queue)):
            yield (IDLE if noted.code in idle else WORKER), noted
            if noted.code is body_process.BodyProcess.run.__code__:
                yield from ((WORKER, inside) for inside in _calls_in_a_body_process(seen.message, noted))

        if not probe.app.policy(body).ignore_result:
            fetching = Tracer()
            with fetching.traced():
                result.get(_DEADLINE_SECONDS)
            yield from ((HOME, noted) for noted in fetching.calls)


@contextmanager
def _dressed_as(app: Ekiden, task: Task[..., Any], body: Task[..., Any]) -> Iterator[None]:
    """The probe has the app's settings and the task's options, and nobody listens to signals."""
    receivers = {signal: signal.receivers for signal in hooks.ALL}
    for each in fields(Settings):
        if each.name not in _NOT_THE_APPS:
            setattr(probe.app.conf, each.name, getattr(app.conf, each.name))
    probe.app.conf.result_backend = probe.STORE if app.stores_results() else str(app.backend_url())
    options, body.options = body.options, task.options
    for signal in hooks.ALL:
        signal.receivers = ()
    try:
        yield
    finally:
        body.options = options
        for signal, heard_by in receivers.items():
            signal.receivers = heard_by


def _calls_of_a_worker(queue: str) -> list[Noted]:
    """What a worker calls that starts, works off what is there, and ends."""
    with Tracer() as tracer, tracer.traced():
        Worker(probe.app, WorkerOptions(queues=(queue,), burst=True, threads=2)).run()
    return tracer.calls


def _until_it_stops(calls: list[Noted]) -> list[Noted]:
    """A worker's calls until it begins to stop. The receiver, which ran here, hands out before anything is done."""
    stops = next(index for index, noted in enumerate(calls) if noted.code is MemoryConsumer.stop.__code__)
    return sorted(calls[:stops], key=lambda noted: noted.thread != threading.get_ident())


def _calls_in_a_body_process(message: Message, called_by: Noted) -> list[Noted]:
    """What a body process calls to execute ``message``: its own code, run here."""
    tracer = Tracer()
    with tracer.traced():
        body_process.execute(probe.app, Run(message, 1, __name__, None))
    inside = called_by.depth + 1
    return [replace(noted, thread=called_by.thread, depth=noted.depth + inside) for noted in tracer.calls]


# What is shown of a function.


class _Shown(msgspec.Struct, frozen=True):
    """What a step says of its function."""

    name: str
    sentence: str
    file: str
    line: int
    is_transport: bool = False


class _StandIns:
    """Finds the function that a noted call was of; for one of the memory broker, what stands there for this app."""

    def __init__(self, app: Ekiden, task: Task[..., Any]) -> None:
        transport = plugins.transport_class(app.broker_url())
        self._task = task
        self._bodies = {probe.nothing.function.__code__, probe.nothing_async.function.__code__}
        self._classes: dict[type, tuple[type, type]] = {
            MemoryTransport: (Transport, transport),
            MemoryConsumer: (Consumer, _beside(transport, Consumer)),
            MemoryBackend: (Backend, plugins.backend_class(app.backend_url())),
        }

    def of(self, noted: Noted) -> _Shown | None:
        """What is shown of a call; None for one that is no step: it has no docstring, or is a detail of the broker."""
        if noted.code in self._bodies:
            name = self._task.__qualname__.rpartition("<locals>.")[2]
            return _shown(name, self._task.__wrapped__, self._task.parameters.declared)
        owner, name = _resolved(noted)
        if _is_memory(noted.module):
            interface, real = self._classes.get(owner, (object, object))
            if name not in interface.__dict__ or name.startswith("_"):
                return None
            shown = _shown(f"{real.__qualname__}.{name}", getattr(real, name))
            return replace(shown, is_transport=interface is Transport)
        function = inspect.getattr_static(owner, name, None)
        function = getattr(function, "__func__", function)
        is_step = isinstance(function, FunctionType) and inspect.getdoc(function) and not name.startswith("__")
        if not is_step or _is_memory(noted.called_from):
            return None
        return _shown(noted.code.co_qualname, function)


def _is_memory(module: str) -> bool:
    return f"{module}.".startswith(f"{memory.__name__}.")


def _resolved(noted: Noted) -> tuple[Any, str]:
    """The class or module that a function belongs to, and its name there."""
    *path, name = noted.code.co_qualname.split(".")
    owner: Any = sys.modules[noted.module]
    for part in path:
        owner = inspect.getattr_static(owner, part, None)
    return owner, name


def _beside(transport: type[Transport], interface: type) -> type:
    """The class that implements ``interface`` for this transport: the one in its module, else in its package."""
    for place in (transport.__module__, transport.__module__.rpartition(".")[0]):
        kinds: list[type] = interface.__subclasses__()
        found = [kind for kind in kinds if place and kind.__module__.startswith(place)]
        if len(found) == 1:
            return found[0]
    return interface


def _shown(name: str, function: Any, otherwise: str = "") -> _Shown:
    code = inspect.unwrap(function).__code__
    text = " ".join((inspect.getdoc(function) or otherwise).partition("\n\n")[0].split())
    sentence, stop, _ = text.partition(". ")
    return _Shown(name, sentence + stop.strip(), code.co_filename, code.co_firstlineno)
