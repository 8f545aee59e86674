"""Settings: what holds for a whole app, each with its type, default and meaning; and what Celery's settings are here.

The environment names, the CLI's defaults, the docs and the error messages are derived from the class.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from ekiden.bounds import Count, InHand, Threads, Tries
from ekiden.errors import ConfigurationError
from ekiden.message import (
    DEFAULT_PRIORITY,
)
from ekiden.options import (
    Acks,
    Annotations,
    PoolName,
    Priority,
    check_limits,
    did_you_mean,
    rate_per_second,
    read_annotations,
    read_publish_retry_policy,
)
from ekiden.routes import check_queue_name, check_routes
from ekiden.times import PositiveSeconds, Seconds, shown
from ekiden.urls import without_password

ENVIRONMENT_PREFIX = "EKIDEN_"


def setting(default: Any, meaning: str) -> Any:
    """A field of Settings: its default, and what the docs say of it."""
    if default == {}:
        return field(default_factory=dict, metadata={"doc": meaning})
    return field(default=default, metadata={"doc": meaning})


@dataclass(slots=True, repr=False)
class Settings:
    """What holds for a whole app: ``app.conf``. Values are checked when they are assigned.

    Sources, later ones winning: the defaults below, ``[tool.ekiden]`` in the project's pyproject.toml, the
    environment (``EKIDEN_`` and the name in capitals), keyword arguments of ``Ekiden(...)``, and what the program
    assigns to ``app.conf`` or loads with ``config_from_object``.
    """

    taken_for_granted: dict[str, object] = field(default_factory=dict, repr=False)
    check_url: Callable[[str, str], None] | None = field(default=None, repr=False, compare=False)

    broker_url: str | None = setting(None, "The broker. Without one: a SQLite file in `.ekiden/` of the project.")
    result_backend: str | None = setting(
        None,
        "Where results are stored. Without one: at the broker, where it stores results, else `rpc://`.",
    )
    include: tuple[str, ...] = setting((), "Modules that a worker imports so that their tasks are known.")
    task_default_queue: str = setting(
        "default",
        "The queue of calls that neither the call, a route nor the task sends elsewhere.",
    )
    task_default_priority: Priority = setting(DEFAULT_PRIORITY, "0 to 9; 9 is most urgent.")
    task_routes: Any = setting(
        {},
        'Task names, globs or compiled patterns, each to a queue name or `{"queue": ..., "priority": ...}`. An exact '
        "name wins, then the first pattern that fits. Or a list of such mappings, pairs and functions: the first that "
        "answers wins. A route wins over the task's declaration.",
    )
    task_annotations: Annotations = setting(
        {},
        'Options for tasks that are declared elsewhere: `{"shop.mail": {"rate_limit": "10/s"}, "*": {...}}`. They win '
        "over the declaration.",
    )
    task_ignore_result: bool = setting(False, "Store no results, except of tasks that say `ignore_result=False`.")
    task_track_started: bool = setting(False, "Also store when a task starts (state STARTED).")
    task_acks: Acks = setting(
        "late",
        "`late`: a message is settled after its task ended (at least once). `early`: before it starts (at most once).",
    )
    task_max_retries: Tries | None = setting(
        10,
        "Tries after the first, for `self.retry` and `autoretry_for`; `None` is without end.",
    )
    task_default_retry_delay: Seconds | None = setting(
        None,
        "Seconds until the next try where neither the call nor a backoff says; `None`: tries back off, from 1 s on.",
    )
    task_default_rate_limit: str | float | None = setting(
        None,
        "Starts per time of each task over all workers, such as `10/s`, `100/m`, `5/h`.",
    )
    task_time_limit: PositiveSeconds | None = setting(
        None,
        "Seconds after which a body is ended: the process of a `def` task is killed, an `async def` task cancelled.",
    )
    task_soft_time_limit: PositiveSeconds | None = setting(
        None,
        "Seconds after which `SoftTimeLimitExceeded` is raised in a body.",
    )
    task_max_deliveries: Count = setting(
        5,
        "Hand-outs of one message, each ended by its worker's death, before it goes to the dead letters.",
    )
    task_dead_letter: bool = setting(
        True,
        "Keep a copy of failed calls in `<queue>.dead`. What could not be processed at all is always kept.",
    )
    task_typing: bool = setting(True, "Check and convert arguments by the function's annotations.")
    task_publish_timeout: PositiveSeconds = setting(
        10.0,
        "Seconds that a publish may take in all: connecting, sending, confirming, and trying again.",
    )
    task_publish_retry: bool = setting(True, "Try again within the publish timeout when the broker is unavailable.")
    task_publish_retry_policy: Mapping[str, Any] = setting(
        {},
        "How it is tried again: `max_retries`, `interval_start`, `interval_step`, `interval_max` (seconds).",
    )
    unknown_task_grace: Seconds = setting(
        600.0,
        "Seconds for which a message of an unknown task is given back, because a deploy may be rolling.",
    )
    lease: PositiveSeconds = setting(
        60.0,
        "Seconds for which a delivery is a worker's; renewed at a third while the task runs.",
    )
    result_expires: PositiveSeconds | None = setting(86400.0, "Seconds for which results are kept; `None` is for ever.")
    result_max_bytes: Count = setting(5 * 1024 * 1024, "The largest encoded result; a larger one fails its task.")
    worker_queues: tuple[str, ...] = setting(
        (),
        "Queues that a worker serves; without any: every queue that the app's tasks and routes name.",
    )
    worker_processes: Threads | None = setting(None, "Worker processes; without a number: one for each CPU it may use.")
    worker_threads: Threads = setting(8, "Threads for `def` tasks, and body processes at most, in each worker process.")
    worker_async_concurrency: InHand = setting(100, "`async def` tasks at once in each worker process.")
    worker_pool: PoolName = setting("thread", "Where bodies of `def` tasks run that say nothing themselves.")
    worker_prefetch: InHand = setting(
        512,
        "Deliveries in hand at most in each worker process; far fewer where tasks are slow.",
    )
    worker_grace: Seconds = setting(25.0, "Seconds that running tasks get to finish when a worker stops.")
    worker_max_tasks_per_process: Count | None = setting(None, "Replace a worker process after so many tasks.")
    worker_max_memory_per_process: PositiveSeconds | None = setting(
        None,
        "Replace a worker process that has grown beyond so many MB.",
    )
    worker_liveness_file: str | None = setting(
        None,
        "A file whose modification time says when the worker last was alive, for probes.",
    )

    def __repr__(self) -> str:
        shown = (f"{each.name}={self._told(each.name)}" for each in fields(self) if "doc" in each.metadata)
        return f"Settings({', '.join(shown)})"

    def _told(self, name: str) -> str:
        value = getattr(self, name)
        return repr(without_password(value) if name in _URLS and isinstance(value, str) else value)

    def __setattr__(self, name: str, value: object) -> None:
        if name in _NO_SETTINGS:
            object.__setattr__(self, name, value)
            return
        before = self._limits()
        self._take(name, value)
        self._check_limits(before)

    def _take(self, name: str, value: object) -> None:
        found = translated_setting(name, value)
        if found is None:
            self.taken_for_granted[name.lower()] = value
        else:
            known_name, known_value = found
            value = checked_setting(known_name, known_value)
            if self.check_url is not None and known_name in _URLS and isinstance(value, str):
                self.check_url(known_name, value)
            object.__setattr__(self, known_name, value)

    def _limits(self) -> dict[str, object]:
        return {name: getattr(self, name, None) for name in ("task_time_limit", "task_soft_time_limit")}

    def _check_limits(self, before: Mapping[str, object]) -> None:
        """Raise ConfigurationError, and leave the limits as they were ``before``, where they cannot both be."""
        hard, soft = self._limits().values()
        try:
            check_limits("settings", soft=soft, hard=hard)
        except ConfigurationError:
            for name, value in before.items():
                object.__setattr__(self, name, value)
            raise

    if not TYPE_CHECKING:  # a type checker is to report a name that is no setting

        def __getattr__(self, name: str) -> object:
            return self._celerys(name)

    def _celerys(self, name: str) -> object:
        """The value of a setting of Celery's. Raises AttributeError that says what ekiden has instead."""
        if name.startswith("_") or name in _NO_SETTINGS or name in _SETTING_TYPES:
            raise AttributeError(name)
        lowered = name.lower()
        if lowered in self.taken_for_granted:
            return self.taken_for_granted[lowered]
        if lowered == "task_acks_late":
            return self.task_acks == "late"
        try:
            found = translated_setting(name, None)
        except ConfigurationError as error:
            with suppress(AttributeError):
                return _unassigned(name)
            from ekiden.celery_names import ATTRIBUTES, missing_attribute  # only for a name that is not here

            raise (
                missing_attribute("settings", self, name)
                if name in ATTRIBUTES["settings"]
                else AttributeError(str(error))
            ) from None
        if found is None:
            return _unassigned(name)
        value: object = getattr(self, found[0])
        return value

    def __getitem__(self, name: str) -> object:
        try:
            return getattr(self, name)
        except AttributeError as error:
            raise KeyError(str(error)) from None

    def __setitem__(self, name: str, value: object) -> None:
        setattr(self, name, value)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and hasattr(self, name)

    def get(self, name: str, default: object = None) -> object:
        """The value of a setting, or ``default`` for one that ekiden does not have or that was not assigned."""
        return getattr(self, name, default)

    def update(self, values: Mapping[str, object] | None = None, **more: object) -> None:
        """Assign several settings at once. Celery's names are taken where they mean the same.

        Names in capitals that are no settings are the program's own, as in Flask's ``app.config``, and left alone.
        Raises one ConfigurationError that names all that cannot be taken.
        """
        self.assign({**(values or {}), **more}, {})

    def assign(self, values: Mapping[str, object], places: Mapping[str, str], *, namespace: str | None = None) -> None:
        """``update`` with names behind a namespace's prefix; ``places`` says where they stand, as ``file:line``."""
        refusals = []
        start = len(namespace) + 1 if namespace else 0
        before = self._limits()
        for name, value in values.items():
            if name.isupper() and not namespace and not is_meant_for_us(name):
                continue
            try:
                self._take(name[start:], value)
            except ConfigurationError as error:
                refusals.append(f"{places[name]}: {error}" if name in places else str(error))
        try:
            self._check_limits(before)
        except ConfigurationError as error:
            refusals.append(str(error))
        if len(refusals) == 1:
            raise ConfigurationError(refusals[0])
        if refusals:
            told = "".join(f"\n  {refusal}" for refusal in refusals)
            raise ConfigurationError(f"{len(refusals)} settings cannot be taken:{told}")


def _unassigned(name: str) -> object:
    from ekiden import celery_settings  # only for programs that ask for Celery's settings

    try:
        return celery_settings.unassigned(celery_settings.current_name(name))
    except LookupError:
        raise AttributeError(f"the setting {name!r} has not been assigned; ekiden does not need it") from None


def setting_docs() -> Iterable[tuple[str, str, object, str]]:
    """Every setting as (name, type, default, meaning), in the order of the class."""
    defaults = Settings()
    for each in fields(Settings):
        if "doc" in each.metadata:
            yield each.name, str(each.type), getattr(defaults, each.name), each.metadata["doc"]


def translated_setting(name: str, value: object) -> tuple[str, object] | None:
    """The setting that ``name`` means here, and its value; None for one of Celery's that needs nothing done.

    Raises ConfigurationError for an unknown name, with what was probably meant or what to write instead.
    """
    lowered = name.lower()
    if lowered in _SETTING_TYPES:
        return lowered, value
    from ekiden import celery_settings  # only for programs that have some

    current = celery_settings.current_name(name)
    if current in _SETTING_TYPES:
        return current, value
    try:
        return celery_settings.translated(current, value)
    except ConfigurationError as error:
        raise ConfigurationError(f"ekiden has no setting {name!r}: {error}.") from None
    except LookupError:
        raise ConfigurationError(f"ekiden has no setting {name!r}{did_you_mean(lowered, _SETTING_TYPES)}") from None


def no_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that begin as ours do and name no setting, each with a text that says so and what was meant.

    They are no mistake: others make such variables. Kubernetes makes EKIDEN_PORT for a service named ekiden.
    """
    found = {}
    for variable in sorted(environment):
        if variable.startswith(ENVIRONMENT_PREFIX):
            name = variable.removeprefix(ENVIRONMENT_PREFIX)
            try:
                translated_setting(name, environment[variable])
            except ConfigurationError as error:
                reason = str(error).removeprefix(f"ekiden has no setting {name!r}").lstrip(" :;.")
                found[variable] = f"{variable} is no setting" + (f": {reason.rstrip('.')}" if reason else "")
    return found


def is_meant_for_us(name: str) -> bool:
    """Whether a name is that of a setting, here or in Celery, or so close to one that it looks misspelt."""
    import difflib  # only for sources that hold more than settings

    from ekiden import celery_settings

    current = celery_settings.current_name(name)
    return (
        current in _SETTING_TYPES
        or celery_settings.is_celerys(current)
        or any(
            difflib.get_close_matches(each, list(_SETTING_TYPES), n=1, cutoff=_LOOKS_MISSPELT)
            for each in {current, current.removeprefix("celery_")}
        )
    )


def only_settings(values: Mapping[str, object], namespace: str | None) -> dict[str, object]:
    """What is meant for us among the names of a program's own module; with ``namespace``, behind its prefix."""
    start = len(namespace) + 1 if namespace else 0
    return {name: value for name, value in values.items() if is_meant_for_us(name[start:])}


def checked_setting(name: str, value: object, *, from_text: bool = False) -> object:
    """``value`` as the type of setting ``name``; from text (environment), numbers and lists are read out of it."""
    kind = _SETTING_TYPES.get(name)
    if kind is None:
        raise ConfigurationError(f"ekiden has no setting {name!r}{did_you_mean(name, _SETTING_TYPES)}")
    if from_text and isinstance(value, str):
        value = _read_text(name, value)
    if name == "task_routes":
        return check_routes(value)
    if name == "task_annotations":
        return read_annotations(value or {})  # type: ignore[arg-type]  # it checks that, and says so
    value = _as_ours(name, value)
    try:
        found = msgspec.convert(value, kind, strict=not from_text)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"the setting {name} cannot be {_shown(name, value)}: {error}.") from error
    _check_meaning(name, found)
    return found


def _as_ours(name: str, value: object) -> object:
    """A value as Celery's users may write it, as the setting's type has it."""
    match value:
        case timedelta():
            return value.total_seconds()
        case list() | set():
            return tuple(value)
        case str() if name in _TUPLE_SETTINGS:
            return (value,)
        case str() if name == "worker_pool":
            return _POOLS.get(value, value)
        case str() if name == "result_backend":
            from ekiden import celery_settings  # only for programs that name a backend

            return celery_settings.backend_url(value)
        case 0 if name == "result_expires":
            return None  # Celery's way to say: for ever
        case _:
            return value


_POOLS = {"prefork": "thread", "threads": "thread", "solo": "thread", "processes": "process"}
"""Where Celery's pools run bodies: in worker processes, in threads of these."""

_NO_SETTINGS = frozenset({"taken_for_granted", "check_url"})
_URLS = frozenset({"broker_url", "result_backend"})
_LOOKS_MISSPELT = 0.85


def _read_text(name: str, text: str) -> object:
    if name in {"task_routes", "task_annotations", "task_publish_retry_policy"}:
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"the setting {name} must be a JSON object, not {text!r}: {error}.") from error
    if name in _TUPLE_SETTINGS:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return None if text == "" else text


def _check_meaning(name: str, value: object) -> None:
    if name == "task_default_rate_limit" and value is not None:
        rate_per_second(value)
    if name == "task_publish_retry_policy" and isinstance(value, Mapping):
        read_publish_retry_policy(value)
    if name == "task_default_queue":
        check_queue_name(value)


def _shown(name: str, value: object) -> str:
    return "that value" if name in _URLS else shown(value)


# Annotations are evaluated in this module: from text, all of them together take 5 ms.
_SETTING_TYPES: dict[str, Any] = {each.name: each.type for each in fields(Settings) if "doc" in each.metadata}
_TUPLE_SETTINGS = {name for name, kind in _SETTING_TYPES.items() if str(kind).startswith("tuple")}
