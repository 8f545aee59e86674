"""The program of one worker process: ``python -m ekiden.worker_process``, started by the supervisor.

Standard input is a pipe from the supervisor. The first line is the plan, as JSON; a second one says to end at once.
When the pipe closes the supervisor is gone, and this process drains and ends. SIGTERM and SIGHUP drain as well, however
often they come: who sends one to a whole group of processes reaches this one twice. SIGINT is ignored.

However it ends, it does so in bounded time: code of the user's may leave threads, processes and exit handlers behind.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from io import BufferedReader
from queue import SimpleQueue

import msgspec

from ekiden import plugins
from ekiden.app import Ekiden, load_app
from ekiden.descendants import end_descendants
from ekiden.errors import ConfigurationError, EkidenError
from ekiden.loggers import safe_logger
from ekiden.logs import logging_of_program
from ekiden.modules import what_failed
from ekiden.plan import (
    BEAT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_REPLACE,
    EXIT_UNCLEAN,
    EXIT_UNUSABLE,
    Plan,
    SupervisorSettings,
    WorkerOptions,
)
from ekiden.safe_text import indented_below
from ekiden.spawning import (
    STOP_SIGNALS,
    WORKER_MARK,
    end_process,
    hear,
    ignore_interrupts,
    is_ignored,
    obey,
    take_standard_input,
)
from ekiden.worker import Worker

logger = safe_logger("ekiden.worker")

_BEAT_SECONDS = 1.0
_WIND_UP_SECONDS = 15.0
_LOOK_SECONDS = 0.5
_SETTLED_SECONDS = 1.0


def main() -> None:
    """Work as planned; the exit status says why it ended."""
    ignore_interrupts()
    hear(*STOP_SIGNALS)  # until they are obeyed, they end it at once: it has begun nothing
    supervisor = take_standard_input()
    told = supervisor.readline()
    if not told:
        end_process(EXIT_DONE)  # it was started ahead, and for nothing
    plan = msgspec.json.decode(told, type=Plan)
    sys.argv[1:] = [plan.target]
    atexit.register(_end_what_is_left)  # the first one is called last
    code = EXIT_FAILED
    try:
        code = _run(plan, supervisor)
    except BaseException as error:
        logger.critical("this worker process ends: %r", error, exc_info=error)
    if code == EXIT_UNCLEAN:
        _end_now(code)
    end_process(code, last=_end_what_is_left)


def _run(plan: Plan, supervisor: BufferedReader) -> int:
    if plan.up_descriptor is not None:
        os.set_inheritable(plan.up_descriptor, False)  # what the app or its tasks start has nothing to tell
    try:
        with logging_of_program(plan.log_level, plan.log_format):
            app = load_app(plan.target)
        worker = _worker(plan, app)
    except ConfigurationError as error:
        return _refuse(plan, error)
    if plan.up_descriptor is not None:
        _tell_settings(app, plan.up_descriptor)
    if plan.introduces and app.ignored_variables:
        app.warn_of_ignored_variables()
    _obey(worker, supervisor)
    _guard_the_end(worker)
    if plan.introduces:
        _introduce(app, worker)
    if plan.up_descriptor is not None and (plan.beats or app.conf.worker_liveness_file is not None):
        _beat(worker, plan.up_descriptor)
    if plan.introduces and plan.options.burst:
        _warn(worker)  # it may have ended before anything that waits
    _start_thread("ekiden-first-steps", lambda: _take_first_steps(plan, worker), worker)
    try:
        clean = worker.run()
    except ConfigurationError as error:
        return _refuse(plan, error)
    except EkidenError as error:
        if error is not worker.failure:  # else it was logged when it happened
            logger.error("%s", error)
        return EXIT_FAILED
    except BaseException as error:
        if error is not worker.failure:
            raise
        return EXIT_FAILED
    if not clean:
        return EXIT_UNCLEAN
    app.close()
    return EXIT_REPLACE if worker.recycled else EXIT_DONE


def _worker(plan: Plan, app: Ekiden) -> Worker:
    """What does the work. Raises ConfigurationError for whatever keeps it from being made: trying again is no use."""
    try:
        plugins.check_shared(app.broker_url(), app.backend_url())
        return Worker(app, _options(plan, app), claims_name=plan.claims_name, instance=plan.instance)
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"{plan.target}: a worker cannot start: {what_failed(error)}") from error


def _options(plan: Plan, app: Ekiden) -> WorkerOptions:
    """The plan's, and the app's settings for what only a process that can be replaced needs."""
    conf, options = app.conf, plan.options
    return msgspec.structs.replace(
        options,
        max_tasks=options.max_tasks or conf.worker_max_tasks_per_process,
        max_memory_mb=options.max_memory_mb or conf.worker_max_memory_per_process,
    )


def _tell_settings(app: Ekiden, descriptor: int) -> None:
    """Tell the supervisor, which does not import the app, what the app's settings say to it."""
    conf = app.conf
    told = SupervisorSettings(
        processes=conf.worker_processes, grace=conf.worker_grace, liveness_file=conf.worker_liveness_file
    )
    with contextlib.suppress(OSError):  # it is gone; what watches it ends this process
        os.write(descriptor, msgspec.json.encode(told) + b"\n")


def _refuse(plan: Plan, error: EkidenError) -> int:
    """Say why this app cannot be worked for."""
    if plan.speaks and plan.log_format == "json":
        logger.critical("%s", error)
    elif plan.speaks:
        sys.stderr.write(f"Error: {indented_below(str(error))}\n")
        sys.stderr.flush()
    return EXIT_UNUSABLE


def _introduce(app: Ekiden, worker: Worker) -> None:
    """Say what is worked for; passwords in URLs are hidden."""
    results = app.backend_url() if app.stores_results() else "replied to who sent the call"
    logger.info("broker %s, results %s", app.broker_url(), results)
    logger.info("queues %s", ", ".join(worker.queues))
    logger.info("tasks %s", ", ".join(sorted(app.tasks)) or "none: the setting include names modules that have some")


def _warn(worker: Worker) -> None:
    """Say what its tasks should not rely on."""
    try:
        for warning in worker.warnings():
            logger.warning("%s", warning)
    except EkidenError as error:
        logger.warning("what the tasks should not rely on with this broker is not known: %s", error)


def _take_first_steps(plan: Plan, worker: Worker) -> None:
    """What can wait until this worker works: the first tasks need not wait for it."""
    while not worker.ready.wait(_LOOK_SECONDS):
        if worker.is_stopping():
            return
    if plan.introduces and not plan.options.burst:
        _warn(worker)
    worker.wait_for_stop(_SETTLED_SECONDS)
    gc.collect()
    gc.freeze()  # what is loaded by now stays, so the collector need not look at it again and again


def _obey(worker: Worker, supervisor: BufferedReader) -> None:
    """Stop when told to by a signal or through the pipe, or when the supervisor is gone."""
    told: SimpleQueue[bool] = SimpleQueue()

    def stop_when_told() -> None:
        # Not in the signal's handler: it interrupts the receiving thread, perhaps while that holds a lock which
        # stopping needs.
        while True:
            worker.stop(at_once=told.get())

    def watch_supervisor() -> None:
        while supervisor.readline():
            told.put(True)
        if not worker.is_stopping():
            logger.warning("the supervisor is gone; %s drains and ends", worker.name)
            told.put(False)

    _start_thread("ekiden-stop", stop_when_told, worker)
    _start_thread("ekiden-supervisor-watch", watch_supervisor, worker)
    for number in STOP_SIGNALS:
        if not is_ignored(number):
            obey(number, lambda: told.put(False))


def _guard_the_end(worker: Worker) -> None:
    """End this process if it does not wind up after a stop, whatever that was for: nobody would take its place."""

    def guard() -> None:
        while not worker.is_stopping():
            worker.wait_for_stop(threading.TIMEOUT_MAX)
        stopped = time.monotonic()
        while time.monotonic() - stopped < _WIND_UP_SECONDS + (0.0 if worker.ends_at_once() else worker.grace):
            time.sleep(_LOOK_SECONDS)
        logger.critical("%s does not end, and its process is ended; what it held comes back", worker.name)
        _end_now(EXIT_UNCLEAN)

    _start_thread("ekiden-end-guard", guard, worker)


def _end_now(code: int) -> None:
    """End this process whatever its threads do: a body may still run in one that cannot be ended."""
    flushing = threading.Thread(target=_flush, daemon=True)
    with contextlib.suppress(RuntimeError):
        flushing.start()
        flushing.join(_LOOK_SECONDS)  # whoever reads what is written may not do so any more
    _end_what_is_left()
    os._exit(code)


def _end_what_is_left() -> None:
    """End what tasks have started; the supervisor does it for a process that is killed."""
    try:
        left = end_descendants(os.getpid(), WORKER_MARK, os.environ.get(WORKER_MARK, ""))
        if left:
            logger.warning("processes that tasks have left behind are killed: %s", left)
    except OSError as error:
        logger.error("what tasks have started may live on: %s", error)


def _flush() -> None:
    logging.shutdown()
    with contextlib.suppress(Exception):
        sys.stdout.flush()


def _beat(worker: Worker, descriptor: int) -> None:
    """Tell the supervisor every second that this worker is well, for as long as it is."""
    os.set_blocking(descriptor, False)

    def beat() -> None:
        was_stalled = False
        pause = threading.Event()
        while not pause.wait(_BEAT_SECONDS):
            stalled = worker.stalled()
            if stalled is not None and not was_stalled:
                logger.error("%s does not count as alive for its liveness file: %s", worker.name, stalled)
            elif stalled is None and was_stalled:
                logger.warning("%s counts as alive again", worker.name)
            was_stalled = stalled is not None
            try:
                if not was_stalled:
                    os.write(descriptor, BEAT)
            except BlockingIOError:
                continue  # the supervisor stands still
            except OSError:
                return  # it is gone

    _start_thread("ekiden-beat", beat, worker)


def _start_thread(name: str, work: Callable[[], None], worker: Worker) -> None:
    """A thread without which this process must not go on."""

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the worker ends with it
            worker.fail(error)

    threading.Thread(target=run, name=name, daemon=True).start()


if __name__ == "__main__":
    main()
