"""The app: its tasks, its settings, and the one place where the parts are put together.

    app = Ekiden("shop", broker="redis://localhost")

    @app.task
    def add(x, y): ...

A TaskSet carries tasks for apps to include; ``shared_task`` is the process-wide one. Nothing is opened before it is
needed, and nothing of one app is seen by another.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MappingProxyType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, Self, TypeVar, overload

import msgspec

from ekiden import control, plugins
from ekiden.codec import decode_call
from ekiden.errors import ConfigurationError, MisuseError, NotRegistered
from ekiden.execution import Context, Request, run, run_async, running, verdict
from ekiden.message import DEAD_SUFFIX, Delivery, Message
from ekiden.options import (
    ENVIRONMENT_PREFIX,
    Policy,
    Sending,
    Settings,
    checked_setting,
    declared_options,
    merge,
    policy,
    read_route,
    translated_setting,
)
from ekiden.publisher import Publisher
from ekiden.results import AsyncResult, Backend, StoredResult
from ekiden.signature import Signature
from ekiden.task import AsyncTask, Task, TaskApp, call_options, compose, options_of, send
from ekiden.transport import Transport
from ekiden.urls import BrokerURL, parse_url

if TYPE_CHECKING:
    from ekiden.futures import WaitingThread
    from ekiden.worker import InProcessWorker

P = ParamSpec("P")
R = TypeVar("R")
CustomTask = TypeVar("CustomTask", bound=Task[..., Any])


class TaskSet:
    """Tasks that belong to no app until apps include them: ``app.include_tasks(tasks)``.

    A task is sent through the one app that included its set; it is an error when none did, or several.
    """

    def __init__(self, name: str = "tasks") -> None:
        self.name = name
        self._tasks: dict[str, Task[..., Any]] = {}
        self._apps: weakref.WeakSet[Ekiden] = weakref.WeakSet()

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
    def task(self, *, base: type[CustomTask], bind: bool = ..., **options: Any) -> Callable[[Callable[..., Any]], CustomTask]: ...
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
        ``base``: a subclass of Task. The other options are those of TaskOptions. Raises ConfigurationError for an
        option that does not exist or fit, and for a name that another function has.
        """
        if function is None:
            return lambda declared: self.task(declared, name=name, bind=bind, base=base, **options)  # type: ignore[call-overload]
        if not isinstance(function, FunctionType) and not callable(function):
            raise ConfigurationError(f"a task is declared on a function, not on {function!r}.")
        task_name = name or f"{_module_name(function)}.{function.__qualname__.replace('<locals>.', '')}"
        declared_options_ = declared_options(task_name, options)
        kind = base or (AsyncTask if inspect.iscoroutinefunction(function) else Task)
        task = kind(function, name=task_name, options=declared_options_, bind=bind, find_app=self._find_app)
        _check_where_it_runs(task)
        self._add(task)
        return task

    def __call__(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """The same as ``task``, so that ``@shared_task`` works as a decorator."""
        return self.task(function, **options)  # type: ignore[call-overload]

    def _add(self, task: Task[..., Any]) -> None:
        there = self._tasks.get(task.name)
        if there is not None and (there.declared_at, there.__qualname__) != (task.declared_at, task.__qualname__):
            raise ConfigurationError(
                f"two tasks are called {task.name!r}: {there.declared_at} and {task.declared_at}; give one of them name=."
            )
        self._tasks[task.name] = task

    def _find_app(self, task_name: str) -> TaskApp:
        apps = list(self._apps)
        if len(apps) == 1:
            return apps[0]
        if not apps:
            raise MisuseError(
                f"{task_name} belongs to no app yet: call app.include_tasks() or app.autodiscover_tasks() on the app that "
                "is to send it."
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


class Control:
    """``app.control``: tells running workers what to do."""

    def __init__(self, app: Ekiden) -> None:
        self._app = app

    def revoke(self, task_id: str | Sequence[str], *, terminate: bool = False) -> None:
        """Have tasks not run when a worker claims them; with ``terminate``, end those that are running."""
        self._app.revoke(task_id, terminate=terminate)


class Ekiden(TaskSet):
    """An app: tasks that are sent to one broker, and whose results one backend keeps.

    ``broker`` and ``backend`` are URLs; without a broker, a SQLite file in ``.ekiden/`` of the project; without a
    backend, the broker's URL where it stores results. Other settings are keyword arguments. Raises ConfigurationError
    for a URL whose scheme no installed plugin knows, and for settings that do not exist or fit.

    Used as ``with app:`` it closes what it opened at the end: for scripts and tests that must leave no connection or
    thread behind. A long-running program need not.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        broker: str | None = None,
        backend: str | None = None,
        include: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        caller = sys._getframe(1).f_globals
        super().__init__(name or str(caller.get("__name__", "ekiden")))
        self.project_root = _project_root(caller.get("__file__"))
        self.conf = Settings()
        self._read_project_settings()
        self._read_environment()
        self.conf.update(settings)
        if broker is not None:
            self.conf.broker_url = broker
        if backend is not None:
            self.conf.result_backend = backend
        if include:
            self.conf.include = tuple(include)
        self._check_urls()
        self.control = Control(self)
        self.publisher = Publisher(self.opened_transport)
        self._included: list[TaskSet] = []
        self._discoveries: list[Callable[[], None]] = []
        self._mutex = threading.RLock()
        self._transport: Transport | None = None
        self._backend: Backend | None = None
        self._waiting: WaitingThread | None = None
        self._forget_after_fork()

    def __repr__(self) -> str:
        return f"<Ekiden {self.name}>"

    # Tasks.

    @property
    def tasks(self) -> Mapping[str, Task[..., Any]]:
        """Every task of this app by name, those of included TaskSets too."""
        for task_set in self._included:
            for name in task_set.tasks:
                self.find_task(name)
        return MappingProxyType(self._tasks)

    def find_task(self, name: str) -> Task[..., Any] | None:
        """The task of that name, or None. One of an included TaskSet is, in this app, a copy that sends through it."""
        found = self._tasks.get(name)
        if found is None:
            for task_set in self._included:
                shared = task_set.tasks.get(name)
                if shared is not None:
                    found = self._tasks[name] = shared.for_app(self._find_app)
                    break
        return found

    def include_tasks(self, *task_sets: TaskSet) -> None:
        """Have this app send and run the tasks of ``task_sets``, those declared later too."""
        for task_set in task_sets:
            if task_set not in self._included:
                self._included.append(task_set)
                task_set._apps.add(self)

    def autodiscover_tasks(
        self, packages: Iterable[str] | Callable[[], Iterable[str]] | None = None, related_name: str = "tasks"
    ) -> None:
        """Have a worker import the module ``related_name`` of each package, where it exists, and include shared tasks.

        Without ``packages``: of every installed Django app.
        """
        self.include_tasks(shared_task)
        self._discoveries.append(lambda: _import_related(packages, related_name))

    def load_tasks(self) -> None:
        """Import the modules of the ``include`` setting and those to be discovered. Workers and the CLI call it.

        Raises ConfigurationError that names the module that cannot be imported.
        """
        for name in self.conf.include:
            import_module(name, "the setting include")
        if self.conf.include:
            self.include_tasks(shared_task)
        for discover in self._discoveries:
            discover()

    def _find_app(self, task_name: str) -> TaskApp:
        return self

    # Sending.

    def send_task(
        self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Send a call of a task by its name, known here or not; ``options`` are those of ``apply_async``."""
        retry, timeout = options.pop("retry", None), options.pop("publish_timeout", None)
        task = self.find_task(name)
        message = compose(
            self.conf, name, task.options if task else None, args, kwargs or {}, call_options(name, options)
        )
        return send(self, message, retry=retry, timeout=timeout)

    def signature(
        self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Signature:
        """A signature of a task by its name."""
        immutable = options.pop("immutable", False)
        call_options(name, options)
        return Signature(name, tuple(args), kwargs or {}, options, immutable, sender=self)

    def send(self, signature: Signature) -> AsyncResult[Any]:
        """Send the call that ``signature`` describes."""
        task = self.find_task(signature.task)
        options = options_of(signature)
        if task is not None:
            return task.apply_async(signature.args, signature.kwargs, **options)
        return self.send_task(signature.task, signature.args, signature.kwargs, **options)

    # Results.

    def AsyncResult(self, task_id: str) -> AsyncResult[Any]:  # noqa: N802 - Celery's name
        """The result of a task by its id."""
        return AsyncResult(task_id, self)

    def revoke(self, task_id: str | Sequence[str], *, terminate: bool = False) -> None:
        """Have tasks not run when a worker claims them; with ``terminate``, end those that are running."""
        control.revoke(
            self.opened_transport(), self.opened_backend(), task_id, terminate=terminate, now=time.time()
        )

    def return_kind(self, task_name: str | None) -> Any:
        """The type that a task's function is annotated to return, or Any."""
        task = self.find_task(task_name) if task_name else None
        return Any if task is None else task.return_kind()

    def check_may_wait(self, allow_join: bool) -> None:
        """Raise MisuseError inside a task, unless ``allow_join``."""
        execution = running.get()
        if execution is not None and not allow_join:
            raise MisuseError(
                f"{execution.request.task} waits for the result of another task; tasks that do can fill a worker and wait "
                "for ever. Link the tasks instead, or say get(allow_join=True) if the other one runs on other workers."
            )

    # What is opened.

    @property
    def transport(self) -> Transport:
        """The transport, opened when first asked for."""
        return self.opened_transport()

    @property
    def backend(self) -> Backend:
        """The backend, opened when first asked for."""
        return self.opened_backend()

    def opened_transport(self) -> Transport:
        """The transport, opened when first asked for. Raises ConfigurationError for a URL that cannot work."""
        transport = self._transport
        if transport is None:
            with self._mutex:
                if self._transport is None:
                    self._transport = plugins.open_transport(self.broker_url())
                transport = self._transport
        return transport

    def opened_backend(self) -> Backend:
        """The backend, opened when first asked for. Raises ConfigurationError where there is none."""
        backend = self._backend
        if backend is None:
            with self._mutex:
                if self._backend is None:
                    self._backend = plugins.open_backend(self.backend_url())
                backend = self._backend
        return backend

    def adopt(self, transport: Transport, backend: Backend) -> None:
        """Use these instead of opening the URLs: for a process whose connections another one holds."""
        self._transport = transport
        self._backend = backend

    def waiting_thread(self) -> WaitingThread:
        """The thread that waits for all who await results, started when first asked for."""
        from ekiden.futures import WaitingThread  # asyncio takes 40 ms to import, and not every program awaits

        with self._mutex:
            if self._waiting is None:
                self._waiting = WaitingThread(self.opened_backend())
            return self._waiting

    def broker_url(self) -> BrokerURL:
        """Where calls are sent."""
        if self.conf.broker_url is not None:
            return parse_url(self.conf.broker_url)
        directory = self.project_root / ".ekiden"
        directory.mkdir(mode=0o700, exist_ok=True)
        return parse_url(f"sqlite:///{directory / 'ekiden.db'}")

    def backend_url(self) -> BrokerURL:
        """Where results are stored: the backend's URL, else the broker's."""
        if self.conf.result_backend is not None:
            return parse_url(self.conf.result_backend)
        return self.broker_url()

    def stores_results(self) -> bool:
        """Whether there is a backend: one was configured, or the broker stores results."""
        url = self.backend_url()
        return self.conf.result_backend is not None or url.scheme in plugins.installed(plugins.BACKENDS)

    def close(self) -> None:
        """Close what was opened and end the threads that were started. The app can be used again afterwards."""
        with self._mutex:
            waiting, self._waiting = self._waiting, None
            backend, self._backend = self._backend, None
            transport, self._transport = self._transport, None
        self.publisher.close()
        if waiting is not None:
            waiting.close()
        if backend is not None:
            backend.close()
        if transport is not None:
            transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Executing.

    def worker(self, **options: Any) -> InProcessWorker:
        """A worker inside this process, for tests and small programs: ``with app.worker(threads=2): ...``.

        ``options``: queues, threads, async_concurrency, prefetch, lease, pool, name, grace.
        """
        from ekiden.worker import InProcessWorker  # the worker is built on the app, and most programs run none

        return InProcessWorker(self, **options)

    def policy(self, task: Task[..., Any]) -> Policy:
        """A task's options with the settings merged in."""
        return policy(self.conf, task.options)

    def route(self, task_name: str, queue: str | None, priority: int | None) -> Sending:
        """Where a call of a task goes."""
        task = self.find_task(task_name)
        return merge(self.conf, task_name, task.options if task else None, queue, priority)

    def queues(self) -> list[str]:
        """Every queue that the settings, routes and tasks of this app name, sorted."""
        names = {self.conf.task_default_queue}
        names.update(self.route(name, None, None).queue for name in self.tasks)
        for pattern, target in self.conf.task_routes.items():
            queue = read_route(pattern, target).queue
            if queue is not None:
                names.add(queue)
        return sorted(names)

    def apply_message(self, message: Message) -> StoredResult:
        """Execute a message here and now, the way a worker would; further tries and follow-ups too, at once."""
        delivery = Delivery(message, None, 1)
        call = decode_call(message.body, message.headers)
        task = self.find_task(call.task)
        if task is None:
            raise NotRegistered(f"{call.task} is not a task of {self!r}, so it cannot be applied here.")
        task_policy = self.policy(task)
        request = Request(call, message.queue, message.priority, 1, message.headers, "apply")
        if task.is_async:
            outcome = _run_coroutine(run_async(task, task_policy, request), task.name)
        else:
            outcome = run(task, task_policy, request)
        context = Context(time.time(), "apply", self.route, None)
        call = msgspec.structs.replace(call, fenced=True)  # its result is wanted, whatever ignore_result says
        found = verdict(delivery, call, task_policy, outcome, context)
        result = found.result or StoredResult(call.id, "PENDING", call.retries, b"")
        for following in found.publish:
            if not following.queue.endswith(DEAD_SUFFIX):
                applied = self.apply_message(following)
                if applied.task_id == call.id:
                    result = applied
        return result

    # Settings.

    def config_from_object(self, source: object, *, namespace: str | None = None) -> None:
        """Take settings from a module, class, mapping or other object, or its import path (``"shop.settings"``).

        With ``namespace`` (such as ``"EKIDEN"``) only names that begin with it and an underscore, without that prefix.
        Raises ConfigurationError for settings that do not exist or fit.
        """
        found = _import_object(source) if isinstance(source, str) else source
        values = dict(found) if isinstance(found, Mapping) else _public_values(found)
        if namespace:
            prefix = f"{namespace}_".upper()
            values = {name[len(prefix) :]: value for name, value in values.items() if name.upper().startswith(prefix)}
        self.conf.update({name.lower(): value for name, value in values.items()})

    def _read_project_settings(self) -> None:
        path = self.project_root / "pyproject.toml"
        try:
            text = path.read_bytes()
        except OSError:
            return
        if b"[tool.ekiden]" not in text and b"[tool.ekiden." not in text:
            return
        import tomllib  # only for projects that have such a table

        try:
            table = tomllib.loads(text.decode())["tool"]["ekiden"]
            self.conf.update(table)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ConfigurationError) as error:
            raise ConfigurationError(f"{path}: [tool.ekiden]: {error}") from error

    def _read_environment(self) -> None:
        for variable, text in os.environ.items():
            if variable.startswith(ENVIRONMENT_PREFIX):
                try:
                    name, _ = translated_setting(variable.removeprefix(ENVIRONMENT_PREFIX), text)
                    setattr(self.conf, name, checked_setting(name, text, from_text=True))
                except ConfigurationError as error:
                    raise ConfigurationError(f"environment variable {variable}: {error}") from error

    def _check_urls(self) -> None:
        if self.conf.broker_url is not None:
            plugins.check_installed(plugins.TRANSPORTS, parse_url(self.conf.broker_url))
        if self.conf.result_backend is not None:
            plugins.check_installed(plugins.BACKENDS, parse_url(self.conf.result_backend))

    def _forget_after_fork(self) -> None:
        if not hasattr(os, "register_at_fork"):
            return
        reference = weakref.ref(self)

        def forget() -> None:
            app = reference()
            if app is not None:
                app._mutex = threading.RLock()
                app._waiting = None
                app.publisher.forget()
                if app._transport is not None:
                    app._transport.forget()
                if app._backend is not None:
                    app._backend.forget_connections()

        os.register_at_fork(after_in_child=forget)


def load_app(target: str) -> Ekiden:
    """The app that ``MODULE:APP`` names (``MODULE`` alone: its only one), its tasks loaded.

    The current directory is searched, too. Raises ConfigurationError for what cannot be found or imported.
    """
    module_name, _, attribute = target.partition(":")
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    module = import_module(module_name, target)
    if attribute:
        found = module
        for part in attribute.split("."):
            found = getattr(found, part, None)
            if found is None:
                raise ConfigurationError(f"{target}: the module {module_name} has no {part!r}{_apps_in(module)}.")
    else:
        apps = [value for value in vars(module).values() if isinstance(value, Ekiden)]
        if len(set(map(id, apps))) != 1:
            raise ConfigurationError(f"{target}: say which app, as {module_name}:NAME{_apps_in(module)}.")
        found = apps[0]
    if not isinstance(found, Ekiden):
        raise ConfigurationError(f"{target} is {found!r}, not an Ekiden app{_apps_in(module)}.")
    found.load_tasks()
    return found


def target_of(app: Ekiden) -> str | None:
    """``MODULE:APP`` under which another process can import this app, or None for one that is in no module."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if value is app:
                name = _real_module_name(module.__name__, vars(module))
                if importlib.util.find_spec(name.partition(".")[0]) is not None:
                    return f"{name}:{attribute}"
    return None


def import_module(name: str, wanted_by: str) -> ModuleType:
    """Import a module. Raises ConfigurationError in one sentence that says what went wrong, and where."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigurationError(
                f"{wanted_by}: there is no module {error.name!r}; it is looked for from {Path.cwd()} on."
            ) from error
        raise _import_failed(name, wanted_by, error) from error
    except Exception as error:
        raise _import_failed(name, wanted_by, error) from error


def _import_failed(name: str, wanted_by: str, error: BaseException) -> ConfigurationError:
    place = ""
    frames = error.__traceback__
    while frames is not None:
        if "importlib" not in frames.tb_frame.f_code.co_filename and frames.tb_frame.f_code.co_filename != __file__:
            place = f" ({frames.tb_frame.f_code.co_filename}:{frames.tb_lineno})"
        frames = frames.tb_next
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}:{error.lineno})"
    text = str(error) if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
    return ConfigurationError(f"{wanted_by}: the module {name!r} cannot be imported: {text}{place}")


def _apps_in(module: ModuleType) -> str:
    names = sorted(name for name, value in vars(module).items() if isinstance(value, Ekiden))
    return f"; its apps: {', '.join(names)}" if names else "; it has no Ekiden app"


def _import_object(path: str) -> object:
    module_name, colon, attribute = path.partition(":")
    module = import_module(module_name, f"config_from_object({path!r})")
    return getattr(module, attribute) if colon else module


def _public_values(source: object) -> dict[str, object]:
    """Names of a module or class that can be settings: not private, and not something imported or defined there."""
    names = [name for name in dir(source) if not name.startswith("_")]
    values = {name: getattr(source, name) for name in names}
    return {
        name: value for name, value in values.items() if not isinstance(value, ModuleType | type) and not callable(value)
    }


def _import_related(packages: Iterable[str] | Callable[[], Iterable[str]] | None, related_name: str) -> None:
    if packages is None:
        packages = _django_apps()
    for package in packages() if callable(packages) else packages:
        parent = import_module(package, "autodiscover_tasks()")
        name = f"{parent.__name__}.{related_name}"
        if importlib.util.find_spec(name) is not None:
            import_module(name, "autodiscover_tasks()")


def _django_apps() -> list[str]:
    apps = import_module("django.apps", "autodiscover_tasks() without packages").apps
    if not apps.ready:
        import_module("django", "autodiscover_tasks()").setup()
    return [config.name for config in apps.get_app_configs()]


def _run_coroutine(coroutine: Coroutine[Any, Any, Any], task_name: str) -> Any:
    import asyncio  # 40 ms to import, and only for tasks that are async

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    coroutine.close()
    raise MisuseError(f"{task_name}.apply() cannot wait inside a running event loop; await the function itself instead.")


def _check_where_it_runs(task: Task[..., Any]) -> None:
    options = task.options
    if task.is_async and options.pool == "process":
        raise ConfigurationError(
            f"task {task.name}: an async def task runs in the event loop; leave pool= out, or make it a def."
        )
    if options.pool == "thread" and isinstance(options.time_limit, int | float):
        raise ConfigurationError(
            f"task {task.name}: a thread cannot be ended from outside, so pool='thread' has no time_limit; leave pool= out "
            "and it runs in a process of its own, or use soft_time_limit."
        )


def _module_name(function: Callable[..., Any]) -> str:
    return _real_module_name(function.__module__, getattr(function, "__globals__", {}))


def _real_module_name(name: str, namespace: Mapping[str, Any]) -> str:
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


def _project_root(file: str | None) -> Path:
    """The nearest directory above ``file`` (or the current one) that holds pyproject.toml or .git, else its own."""
    start = Path(file).resolve().parent if file else Path.cwd()
    for directory in (start, *start.parents):
        if (directory / "pyproject.toml").exists() or (directory / ".git").exists():
            return directory
    return start
