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
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self
from urllib.parse import quote

import msgspec

from ekiden import control, plugins
from ekiden.codec import decode_call
from ekiden.errors import ConfigurationError, MisuseError, NotRegistered
from ekiden.execution import Context, Verdict, run, run_async, verdict
from ekiden.kinds import Kind
from ekiden.loggers import safe_logger
from ekiden.message import DEAD_SUFFIX, Delivery, Message
from ekiden.modules import (
    called,
    import_module,
    import_object,
    import_related,
    is_module,
    is_process_of_ours,
    places_of,
    project_root,
    public_values,
    real_module_name,
)
from ekiden.options import Policy, Sending, call_options, check_task_name, merge, policy
from ekiden.private_files import make_private_directory
from ekiden.publisher import Publisher
from ekiden.request import Request, limits_of, running
from ekiden.results import AsyncResult, Backend, StoredResult, known_sources
from ekiden.routes import queues_named
from ekiden.settings import (
    ENVIRONMENT_PREFIX,
    Settings,
    checked_setting,
    no_settings,
    only_settings,
    translated_setting,
)
from ekiden.signature import Signature, call_arguments
from ekiden.states import State
from ekiden.task import Task, TaskApp, compose, options_of, send
from ekiden.taskset import TaskSet, shared_task
from ekiden.transport import Transport
from ekiden.urls import BrokerURL, parse_url, without_password

if TYPE_CHECKING:
    from ekiden.futures import WaitingThread
    from ekiden.inprocess import InProcessWorker


logger = safe_logger(__name__)

_APPLIED_HERE = "apply"


class Control:
    """``app.control``: tells running workers what to do."""

    def __init__(self, app: Ekiden) -> None:
        self.app = app

    def revoke(self, task_id: str | Sequence[str], *, terminate: bool = False, signal: str | None = None) -> None:
        """Have tasks not run when a worker claims them; with ``terminate``, end those that are running.

        ``signal`` is Celery's and changes nothing: a worker ends a body by the means of where it runs.
        """
        self.app.revoke(task_id, terminate=terminate)

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("control", self, name)


class Ekiden(TaskSet):
    """An app: tasks that are sent to one broker, and whose results one backend keeps.

    ``broker`` and ``backend`` are URLs; without a broker, a SQLite file in ``.ekiden/`` of the project; without a
    backend, the broker's URL where it stores results, else ``rpc://``. ``task_cls``: the class of tasks that name no
    ``base``, or where to import it from. ``config_source``: for ``config_from_object``, with ``namespace``. Other
    settings are keyword arguments. Raises ConfigurationError for a URL whose scheme no installed plugin knows, and for
    settings that do not exist or fit.

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
        task_cls: type[Task[..., Any]] | str | None = None,
        config_source: object = None,
        namespace: str | None = None,
        **settings: Any,
    ) -> None:
        caller = sys._getframe(1).f_globals
        name, settings = _celerys_arguments(name, settings)
        super().__init__(name or str(caller.get("__name__", "ekiden")))
        if task_cls is not None:
            self.Task = _task_class(task_cls)
        self.made_in = str(caller.get("__name__"))
        self.project_root = project_root(caller.get("__file__"))
        self.conf = Settings()
        self._read_project_settings()
        self.ignored_variables = no_settings(os.environ)
        self._read_environment()
        if self.ignored_variables and not is_process_of_ours():  # there one process says it for all
            self.warn_of_ignored_variables()
        self.conf.update(settings)
        if broker is not None:
            self.conf.broker_url = broker
        if backend is not None:
            self.conf.result_backend = backend
        if include:
            self.conf.include = tuple(include)
        if config_source is not None:
            self.config_from_object(config_source, namespace=namespace)
        self._check_urls()
        self.conf.check_url = _check_scheme
        self.control = Control(self)
        self.publisher = Publisher(self.opened_transport)
        self._included: list[TaskSet] = []
        self._discoveries: list[Callable[[], None]] = []
        self._mutex = threading.RLock()
        self._transport: Transport | None = None
        self._backend: Backend | None = None
        self.wants_replies: bool | None = None
        self._waiting: WaitingThread | None = None
        self._forget_after_fork()
        known_sources.add(self)

    def __repr__(self) -> str:
        return f"<Ekiden {self.name}>"

    if not TYPE_CHECKING:  # a type checker is to report a name that is not there

        def __getattr__(self, name: str) -> object:
            from ekiden.celery_names import missing_attribute  # only for a name that is not here

            raise missing_attribute("app", self, name)

    @property
    def main(self) -> str:
        """The app's name, as Celery calls it."""
        return self.name

    @property
    def task_cls(self) -> type[Task[..., Any]]:
        """The class of tasks that name no ``base``."""
        return self.Task

    def set_default(self) -> None:
        """Have shared tasks (``@shared_task``) sent through this app."""
        self.include_tasks(shared_task)

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
                task_set.included_by(self)

    def autodiscover_tasks(
        self,
        packages: str | Iterable[str] | Callable[[], Iterable[str]] | None = None,
        related_name: str | None = "tasks",
        force: bool = False,
    ) -> None:
        """Have a worker import the module ``related_name`` of each package, where it exists, and include shared tasks.

        Without ``packages``: of every installed Django app; then Django's system checks are run, too, which import the
        project's URLs and with them the tasks that only these know. ``related_name`` None: the packages themselves.
        ``force``: import them now.
        """
        self.include_tasks(shared_task)
        self._discoveries.append(lambda: import_related(packages, related_name))
        if force:
            import_related(packages, related_name)

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
        self, name: str, args: Sequence[Any] | None = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncResult[Any]:
        """Send a call of a task by its name, known here or not; ``options`` are those of ``apply_async``."""
        check_task_name(name)
        task = self.find_task(name)
        declared = task.declared(self.conf) if task else None
        checked = call_options(name, options)
        args, kwargs = call_arguments(name, args, kwargs)
        message = compose(self.conf, name, declared, args=args, kwargs=kwargs, options=checked)
        return send(self, message, checked, declared)

    def signature(
        self, name: str, args: Sequence[Any] | None = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> Signature:
        """A signature of a task by its name."""
        immutable = options.pop("immutable", False)
        call_options(name, options)
        args, kwargs = call_arguments(name, args, kwargs)
        return Signature(name, tuple(args), kwargs, options, immutable, sender=self)

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
        control.revoke(self.opened_transport(), self.opened_backend(), task_id, terminate=terminate, now=time.time())

    def return_kind(self, task_name: str | None) -> Kind | None:
        """What a task's function is annotated to return; None where that says nothing."""
        task = self.find_task(task_name) if task_name else None
        return None if task is None else task.return_kind()

    def check_may_wait(self, allow_join: bool) -> None:
        """Raise MisuseError inside a task, unless ``allow_join``."""
        execution = running.get()
        if execution is not None and not allow_join:
            raise MisuseError(
                f"{execution.request.task} waits for the result of another task; tasks that do can fill a worker and "
                "wait for ever. Link the tasks instead, or say get(allow_join=True) if the other runs on other workers."
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
        """The backend, opened when first asked for. Raises ConfigurationError for a URL that cannot work."""
        backend = self._backend
        if backend is None:
            with self._mutex:
                if self._backend is None:
                    self._backend = plugins.open_backend(self.backend_url())
                    self.wants_replies = not self._backend.stores
                backend = self._backend
        return backend

    def adopt(self, transport: Transport, backend: Backend) -> None:
        """Use these instead of opening the URLs: for a process whose connections another one holds."""
        self._transport = transport
        self._backend = backend
        self.wants_replies = not backend.stores

    def waiting_thread(self) -> WaitingThread:
        """The thread that waits for all who await results, started when first asked for."""
        from ekiden.futures import WaitingThread  # asyncio takes 40 ms to import, and not every program awaits

        with self._mutex:
            if self._waiting is None or self._waiting.has_failed:
                self._waiting = WaitingThread(self.opened_backend())
            return self._waiting

    def broker_url(self) -> BrokerURL:
        """Where calls are sent. Raises ConfigurationError where the default broker's directory cannot be used."""
        if self.conf.broker_url is not None:
            return parse_url(self.conf.broker_url)
        directory = self.project_root / ".ekiden"
        try:
            make_private_directory(directory)
        except OSError as error:
            raise ConfigurationError(
                f"the default broker is a file in {directory}, which cannot be used: {error.strerror}; give the app "
                "broker=, or set EKIDEN_BROKER_URL."
            ) from error
        return parse_url(f"sqlite:///{quote(str(directory / 'ekiden.db'))}")

    def backend_url(self) -> BrokerURL:
        """Where results are stored: the backend's URL, else the broker's, and ``rpc://`` where that stores none."""
        if self.conf.result_backend is not None:
            return parse_url(self.conf.result_backend)
        broker = self.broker_url()
        return broker if plugins.is_installed(plugins.BACKENDS, broker.scheme) else parse_url(f"{plugins.RPC}://")

    def stores_results(self) -> bool:
        """Whether results are stored; else (``rpc://``) they are sent to the process that sent the call."""
        if self.wants_replies is None:
            self.wants_replies = self.backend_url().scheme == plugins.RPC
        return not self.wants_replies

    def close(self) -> None:
        """Close what was opened and end the threads that were started. The app can be used again afterwards."""
        with self._mutex:
            waiting, self._waiting = self._waiting, None
            backend, self._backend = self._backend, None
            transport, self._transport = self._transport, None
            self.wants_replies = None
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
        from ekiden.inprocess import InProcessWorker  # the worker is built on the app, and most programs run none

        return InProcessWorker(self, **options)

    def start(self, argv: Sequence[str] | None = None) -> NoReturn:
        """Become the command for this app, with the program's arguments or these: ``python shop.py worker -l INFO``.

        The process is replaced. Raises MisuseError for an app that no other process could import.
        """
        target = target_of(self)
        if target is None:
            raise MisuseError(f"{self!r} is in no module, so no worker could import it; define it at the top of one.")
        sys.stdout.flush()
        os.execv(
            sys.executable, [sys.executable, "-m", "ekiden", "-A", target, *(sys.argv[1:] if argv is None else argv)]
        )

    def worker_main(self, argv: Sequence[str] | None = None) -> NoReturn:
        """``start`` with the arguments of a worker: ``app.worker_main(["worker", "-l", "INFO"])``."""
        given = list(sys.argv[1:] if argv is None else argv)
        self.start(given if "worker" in given else ["worker", *given])

    def policy(self, task: Task[..., Any]) -> Policy:
        """A task's options with the settings merged in."""
        return policy(self.conf, task.declared(self.conf))

    def route(self, task_name: str, queue: str | None, priority: int | None) -> Sending:
        """Where a call of a task goes."""
        task = self.find_task(task_name)
        return merge(self.conf, task_name, task.declared(self.conf) if task else None, queue, priority)

    def queues(self) -> list[str]:
        """Every queue that the settings, routes and tasks of this app name, sorted."""
        names = {self.conf.task_default_queue}
        names.update(self.route(name, None, None).queue for name in self.tasks)
        names.update(queues_named(self.conf.task_routes))
        return sorted(names)

    def apply_message(self, message: Message) -> StoredResult:
        """Execute a message here and now, the way a worker would; further tries and follow-ups too, at once."""
        waiting = deque([message])
        result: StoredResult | None = None
        while waiting:
            found = self._apply_one(waiting.popleft())
            if found.result is not None and (result is None or found.result.task_id == result.task_id):
                result = found.result
            waiting.extend(each for each in found.publish if not each.queue.endswith(DEAD_SUFFIX))
        return result or StoredResult(message.id, State.PENDING, 0, b"")

    def _apply_one(self, message: Message) -> Verdict:
        call = decode_call(message.body, message.headers)
        task = self.find_task(call.task)
        if task is None:
            raise NotRegistered(f"{call.task} is not a task of {self!r}, so it cannot be applied here.")
        task_policy = self.policy(task)
        limits = limits_of(call, task_policy)
        request = Request(
            call, message.queue, message.priority, 1, message.headers, _APPLIED_HERE, is_eager=True, limits=limits
        )
        if task.is_async:
            outcome = _run_coroutine(run_async(task, task_policy, request), task.name)
        else:
            outcome = run(task, task_policy, request)
        context = Context(time.time(), _APPLIED_HERE, self.route, None)
        wanted = msgspec.structs.replace(call, fenced=True)  # its result is wanted, whatever ignore_result says
        return verdict(Delivery(message, None, 1), wanted, task_policy, outcome, context)

    # Settings.

    def config_from_object(self, source: object, *, namespace: str | None = None) -> None:
        """Take settings from a module, class, mapping or other object, or its import path (``"shop.settings"``).

        With ``namespace`` (such as ``"EKIDEN"``) only names that begin with it and an underscore, without that prefix.
        Names of a program's own are left alone: those that no setting has, here or in Celery, and that look like none.
        Raises one ConfigurationError that names all settings that cannot be taken, and where they stand.
        """
        found = import_object(source, f"config_from_object({source!r})") if isinstance(source, str) else source
        values = dict(found) if isinstance(found, Mapping) else public_values(found)
        if namespace:
            prefix = f"{namespace}_".upper()
            values = {name: value for name, value in values.items() if name.upper().startswith(prefix)}
        if namespace or not isinstance(found, Mapping):
            values = only_settings(values, namespace)
        self.conf.assign(values, places_of(found, values), namespace=namespace)

    def config_from_envvar(self, variable: str, *, namespace: str | None = None) -> None:
        """``config_from_object`` of what the environment variable names. Raises ConfigurationError if it is not set."""
        if not os.environ.get(variable):
            raise ConfigurationError(f"the environment variable {variable} is not set; it names a module of settings.")
        self.config_from_object(os.environ[variable], namespace=namespace)

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
        found: dict[str, object] = {}
        for variable, text in os.environ.items():
            if variable in self.ignored_variables:
                continue
            if variable.startswith(ENVIRONMENT_PREFIX):
                try:
                    known = translated_setting(variable.removeprefix(ENVIRONMENT_PREFIX), text)
                    if known is not None:
                        found[known[0]] = checked_setting(*known, from_text=True)
                except ConfigurationError as error:
                    raise ConfigurationError(f"environment variable {variable}: {error}") from error
        try:
            self.conf.update(found)
        except ConfigurationError as error:
            raise ConfigurationError(f"environment variables {ENVIRONMENT_PREFIX}...: {error}") from error

    def warn_of_ignored_variables(self) -> None:
        """Log which environment variables look like settings of ours, and are none."""
        logger.warning("ignored environment variables: %s", "; ".join(self.ignored_variables.values()))

    def _check_urls(self) -> None:
        if self.conf.broker_url is not None:
            _check_scheme("broker_url", self.conf.broker_url)
        if self.conf.result_backend is not None:
            _check_scheme("result_backend", self.conf.result_backend)

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


def _check_scheme(setting: str, url: str) -> None:
    """Raise ConfigurationError for a URL that no installed plugin can open."""
    plugins.check_installed(plugins.TRANSPORTS if setting == "broker_url" else plugins.BACKENDS, parse_url(url))


def _celerys_arguments(name: str | None, settings: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The name and settings of an app out of what ``Celery(...)`` takes. Raises ConfigurationError for its parts."""
    if not settings:
        return name, settings
    from ekiden.celery_names import ARGUMENTS_OF_AN_APP  # only for apps with settings of their own

    if settings.keys().isdisjoint({*ARGUMENTS_OF_AN_APP, "main", "changes", "strict_typing", *_NEED_NOTHING}):
        return name, settings
    left = {each: value for each, value in settings.items() if each not in _NEED_NOTHING}
    for each in ARGUMENTS_OF_AN_APP.keys() & left.keys():
        if left.pop(each) is not None:
            raise ConfigurationError(f"an app takes no {each}=: {ARGUMENTS_OF_AN_APP[each]}.")
    if "strict_typing" in left:
        left["task_typing"] = left.pop("strict_typing")
    return left.pop("main", None) or name, {**(left.pop("changes", None) or {}), **left}


_NEED_NOTHING = ("autofinalize", "set_as_current")


def _task_class(given: type[Task[..., Any]] | str) -> type[Task[..., Any]]:
    """The class that ``task_cls`` names. Raises ConfigurationError for what is none."""
    found: object = given
    if isinstance(given, str):
        module, _, name = given.rpartition(".")
        found = import_object(given if ":" in given else f"{module}:{name}", f"task_cls={given!r}")
    if not isinstance(found, type) or not issubclass(found, Task):
        raise ConfigurationError(f"task_cls={given!r}: it is {found!r}, not a subclass of ekiden.Task.")
    return found


def load_app(target: str) -> Ekiden:
    """The app that ``MODULE:APP`` names, its tasks loaded.

    ``MODULE`` alone names its only app, or the one called ``app`` or ``celery``; of a package that has none, the app of
    its module ``celery`` or ``app``, where Celery projects keep it. ``MODULE.APP`` is understood, too. The current
    directory is searched as well. Raises ConfigurationError for what cannot be found or imported.
    """
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return called(lambda: _loaded(target), target)


def _loaded(target: str) -> Ekiden:
    if "@" in target or "://" in target:
        # A broker's URL where the app belongs: ekiden worker redis://:password@host
        raise ConfigurationError(f"{without_password(target)!r} names no app; write MODULE:APP.")
    module_name, attribute = _split_target(target)
    module = import_module(module_name, target)
    app = _app_at(module, attribute, target) if attribute else _app_in(module, target)
    app.load_tasks()
    return app


def _split_target(target: str) -> tuple[str, str]:
    """The names of the module and of the app in it, which may be empty."""
    if ":" in target:
        module_name, _, attribute = target.partition(":")
        return module_name, attribute
    parent, _, last = target.rpartition(".")
    return (parent, last) if parent and not is_module(target) and is_module(parent) else (target, "")


def _app_in(module: ModuleType, target: str) -> Ekiden:
    """The app that a module, or a package's own module for it, has."""
    for name in ("app", "celery"):
        if isinstance(found := getattr(module, name, None), Ekiden):
            return found
    apps = {id(value): value for value in vars(module).values() if isinstance(value, Ekiden)}
    if len(apps) == 1:
        return next(iter(apps.values()))
    if not apps and hasattr(module, "__path__"):
        for name in (f"{module.__name__}.celery", f"{module.__name__}.app"):
            if is_module(name):
                return _app_in(import_module(name, target), target)
    raise ConfigurationError(f"{target}: say which app, as {module.__name__}:NAME{_apps_in(module)}.")


def _app_at(module: ModuleType, attribute: str, target: str) -> Ekiden:
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{target}: the module {module.__name__} has no {part!r}{_apps_in(module)}.")
        found = getattr(found, part)
    if not isinstance(found, Ekiden):
        raise ConfigurationError(f"{target} is {found!r}, not an Ekiden app{_apps_in(module)}.")
    return found


def target_of(app: Ekiden) -> str | None:
    """``MODULE:APP`` under which another process can import this app, or None for one that is in no module."""
    # First the module that made it: one that only imported it may do more when it is imported.
    for module in sorted(sys.modules.values(), key=lambda each: getattr(each, "__name__", None) != app.made_in):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):  # programs put other things there, too
            if value is app:
                name = real_module_name(module.__name__, vars(module))
                if importlib.util.find_spec(name.partition(".")[0]) is not None:
                    return f"{name}:{attribute}"
    return None


def _apps_in(module: ModuleType) -> str:
    names = sorted(name for name, value in vars(module).items() if isinstance(value, Ekiden))
    return f"; its apps: {', '.join(names)}" if names else "; it has no Ekiden app"


def _run_coroutine(coroutine: Coroutine[Any, Any, Any], task_name: str) -> Any:
    import asyncio  # 40 ms to import, and only for tasks that are async

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    coroutine.close()
    raise MisuseError(
        f"{task_name}.apply() cannot wait inside a running event loop; await the function itself instead."
    )
