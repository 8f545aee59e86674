"""What only Celery's command has: options that ekiden accepts, and a sentence for each that it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

_FunctionT = TypeVar("_FunctionT", bound=Callable[..., Any])

_SERVICE = "a worker stays in the foreground and logs to standard error; a service manager such as systemd"
_SCHEDULES = (
    "ekiden has no schedules yet; a cron job or a systemd timer can send the call: `ekiden call MODULE:APP TASK`."
)
_NO_GREEN_THREADS = (
    "ekiden has no pool of green threads: `async def` tasks run on an event loop, --async-concurrency of them at once, "
    "and `def` tasks run in --threads."
)
_ASKS_NO_WORKER = (
    "ekiden does not ask running workers yet; `ekiden queues` shows what waits and what workers have in hand, "
    "`ekiden result` what became of a task, and `ekiden revoke` ends one."
)

COMMANDS = {
    "amqp": "there is no AMQP shell; `ekiden queues`, `ekiden purge` and `ekiden dead` work with every broker.",
    "beat": _SCHEDULES,
    "control": _ASKS_NO_WORKER,
    "events": "ekiden sends no events yet; connect to ekiden.signals in the worker instead.",
    "flower": "Flower knows no ekiden workers; `ekiden queues`, `ekiden result` and `ekiden dead` show what is there.",
    "graph": "there is no such picture; `ekiden explain MODULE:APP TASK` shows what happens to a call.",
    "inspect": _ASKS_NO_WORKER,
    "list": "bindings are AMQP's; `ekiden queues` lists the app's queues.",
    "logtool": "worker logs are one line an event; --log-format json makes them readable for programs.",
    "migrate": "messages cannot be moved from Celery's queues; let Celery's workers finish what is there.",
    "multi": f"`ekiden worker --processes N` starts and replaces several processes; {_SERVICE} starts it at boot.",
    "report": "`ekiden doctor MODULE:APP` says what is set up, and what is wrong with it.",
    "shell": "start `python` and import your app: there is nothing else to set up.",
    "status": _ASKS_NO_WORKER,
    "upgrade": "`settings` of Celery are accepted under their names; what is not here says so when the app is loaded.",
}
"""By the name of a command of Celery's that ekiden has not: what to use."""

_IN_THE_URL = "the app says it, or the environment variable {}."

REFUSED_EVERYWHERE = {
    ("-b", "--broker"): _IN_THE_URL.format("EKIDEN_BROKER_URL"),
    ("--result-backend",): _IN_THE_URL.format("EKIDEN_RESULT_BACKEND"),
    ("--loader",): "apps are loaded by name: MODULE:APP.",
    ("--config",): "the app reads its configuration itself: app.config_from_object('MODULE').",
    ("--workdir",): "change into the directory first.",
}
"""Options before the command's name."""

ACCEPTED_EVERYWHERE = (("-C", "--no-color"), ("-q", "--quiet"), ("--skip-checks",))
"""Flags there that ask for what ekiden does anyway."""

REFUSED_BY_CALL: dict[tuple[str, ...], str] = {
    ("--eta",): "write --countdown SECONDS.",
    ("--exchange",): "queues are addressed by name: --queue.",
    ("--routing-key",): "queues are addressed by name: --queue.",
}
"""Options of ``celery call`` with a value."""

REFUSED_BY_PURGE: dict[tuple[str, ...], str] = {("-X", "--exclude-queues"): "name the queues to purge: --queues a,b."}
"""Options of ``celery purge`` with a value."""

REFUSED_BY_WORKER = {
    (
        "--autoscale",
    ): "--processes and --threads do not change; idle ones cost next to nothing, so give the most you want.",
    ("-f", "--logfile"): f"{_SERVICE} or the shell puts that into a file: 2>> worker.log.",
    ("--pidfile",): f"{_SERVICE} knows the process id.",
    ("--uid",): f"{_SERVICE} starts it as another user.",
    ("--gid",): f"{_SERVICE} starts it as another group.",
    ("--umask",): f"{_SERVICE} sets the umask.",
    ("--executable",): "processes run the Python that runs this command.",
    ("-s", "--schedule", "--schedule-filename"): _SCHEDULES,
    ("--scheduler",): _SCHEDULES,
    ("-X", "--exclude-queues"): "name the queues to serve: --queues a,b.",
    ("-I", "--include"): "give the app include=[...]; every process that loads the app then has these tasks.",
    ("--time-limit",): "give the task time_limit=, or set task_time_limit for all.",
    ("--soft-time-limit",): "give the task soft_time_limit=, or set task_soft_time_limit for all.",
}
"""Options of ``celery worker`` with a value."""

REFUSED_FLAGS_OF_WORKER = {
    ("-B", "--beat"): _SCHEDULES,
    ("-E", "--task-events", "--events"): "ekiden sends no events yet; connect to ekiden.signals in the worker instead.",
    ("-D", "--detach"): f"{_SERVICE} puts it into the background.",
    ("--purge", "--discard"): "say `ekiden purge MODULE:APP` first; it asks before it deletes.",
}
"""Options of ``celery worker`` without a value."""

ACCEPTED_BY_WORKER = (
    ("-O", "--optimization"),
    ("--prefetch-multiplier",),
    ("--heartbeat-interval",),
    ("--pool-start-method",),
    ("-S", "--statedb"),
)
"""Options with a value that ask for what ekiden does anyway, or decides by itself."""

ACCEPTED_FLAGS_OF_WORKER = (
    ("--disable-prefetch",),
    ("--without-gossip",),
    ("--without-mingle",),
    ("--without-heartbeat",),
)
"""The same, without a value."""

POOLS_REFUSED = {"eventlet": _NO_GREEN_THREADS, "gevent": _NO_GREEN_THREADS}
"""By the name of a pool of Celery's that ekiden has not: what to use."""


def worker_options(function: _FunctionT) -> _FunctionT:
    """Add to a command what ``celery worker`` has and ekiden accepts or refuses; ``--help`` shows none of it."""
    function = accepted_options(*ACCEPTED_BY_WORKER)(function)
    function = accepted_options(*ACCEPTED_FLAGS_OF_WORKER, are_flags=True)(function)
    return refused_options(REFUSED_FLAGS_OF_WORKER, are_flags=True)(refused_options(REFUSED_BY_WORKER)(function))


def accepted_options(*options: tuple[str, ...], are_flags: bool = False) -> Callable[[_FunctionT], _FunctionT]:
    """Options that a command accepts and needs not; ``--help`` does not show them."""

    def decorate(function: _FunctionT) -> _FunctionT:
        for names in options:
            function = click.option(*names, expose_value=False, hidden=True, is_flag=are_flags)(function)
        return function

    return decorate


def refused_options(
    sentences: Mapping[tuple[str, ...], str], *, are_flags: bool = False
) -> Callable[[_FunctionT], _FunctionT]:
    """Options that a command answers with their sentence; ``--help`` does not show them."""

    def decorate(function: _FunctionT) -> _FunctionT:
        for names, sentence in sentences.items():
            function = click.option(
                *names, expose_value=False, hidden=True, is_flag=are_flags, callback=_refusal(names[-1], sentence)
            )(function)
        return function

    return decorate


def _refusal(name: str, sentence: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def refuse(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value:
            raise click.UsageError(f"{name}: {sentence}", ctx)

    return refuse
