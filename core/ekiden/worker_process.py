"""The program of one worker process: ``python -m ekiden.worker_process``, started by the supervisor.

Standard input is a pipe from the supervisor. The first line is the plan, as JSON; a second one says to end at once.
When the pipe closes the supervisor is gone, and this process drains and ends. SIGTERM drains as well, however often it
comes: who sends it to a whole group of processes reaches this one twice. SIGINT is ignored.
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
from typing import NoReturn

import msgspec

from ekiden import plugins
from ekiden.app import Ekiden, load_app
from ekiden.errors import ConfigurationError, EkidenError
from ekiden.loggers import safe_logger
from ekiden.logs import configure_logging
from ekiden.plan import EXIT_DONE, EXIT_REPLACE, EXIT_UNCLEAN, EXIT_UNUSABLE, Plan, WorkerOptions
from ekiden.spawning import ignore_interrupts, obey
from ekiden.worker import Worker

logger = safe_logger("ekiden.worker")

_BEAT_SECONDS = 1.0
_EXIT_SECONDS = 3.0
_FRESH_SECONDS = 30.0


def main() -> None:
    """Work as planned; the exit status says why it ended."""
    ignore_interrupts()
    plan = msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)
    configure_logging(plan.log_level, plan.log_format)
    try:
        app = load_app(plan.target)
        plugins.check_shared(app.broker_url(), app.backend_url())
        worker = Worker(app, _options(plan, app), claims_name=plan.claims_name, instance=plan.instance)
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
        for warning in worker.warnings() if plan.introduces else ():
            logger.warning("%s", warning)
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
        sys.stdout.flush()
        os._exit(EXIT_UNCLEAN)
    app.close()
    code = EXIT_REPLACE if worker.recycled else EXIT_DONE
    _exit_anyway(code)
    sys.exit(code)


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
    results = app.backend_url() if app.stores_results() else "replied to who sent the call"
    logger.info("broker %s, results %s", app.broker_url(), results)
    logger.info("queues %s", ", ".join(worker.queues))
    logger.info("tasks %s", ", ".join(sorted(app.tasks)) or "none: the setting include names modules that have some")


def _obey(worker: Worker) -> None:
    """Stop when told to by a signal or through the pipe, or when the supervisor is gone."""
    told: SimpleQueue[bool] = SimpleQueue()

    def stop_when_told() -> None:
        # Not in the signal's handler: it interrupts the receiving thread, perhaps while that holds a lock which
        # stopping needs.
        while True:
            worker.stop(at_once=told.get())

    def watch_supervisor() -> None:
        while os.read(0, 1024):
            told.put(True)
        if not worker.is_stopping():
            logger.warning("the supervisor is gone; %s drains and ends", worker.name)
            told.put(False)

    threading.Thread(target=stop_when_told, name="ekiden-stop", daemon=True).start()
    threading.Thread(target=watch_supervisor, name="ekiden-supervisor-watch", daemon=True).start()
    obey(signal.SIGTERM, lambda: told.put(False))


def _exit_anyway(code: int) -> None:
    """End this process even if a thread that a task left behind never does: or nobody would take its place."""

    def exit_now() -> None:
        sys.stdout.flush()
        os._exit(code)

    timer = threading.Timer(_EXIT_SECONDS, exit_now)
    timer.daemon = True
    timer.start()


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
