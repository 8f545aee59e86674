"""``ekiden worker``: starts the supervisor, which imports no app and opens no broker."""

from __future__ import annotations

import sys

import click

from ekiden.cli import celery_words
from ekiden.cli.quantities import AT_LEAST_ONE, IN_HAND, POSITIVE_SECONDS, SECONDS, THREADS
from ekiden.cli.target import AppCommand, QueueName, app_argument
from ekiden.errors import ConfigurationError
from ekiden.logs import configure_logging
from ekiden.plan import WorkerOptions
from ekiden.supervisor import Supervisor, SupervisorOptions

_QUEUES = "Queues to serve in turn: a,b. Or in strict order: 'a>b'.  [default: all of the app]"
_POOLS = ("thread", "process", "threads", "prefork", "solo")
_LOG_LEVELS = {
    **{level: level for level in ("debug", "info", "warning", "error", "critical")},
    "warn": "warning",
    "fatal": "critical",
}
_BYTES_PER_KB, _BYTES_PER_MB = 1_000, 1_000_000


def _pool(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value in celery_words.POOLS_REFUSED:
        raise click.BadParameter(celery_words.POOLS_REFUSED[value])
    if value is not None and value not in _POOLS:
        raise click.BadParameter(f"{value!r} is none of {', '.join(_POOLS)}.")
    return value


def _name(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """A worker's name with the host in it, as Celery writes it: %h whole, %n up to the first dot, %d the rest."""
    if value is None:
        return None
    import socket  # 4 ms, and only for a name of the user's own

    host = socket.gethostname()
    short, _, domain = host.partition(".")
    for sign, text in (("%h", host), ("%n", short), ("%d", domain), ("%%", "%")):
        value = value.replace(sign, text)
    return value


@click.command(cls=AppCommand)
@app_argument
@click.option("-Q", "--queues", type=QueueName(), help=_QUEUES)
@click.option(
    "-c",
    "--processes",
    "--concurrency",
    type=THREADS,
    help="Worker processes.  [default: one per CPU that it may use]",
)
@click.option("--threads", type=THREADS, help="`def` tasks at once in each process.  [default: 8]")
@click.option("--async-concurrency", type=IN_HAND, help="`async def` tasks at once in each.  [default: 100]")
@click.option("-P", "--pool", callback=_pool, help="Where bodies of `def` tasks run: thread, process; and see below.")
@click.option("--burst", is_flag=True, help="End when nothing is ready or running any more.")
@click.option(
    "--max-tasks-per-process",
    "--max-tasks-per-child",
    type=AT_LEAST_ONE,
    help="Replace a process after so many tasks.",
)
@click.option(
    "--max-memory-per-process", type=POSITIVE_SECONDS, metavar="MB", help="Replace a process that outgrows this."
)
@click.option("--max-memory-per-child", type=POSITIVE_SECONDS, metavar="KB", help="The same, in Celery's unit.")
@click.option("--grace", type=SECONDS, help="Seconds running tasks get at a stop.  [default: 25]")
@click.option(
    "--lease", type=POSITIVE_SECONDS, help="Seconds a message is a worker's; renewed meanwhile.  [default: 60]"
)
@click.option("--prefetch", type=IN_HAND, help="Messages in hand at most, in each process.  [default: 512]")
@click.option(
    "-n",
    "--name",
    "--hostname",
    callback=_name,
    help="A name that no other running worker has; %h is the host.  [default: a unique one]",
)
@click.option(
    "-l",
    "--log-level",
    "--loglevel",
    type=click.Choice(list(_LOG_LEVELS), case_sensitive=False),
    default="info",
    show_default=True,
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option(
    "--reload",
    "reload_path",
    type=click.Path(exists=True),
    is_flag=False,
    flag_value=".",
    metavar="[PATH]",
    help="Start anew when a Python file changes below PATH, or here. For development.",
)
@click.option("--liveness-file", type=click.Path(dir_okay=False), help="A file to touch while all processes are well.")
@celery_words.worker_options
def worker(
    *,
    target: str,
    queues: str | None,
    processes: int | None,
    threads: int | None,
    async_concurrency: int | None,
    pool: str | None,
    burst: bool,
    max_tasks_per_process: int | None,
    max_memory_per_process: float | None,
    max_memory_per_child: float | None,
    grace: float | None,
    lease: float | None,
    prefetch: int | None,
    name: str | None,
    log_level: str,
    log_format: str,
    reload_path: str | None,
    liveness_file: str | None,
) -> None:
    """Run the tasks of an app, until Ctrl-C or SIGTERM.

    The first one lets running tasks finish, a second one ends them at once. Whatever becomes of a worker, no message
    is lost: what it had in hand comes back.

    \b
    ekiden worker shop:app
    ekiden worker shop:app --queues emails,default --processes 2 --threads 16
    ekiden worker shop:app --reload                       while you develop
    ekiden worker shop:app --burst                        work off what is there

    -P takes Celery's words too: `threads` is one process with -c threads, `prefork` is -c processes that run one
    `def` task at a time, `solo` is one process with one thread.

    What is not said here comes from the app's settings.
    """
    configure_logging(log_level, log_format)
    names, strict = queue_names(queues)
    processes, threads, pool = _placed(pool, processes, threads)
    if max_memory_per_child is not None and max_memory_per_process is None:
        max_memory_per_process = max_memory_per_child * _BYTES_PER_KB / _BYTES_PER_MB
    options = SupervisorOptions(
        processes=processes,
        grace=grace,
        liveness_file=liveness_file,
        log_level=_LOG_LEVELS[log_level],
        log_format=log_format,
        reload_paths=() if reload_path is None else (reload_path,),
        worker=WorkerOptions(
            queues=names,
            strict=strict,
            threads=threads,
            async_concurrency=async_concurrency,
            prefetch=prefetch,
            pool=pool,
            lease=lease,
            name=name,
            burst=burst,
            max_tasks=max_tasks_per_process,
            max_memory_mb=max_memory_per_process,
        ),
    )
    sys.exit(Supervisor(target, options, click.get_current_context().obj).run())


def _placed(pool: str | None, processes: int | None, threads: int | None) -> tuple[int | None, int | None, str | None]:
    """Processes, threads and pool, with Celery's words for pools taken apart."""
    match pool:
        case "threads":
            return 1, threads or processes, None
        case "prefork":
            return processes, threads or 1, None
        case "solo":
            return 1, threads or 1, None
        case _:
            return processes, threads, pool


def queue_names(text: str | None) -> tuple[tuple[str, ...], bool]:
    """What ``--queues`` says: the names, and whether their order is strict. Raises ConfigurationError."""
    if text is None:
        return (), False
    from ekiden.routes import check_queue_name  # only where queues are named

    if ">" in text and "," in text:
        raise ConfigurationError(
            f"--queues {text!r}: write 'a,b' for queues in turn or 'a>b' for a strict order, not both."
        )
    names = tuple(name.strip() for name in text.split(">" if ">" in text else ","))
    for name in names:
        check_queue_name(name)
    return names, ">" in text
