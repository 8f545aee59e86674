"""TaskSet: declares tasks, for one app or for any app that includes them; and what ``@task`` is for type checkers."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Coroutine, Mapping
from types import MappingProxyType, MethodType
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from ekiden.errors import ConfigurationError, MisuseError
from ekiden.modules import real_module_name
from ekiden.options import check_task_name, declared_options, options_of_class, options_of_object
from ekiden.task import AsyncTask, Task, TaskApp

P = ParamSpec("P")
R = TypeVar("R")
CustomTask = TypeVar("CustomTask", bound=Task[..., Any])


class IncludingApp(TaskApp, Protocol):
    """An app that can include task sets."""

    name: str


class TaskSet:
    """Tasks that belong to no app until apps include them: ``app.include_tasks(tasks)``.

    A task is sent through the one app that included its set; it is an error when none did, or several.
    """

    def __init__(self, name: str = "tasks") -> None:
        self.name = name
        self.Task: type[Task[..., Any]] = Task
        self._tasks: dict[str, Task[..., Any]] = {}
        self._apps: weakref.WeakSet[IncludingApp] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<TaskSet {self.name}: {len(self._tasks)} tasks>"

    @property
    def tasks(self) -> Mapping[str, Task[..., Any]]:
        """The tasks by name."""
        return MappingProxyType(self._tasks)

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
    @overload
    def task(
        self, *, base: type[CustomTask], bind: bool = ..., **options: Any
    ) -> Callable[[Callable[..., Any]], CustomTask]: ...
    @overload
    def task(self, *, bind: Literal[True], **options: Any) -> _BoundDecorator: ...
    @overload
    def task(self, *, bind: Literal[False] = ..., **options: Any) -> _Decorator: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        bind: bool = False,
        base: type[Task[..., Any]] | None = None,
        **options: Any,
    ) -> Any:
        """Declare a function to be a task; as ``@task`` or ``@task(...)``. Returns a Task.

        ``name``: else the module's and the function's. ``bind``: the function's first parameter is the task itself.
        ``base``: a subclass of Task (else the attribute ``Task``); attributes of it that are named like options are the
        defaults of these. The other options are those of TaskOptions. Raises ConfigurationError for an option that does
        not exist or fit, for what no worker could run, and for a name that another function has.
        """
        if function is None:
            return lambda declared: self.task(declared, name=name, bind=bind, base=base, **options)  # type: ignore[call-overload]
        _check_function(function, name)
        task_name = name or f"{_module_name(function)}.{function.__qualname__.replace('<locals>.', '')}"
        own = self.Task if self.Task is not Task else None
        kind = base or own or (AsyncTask if inspect.iscoroutinefunction(function) else Task)
        of_class = options_of_class(kind, Task)
        declared = declared_options(task_name, {**of_class, **options})
        task = kind(function, name=task_name, options=declared, bind=bind, find_app=self._find_app)
        # What the decorator says goes over the class, also for who reads the attribute.
        vars(task).update({name: options[name] for name in of_class if name in options})
        _check_where_it_runs(task)
        task.parameters.check_declared(task_name)
        self._add(task)
        return task

    def register_task(self, task: Task[..., Any] | type[Task[..., Any]], **options: Any) -> Task[..., Any]:
        """Declare a class with a ``run`` method, or an object of it, to be a task; returns the object.

        Its attributes that are named like options are its options, ``name`` its name; the object's own go over those
        of its class, so that objects of one class can be several tasks. Raises ConfigurationError as ``task`` does.
        """
        made = task() if isinstance(task, type) else task
        kind = type(made)
        run = vars(kind).get("run") or getattr(kind, "run", None)
        if run is None:
            raise ConfigurationError(f"{kind.__qualname__} has no run method for a worker to call.")
        name = options.pop("name", None) or getattr(made, "name", None) or f"{_module_name(run)}.{kind.__qualname__}"
        declared = declared_options(name, {**options_of_object(made, Task), **options})
        Task.__init__(made, MethodType(run, made), name=name, options=declared, bind=False, find_app=self._find_app)
        _check_where_it_runs(made)
        made.parameters.check_declared(name)
        self._add(made)
        return made

    __call__ = task
    """The same as ``task``, so that ``@shared_task`` works as a decorator."""

    def included_by(self, app: IncludingApp) -> None:
        """Remember that ``app`` sends these tasks, for as long as it lives."""
        self._apps.add(app)

    def _add(self, task: Task[..., Any]) -> None:
        check_task_name(task.name)
        there = self._tasks.get(task.name)
        if there is not None and (there.declared_at, there.__qualname__) != (task.declared_at, task.__qualname__):
            raise ConfigurationError(
                f"two tasks are called {task.name!r}: {there.declared_at} and {task.declared_at}; give one of them "
                "name=."
            )
        if there is not None and _is_another(there.__wrapped__, task.__wrapped__):
            raise ConfigurationError(
                f"two tasks are called {task.name!r}: both are functions that {task.declared_at} makes; give each "
                "name=, or use functools.wraps() where a decorator makes them."
            )
        self._tasks[task.name] = task

    def _find_app(self, task_name: str) -> TaskApp:
        apps = list(self._apps)
        if len(apps) == 1:
            return apps[0]
        if not apps:
            raise MisuseError(
                f"{task_name} belongs to no app yet: call app.include_tasks() or app.autodiscover_tasks() on the app "
                "that is to send it."
            )
        names = ", ".join(sorted(repr(app.name) for app in apps))
        raise MisuseError(
            f"{task_name} was included by several apps ({names}); say which: app.tasks[{task_name!r}].delay(...)."
        )


shared_task = TaskSet("shared_task")
"""The process-wide TaskSet: ``@shared_task`` declares tasks in modules that do not know the app."""


class _Decorator(Protocol):
    """What ``@app.task(...)`` is for type checkers."""

    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class _BoundDecorator(Protocol):
    """What ``@app.task(bind=True, ...)`` is for type checkers: the first parameter is not the caller's."""

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> Task[P, R]: ...


def _check_function(function: object, name: str | None) -> None:
    """Raise ConfigurationError for what no worker could run, or what has no name to be found by."""
    if not callable(function):
        raise ConfigurationError(f"a task is declared on a function, not on {function!r}.")
    if isinstance(function, type):
        raise ConfigurationError(
            f"a task is declared on a function, not on the class {function.__qualname__}; declare one with base=."
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{getattr(function, '__qualname__', function)}() is a generator, and nobody would take its values; return "
            "a list, or send a task for each value."
        )
    if name is None and not hasattr(function, "__qualname__"):
        raise ConfigurationError(f"{function!r} has no name that a worker could find it by; give it name=.")


def _is_another(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether one piece of code made two functions that do different things: closures, methods of two objects.

    A module that is imported again has code of its own.
    """
    code = getattr(getattr(one, "__func__", one), "__code__", None)
    if one is other or code is None or code is not getattr(getattr(other, "__func__", other), "__code__", None):
        return False
    return _bound_to(one) != _bound_to(other)


def _bound_to(function: Callable[..., Any]) -> list[int]:
    """What tells functions of the same code apart: the object of a method, the variables of a closure."""
    cells = getattr(getattr(function, "__func__", function), "__closure__", None) or ()
    return [id(getattr(function, "__self__", None)), *(id(cell) for cell in cells)]


def _check_where_it_runs(task: Task[..., Any]) -> None:
    options = task.options
    if task.is_async and options.pool == "process":
        raise ConfigurationError(
            f"task {task.name}: an async def task runs in the event loop; leave pool= out, or make it a def."
        )
    if options.pool == "thread" and isinstance(options.time_limit, int | float):
        raise ConfigurationError(
            f"task {task.name}: a thread cannot be ended from outside, so pool='thread' has no time_limit; leave pool= "
            "out and it runs in a process of its own, or use soft_time_limit."
        )


def _module_name(function: Callable[..., Any]) -> str:
    namespace = getattr(function, "__globals__", None)
    if namespace is None:  # an object that can be called, or wraps a function
        namespace = vars(sys.modules.get(function.__module__, sys))
    return real_module_name(function.__module__, namespace)
