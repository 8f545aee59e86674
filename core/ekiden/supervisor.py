"""The supervisor: starts worker processes, replaces those that die, stops them all.

It never imports the app and opens no broker, so nothing of the user's can hang or kill it. What the app's settings say
to it, the first worker process tells once it has imported the app; until then that one is alone, unless the command
line says how many there are.

Each worker process is a fresh interpreter with a pipe from here as its standard input; when the supervisor dies the
pipes close and the processes drain. Another pipe leads up here. SIGTERM and SIGHUP tell a process to drain, and may be
sent by anybody and twice; to end at once is said through the pipe. One thread a process waits for its end; everything
else happens in the thread that called ``run``. What the machine does not give now (a process, a thread, a place for a
file) is logged and tried again; it ends no process that works.

When a worker process has ended, whatever ended it, what its tasks have started ends with it: see ``descendants``.

A slot is a place for one process after the other. Its name is the consumer's name at the broker, so that a replaced
process's deliveries come back as soon as its successor opens. The names are unique unless the user chose one; then
each process first asks whether a worker of another supervisor has it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import FrameType

import msgspec

from ekiden.descendants import end_descendants
from ekiden.errors import ConfigurationError
from ekiden.loggers import safe_logger
from ekiden.plan import (
    END_AT_ONCE,
    EXIT_DONE,
    EXIT_REPLACE,
    EXIT_UNUSABLE,
    Plan,
    SupervisorSettings,
    WorkerOptions,
    exit_text,
    unique_name,
)
from ekiden.private_files import touch
from ekiden.spawning import STOP_SIGNALS, WORKER_MARK, hear, is_ignored
from ekiden.starting import Spare, WorkerProcess

logger = safe_logger("ekiden.supervisor")

_AT_ONCE_SECONDS = 2.0
_GRACE_MARGIN_SECONDS = 5.0
_LOOK_SECONDS = 1.0
_FRESH_SECONDS = 30.0
_SHORT_LIFE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 30.0
_LET_SPEAK_SECONDS = 1.0
_POLL_SECONDS = 0.5
_WATCH_AGAIN_SECONDS = 5.0
_HEAR_SECONDS = 0.02
_BYTES_AT_ONCE = 4096
_LONGEST_LINE_BYTES = 100_000
_NOTHING_TOLD = SupervisorSettings(processes=None, grace=25.0, liveness_file=None)


class SupervisorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How many worker processes, and how they work. ``grace``: seconds that running tasks get at a stop.

    What is None comes from the app's settings; see ``plan.SupervisorSettings``.
    """

    worker: WorkerOptions
    processes: int | None = None
    grace: float | None = None
    log_level: str = "info"
    log_format: str = "text"
    liveness_file: str | None = None
    reload_paths: tuple[str, ...] = ()


class _Slot:
    """A place for a worker process: the current one, since when it runs, and whether it is being replaced.

    ``speaks``: it says why the app cannot be worked for; see Plan. ``up``: the pipe from it, ``heard`` what came
    through before the end of the first line, ``settings`` what that line said, and ``beat_at`` when it last said that
    it is well. ``mark``: by which what it has started is found. ``polled``: no thread waits for its end. ``leaving``:
    there are to be fewer processes, and nobody takes its place.
    """

    __slots__ = (
        "beat_at",
        "heard",
        "leaving",
        "mark",
        "name",
        "pause",
        "polled",
        "process",
        "replacing",
        "settings",
        "speaks",
        "start_at",
        "started",
        "up",
    )

    def __init__(self, name: str, *, speaks: bool) -> None:
        self.name = name
        self.speaks = speaks
        self.process: subprocess.Popen[bytes] | None = None
        self.mark = ""
        self.polled = False
        self.up: int | None = None
        self.heard = b""
        self.settings: SupervisorSettings | None = None
        self.beat_at = -math.inf
        self.started = 0.0
        self.start_at: float | None = 0.0
        self.pause = 0.0
        self.replacing = False
        self.leaving = False

    def hear(self) -> None:
        """Note what the process has said: the app's settings first, then that it is well."""
        if self.up is None:
            return
        with contextlib.suppress(BlockingIOError):
            while found := os.read(self.up, _BYTES_AT_ONCE):
                if self.settings is None:
                    line, newline, found = (self.heard + found).partition(b"\n")
                    self.heard = line
                    if newline or len(line) > _LONGEST_LINE_BYTES:
                        self.settings = _settings_in(line)
                if found:
                    self.beat_at = time.monotonic()

    def listen(self, up: int) -> None:
        """Hear a new process through this pipe."""
        self.up, self.heard, self.settings = up, b"", None

    def close_pipe(self) -> None:
        """Hear no more. May be called again."""
        up, self.up = self.up, None
        if up is not None:
            os.close(up)


class _Ended(msgspec.Struct, frozen=True):
    """A worker process has ended."""

    slot: _Slot
    code: int


class _Stop(msgspec.Struct, frozen=True):
    """A signal to stop has arrived, or the second one."""


class _Reload(msgspec.Struct, frozen=True):
    """A file has changed."""

    paths: tuple[str, ...]


class Supervisor:
    """Keeps the worker processes of one app running until it is told to stop.

    ``_settings``: the app's, as the first slot's process told them. ``_asks``: it is to tell them (anew).
    """

    def __init__(self, target: str, options: SupervisorOptions, spare: Spare | None = None) -> None:
        """``spare``: a process that was started ahead."""
        self._target = target
        self._spare = spare
        self._options = options
        self._events: SimpleQueue[_Ended | _Stop | _Reload] = SimpleQueue()
        if options.liveness_file is not None and os.name != "posix":
            raise ConfigurationError("--liveness-file works on POSIX systems only.")
        self._liveness_trouble: str | None = None
        # Two supervisors must not take each other's deliveries, and in containers both may be process 1 of one host.
        self._instance = unique_name()
        self._slots: list[_Slot] = []
        self._settings = _NOTHING_TOLD
        self._asks = os.name == "posix"
        self._have(options.processes or (1 if self._asks else _cpus()))
        self._stopping = 0
        self._kill_at: float | None = None
        self._exit_code = EXIT_DONE

    def run(self) -> int:
        """Run until every process has ended; the exit status for the command. Call it from the main thread."""
        for number in (signal.SIGINT, *STOP_SIGNALS):
            if number in {signal.SIGINT, signal.SIGTERM} or not is_ignored(number):
                signal.signal(number, self._on_signal)
        hear(signal.SIGINT, *STOP_SIGNALS)
        stop_watching = self._watch_files()
        try:
            while self._work():
                continue
        finally:
            stop_watching()
            self._end_all()
        return self._exit_code

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._events.put(_Stop())

    # What the app's settings say.

    def _grace(self) -> float:
        """Seconds that running tasks get at a stop."""
        return self._settings.grace if self._options.grace is None else self._options.grace

    def _liveness_file(self) -> str | None:
        return self._options.liveness_file or self._settings.liveness_file

    def _hear_settings(self) -> None:
        """Take the app's settings once the first slot's process has told them."""
        first = self._slots[0]
        if not self._asks or first.replacing:
            return
        first.hear()
        if first.settings is None:
            return
        self._settings, self._asks = first.settings, False
        if not self._stopping and self._options.processes is None:
            self._have(first.settings.processes or _cpus())

    def _have(self, count: int) -> None:
        """Have so many slots; what runs in one too many drains."""
        base = self._options.worker.name or self._instance
        for number in range(len(self._slots) + 1, count + 1):
            self._slots.append(_Slot(f"{base}:{number}", speaks=number == 1))
        for slot in self._slots[:count]:
            if slot.leaving:  # its process drains already, or has ended
                slot.leaving, slot.replacing = False, True
                slot.start_at = 0.0 if slot.process is None else None
        for slot in self._slots[count:]:
            slot.leaving, slot.start_at = True, None
            if slot.process is not None:
                slot.process.terminate()
        self._forget_left()

    def _forget_left(self) -> None:
        # From the end only: a slot's number is its place.
        while self._slots[-1].leaving and self._slots[-1].process is None:
            self._slots.pop()

    def _work(self) -> bool:
        """One turn: start what is due, wait for an event, act on it. False when nothing is left to do."""
        self._start_due()
        waits_for_change = self._options.reload_paths and not self._stopping
        if not waits_for_change and all(slot.process is None and slot.start_at is None for slot in self._slots):
            return False
        self._poll()
        try:
            event = self._events.get(timeout=self._longest_wait())
        except Empty:
            event = None
        self._hear_settings()
        match event:
            case _Ended(slot=slot, code=code):
                self._ended(slot, code)
            case _Stop():
                self._stop()
            case _Reload(paths=paths):
                self._reload(paths)
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._kill()
        self._tell_liveness()
        _reap_strangers({slot.process.pid for slot in self._slots if slot.process is not None})
        return True

    def _longest_wait(self) -> float:
        now = time.monotonic()
        due = [slot.start_at - now for slot in self._slots if slot.process is None and slot.start_at is not None]
        if self._kill_at is not None:
            due.append(self._kill_at - now)
        needs_looks = self._liveness_file() is not None or os.getpid() == 1
        longest = _LOOK_SECONDS if needs_looks else 60.0
        if any(slot.polled for slot in self._slots):
            longest = _POLL_SECONDS
        if self._asks and self._slots[0].up is not None:
            longest = _HEAR_SECONDS
        return max(0.01, min([longest, *due]))

    # Processes.

    def _start_due(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.process is None and slot.start_at is not None and slot.start_at <= now:
                self._start(slot)

    def _start(self, slot: _Slot) -> None:
        plan = Plan(
            target=self._target,
            introduces=slot.speaks and not slot.started,
            speaks=slot.speaks,
            options=msgspec.structs.replace(self._options.worker, name=slot.name, grace=self._options.grace),
            log_level=self._options.log_level,
            log_format=self._options.log_format,
            instance=self._instance,
            claims_name=self._options.worker.name is not None,
            beats=self._options.liveness_file is not None,
        )
        try:
            process = self._spawn(slot, plan)
        except (OSError, MemoryError) as error:
            # No memory, no processes, no descriptors: that is the machine's trouble. The others work on.
            slot.pause = min(slot.pause * 2 or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
            slot.start_at = time.monotonic() + slot.pause
            logger.error("a worker process cannot be started: %r; tried again in %.1f s", error, slot.pause)
            return
        slot.process = process
        slot.started = time.monotonic()
        slot.start_at = None
        slot.replacing = False
        waiting = threading.Thread(
            target=self._wait, args=(slot, process), name=f"ekiden-wait-{slot.name}", daemon=True
        )
        try:
            waiting.start()
            slot.polled = False
        except RuntimeError:
            slot.polled = True  # no threads either

    def _spawn(self, slot: _Slot, plan: Plan) -> subprocess.Popen[bytes]:
        """Start a process, or take what was started ahead, and give it its plan. Raises OSError."""
        ahead = None if self._spare is None else self._spare.take()
        started = ahead or WorkerProcess([self._target])
        slot.mark = started.mark
        if started.up is not None:
            slot.listen(started.up)
        plan = msgspec.structs.replace(plan, up_descriptor=started.up_descriptor)
        _tell(started.process, msgspec.json.encode(plan) + b"\n")
        return started.process

    def _wait(self, slot: _Slot, process: subprocess.Popen[bytes]) -> None:
        self._events.put(_Ended(slot, process.wait()))

    def _poll(self) -> None:
        """Ask after the processes for whose end no thread waits."""
        for slot in self._slots:
            if slot.polled and slot.process is not None and (code := slot.process.poll()) is not None:
                slot.polled = False
                self._events.put(_Ended(slot, code))

    def _ended(self, slot: _Slot, code: int) -> None:
        assert slot.process is not None
        assert slot.process.stdin is not None
        pid, lived = slot.process.pid, time.monotonic() - slot.started
        with contextlib.suppress(BrokenPipeError):  # it has not read all that it was told
            slot.process.stdin.close()
        slot.process = None
        slot.close_pipe()
        _end_what_is_left(pid, slot.mark)
        spoke, slot.speaks = slot.speaks, True
        if slot.leaving:
            self._forget_left()
            return
        if self._stopping or (code == EXIT_DONE and self._options.worker.burst and not slot.replacing):
            return
        if slot.replacing or code == EXIT_REPLACE:
            slot.pause = 0.0
        elif code == EXIT_UNUSABLE:
            if spoke or self._options.reload_paths:
                self._unusable()
                return
            slot.pause = _LET_SPEAK_SECONDS
        else:
            short = lived <= _SHORT_LIFE_SECONDS
            slot.pause = min(slot.pause * 2 or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS) if short else 0.0
            verb = "ended by itself" if code == EXIT_DONE else "died"
            logger.error("worker process %d %s (%s); it is replaced in %.1f s", pid, verb, exit_text(code), slot.pause)
        slot.start_at = time.monotonic() + slot.pause

    def _unusable(self) -> None:
        """The app cannot work as it is, and a process has said why."""
        if self._options.reload_paths:
            logger.info("waiting for a change")
        else:
            self._exit_code = EXIT_UNUSABLE
            self._stop()

    # Stopping.

    def _stop(self) -> None:
        self._stopping += 1
        grace = self._grace() + _GRACE_MARGIN_SECONDS if self._stopping == 1 else _AT_ONCE_SECONDS
        self._kill_at = time.monotonic() + grace
        if self._stopping == 1 and self._exit_code == EXIT_DONE:
            logger.info("stopping: running tasks get %g s; once more to end at once", self._grace())
        for slot in self._slots:
            slot.start_at = None
            if slot.process is not None and self._stopping == 1:
                slot.process.terminate()
            elif slot.process is not None:
                _tell(slot.process, END_AT_ONCE)

    def _kill(self) -> None:
        for slot in self._slots:
            if slot.process is not None:
                logger.error(
                    "worker process %d did not end in time and is killed; its tasks come back", slot.process.pid
                )
                slot.process.kill()
        self._kill_at = None

    def _end_all(self) -> None:
        for slot in self._slots:
            if slot.process is not None:
                slot.process.kill()
                slot.process.wait()
                _end_what_is_left(slot.process.pid, slot.mark)
            slot.close_pipe()

    # Reloading and telling.

    def _reload(self, paths: tuple[str, ...]) -> None:
        if self._stopping:
            return
        logger.info("%s changed: the worker processes are replaced", ", ".join(paths[:3]))
        self._asks = os.name == "posix"
        for slot in self._slots:
            slot.speaks = slot is self._slots[0]
            if slot.leaving:
                continue
            if slot.process is None:
                slot.start_at = 0.0
            else:
                slot.replacing = True
                slot.process.terminate()

    def _watch_files(self) -> Callable[[], None]:
        if not self._options.reload_paths:
            return lambda: None
        try:
            from watchfiles import PythonFilter, watch  # an extra: only for development
        except ImportError as error:
            raise ConfigurationError("--reload needs watchfiles: pip install 'ekiden[reload]'.") from error
        stop = threading.Event()

        def tell() -> None:
            while not stop.is_set():
                try:
                    for changes in watch(*self._options.reload_paths, watch_filter=PythonFilter(), stop_event=stop):
                        self._events.put(_Reload(tuple(sorted(path for _, path in changes))))
                except Exception as error:  # noqa: BLE001 - no watches left, a path that is gone: it may come back
                    logger.error("changed files are not seen: %s; tried again in %d s", error, _WATCH_AGAIN_SECONDS)
                    stop.wait(_WATCH_AGAIN_SECONDS)

        thread = threading.Thread(target=tell, name="ekiden-reload", daemon=True)
        thread.start()

        def stop_watching() -> None:
            stop.set()
            thread.join()

        return stop_watching

    def _tell_liveness(self) -> None:
        """Touch the liveness file while every process has lately said that it is well."""
        path = self._liveness_file()
        if path is None:
            return
        for slot in self._slots:
            slot.hear()
        wanted = [slot for slot in self._slots if slot.process is not None or slot.start_at is not None]
        if not wanted or any(time.monotonic() - slot.beat_at > _FRESH_SECONDS for slot in wanted):
            return
        trouble = None
        try:
            touch(path)
        except OSError as error:
            trouble = str(error)
        if trouble is not None and trouble != self._liveness_trouble:
            logger.error("the liveness file cannot be touched, so that this worker looks dead: %s", trouble)
        elif trouble is None and self._liveness_trouble is not None:
            logger.warning("the liveness file is touched again: %s", path)
        self._liveness_trouble = trouble


def _cpus() -> int:
    from ekiden.cpus import available_cpus  # only where nobody says how many processes

    return available_cpus()


def _settings_in(line: bytes) -> SupervisorSettings:
    try:
        return msgspec.json.decode(line, type=SupervisorSettings)
    except msgspec.DecodeError as error:  # code of the user's has written to a descriptor that is not its own
        logger.error("what the app's settings say to the supervisor cannot be read, and its defaults hold: %s", error)
        return _NOTHING_TOLD


def _tell(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has died already; its end is on its way
        process.stdin.write(text)
        process.stdin.flush()


def _end_what_is_left(pid: int, mark: str) -> None:
    """A worker process has ended: end what its tasks have started and left behind."""
    try:
        left = end_descendants(pid, WORKER_MARK, mark)
    except OSError as error:  # no descriptors left to look for them
        logger.error("what worker process %d has left behind may live on: %s", pid, error)
        return
    if left:
        logger.warning("worker process %d has left processes of its tasks behind, which are killed: %s", pid, left)


def _reap_strangers(own: set[int]) -> None:
    """As process 1 of a container: take the exit status of orphans, which nobody else will."""
    if os.getpid() != 1:
        return
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in own:
            return
        os.waitpid(found.si_pid, 0)
