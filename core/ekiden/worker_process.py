"""The program of one worker process: ``python -m ekiden.worker_process``, started by the supervisor.

Standard input is a pipe from the supervisor. The first line is the plan, as JSON; when the pipe closes the supervisor
is gone, and this process drains and ends. SIGTERM drains, a second one ends at once, SIGINT is ignored: a Ctrl-C
reaches the whole group of processes, and only the supervisor decides what it means.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

import msgspec

from ekiden import plugins
from ekiden.app import Ekiden, load_app
from ekiden.errors import ConfigurationError, EkidenError
from ekiden.logs import configure_logging
from ekiden.plan import EXIT_DONE, EXIT_REPLACE, EXIT_UNCLEAN, EXIT_UNUSABLE, Plan, WorkerOptions
from ekiden.worker import Worker

logger = logging.getLogger("ekiden.worker")

_BEAT_SECONDS = 1.0
_FRESH_SECONDS = 30.0


def main() -> None:
    """Work as planned; the exit status says why it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    configure_logging(plan.log_level, plan.log_format)
    try:
        app = load_app(plan.target)
        plugins.check_shared(app.broker_url(), app.backend_url())
        worker = Worker(app, _options(plan, app))
    except EkidenError as error:
        _refuse(plan, error)
    _obey(worker)
    if plan.introduces:
        _introduce(app, worker)
    if plan.beat_file is not None:
        _beat(worker, plan.beat_file)
    gc.collect()
    gc.freeze()  # what is loaded by now stays, so the collector need not look at it again and again
    try:
        clean = worker.run()
    except ConfigurationError as error:
        _refuse(plan, error)
    except EkidenError as error:
        logger.error("%s", error)
        sys.exit(1)
    finally:
        logging.shutdown()
    if not clean:
        # A body still runs in a thread that cannot be ended; its message has been given back.
        os._exit(EXIT_UNCLEAN)
    app.close()
    sys.exit(EXIT_REPLACE if worker.recycled else EXIT_DONE)


def _options(plan: Plan, app: Ekiden) -> WorkerOptions:
    """The plan's, and the app's settings for what only a process that can be replaced needs."""
    conf, options = app.conf, plan.options
    return msgspec.structs.replace(
        options,
        max_tasks=options.max_tasks or conf.worker_max_tasks_per_process,
        max_memory_mb=options.max_memory_mb or conf.worker_max_memory_per_process,
    )


def _refuse(plan: Plan, error: EkidenError) -> NoReturn:
    """Say why this app cannot be worked for, and end."""
    if plan.speaks:
        sys.stderr.write(f"Error: {error}\n")
    sys.exit(EXIT_UNUSABLE)


def _introduce(app: Ekiden, worker: Worker) -> None:
    """Say what is worked for; passwords in URLs are hidden."""
    results = app.backend_url() if app.stores_results() else "not stored"
    logger.info("broker %s, results %s", app.broker_url(), results)
    logger.info("queues %s", ", ".join(worker.queues))
    logger.info("tasks %s", ", ".join(sorted(app.tasks)) or "none: the setting include names modules that have some")


def _obey(worker: Worker) -> None:
    """Stop when told to by a signal, or when the supervisor is gone."""
    told: SimpleQueue[None] = SimpleQueue()

    def on_term(_number: int, _frame: FrameType | None) -> None:
        # Not here: this interrupts the receiving thread, perhaps while it holds a lock that stopping needs.
        told.put(None)

    def stop_when_told() -> None:
        while True:
            told.get()
            worker.stop(at_once=worker.is_stopping())

    signal.signal(signal.SIGTERM, on_term)
    threading.Thread(target=stop_when_told, name="ekiden-stop", daemon=True).start()

    def watch_supervisor() -> None:
        while os.read(0, 1024):
            continue
        if not worker.is_stopping():
            logger.warning("the supervisor is gone; %s drains and ends", worker.name)
            worker.stop()

    threading.Thread(target=watch_supervisor, name="ekiden-supervisor-watch", daemon=True).start()


def _beat(worker: Worker, path: str) -> None:
    """Touch a file for as long as the worker's settler is alive, so that the supervisor can tell."""

    def beat() -> None:
        pause = threading.Event()
        while not pause.wait(_BEAT_SECONDS):
            if time.monotonic() - worker.last_tick < _FRESH_SECONDS:
                Path(path).touch()

    threading.Thread(target=beat, name="ekiden-beat", daemon=True).start()


if __name__ == "__main__":
    main()
