"""Runs the bodies of jobs where they belong, within their limits.

    ``def``         a thread; a body process if it has a hard time limit, says so, or was handed out before
    ``async def``   the event loop; a body process if it was handed out before

A message that was handed out before may have killed its worker: in a process of its own it can do no more harm. It
is run before all that waits, and only in a process that is ready (``reserve``): so that from its second hand-out on, a
worker that has it in hand has started it, and a death of that worker is rightly counted against it.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from ekiden.app import Ekiden
from ekiden.body_frames import Answer, Ask, Run
from ekiden.body_process import BodyProcess, answer_ask
from ekiden.errors import MisuseError, SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from ekiden.execution import Terminated, finish, outcome_of, run, run_async
from ekiden.failures import failure_record
from ekiden.job import Job, Work
from ekiden.loggers import safe_logger
from ekiden.options import publishing
from ekiden.outcomes import Failed, Outcome, Postponed, Revoked, Unprocessable
from ekiden.pools import Alarm, ThreadBody, Watchdog
from ekiden.request import Execution, running
from ekiden.retry import asks_for_tries_after_death
from ekiden.spawning import private_bytes

if TYPE_CHECKING:
    import asyncio

    from ekiden.event_loop import EventLoop, Interruptible

logger = safe_logger("ekiden.worker")

_STOP_THREADS_SECONDS = 0.5
_BLOCKED_SECONDS = 30.0
_PREPARED_AT_ONCE = 4
_NO_PROCESS_DELAY_SECONDS = 1.0
_NO_PROCESS = (
    "it needs a process of its own (time_limit or pool='process'), and such a process has to import the app: define "
    "the app at the top level of a module."
)


class Runner:
    """Starts bodies, interrupts them, and says how they ended.

    ``settle_first(job)`` settles a job of an at-most-once task before its body, and says whether it may run.
    ``started(job)`` and ``ended(job)`` are called in whatever thread ran it; ``job.outcome`` is set by then.
    ``failed(error)`` is called for what a thread of ours cannot handle.
    """

    def __init__(
        self,
        app: Ekiden,
        *,
        name: str,
        threads: int,
        async_concurrency: int,
        target: str | None,
        settle_first: Callable[[Job], bool],
        started: Callable[[Job], None],
        ended: Callable[[Job], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._app = app
        self._name = name
        self._thread_count = threads
        self._async_concurrency = async_concurrency
        self._target = target
        self._settle_first = settle_first
        self._started = started
        self._ended = ended
        self._failed = failed
        self._waiting: SimpleQueue[Job | _Look | None] = SimpleQueue()
        self._urgent: deque[Job] = deque()
        self._threads: list[threading.Thread] = []
        self._watchdog = Watchdog(failed)
        self._loop: EventLoop | None = None
        self._processes = BodyProcesses(target)
        self._interrupts: dict[int, Callable[[], None]] = {}
        self._closing = False
        self._abandoning = False

    def start(self) -> None:
        """Start the body threads."""
        for index in range(self._thread_count):
            thread = threading.Thread(target=self._run_jobs, name=f"ekiden-body-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def submit(self, jobs: list[Job]) -> None:
        """Run ``jobs`` as soon as there is room: first what was handed out before."""
        for_loop: list[_LoopBody] = []
        for job in jobs:
            work = job.work
            assert work is not None, "only what can be run is handed out"
            if work.task.is_async and not self._needs_process(job, work):
                for_loop.append(_LoopBody(self, job))
            elif job.delivery.attempt > 1:
                self._urgent.append(job)
                self._waiting.put(_LOOK)
            else:
                self._waiting.put(job)
        if for_loop:
            self._opened_loop().submit(list(for_loop))

    def reserve(self, job: Job) -> bool:
        """Whether ``job`` would start as soon as a thread takes it; the process it needs, if any, is its own then.

        False: no process is ready yet; some are being started. Where none can be started it is True, so that ``job``
        learns why when it is run. Take it back with ``unreserve`` where it is not run after all.
        """
        work = job.work
        assert work is not None, "only what can be run is handed out"
        return not self._needs_process(job, work) or self._processes.reserve(job, at_most=self._thread_count)

    def unreserve(self, job: Job) -> None:
        """``job`` is not run: its process is for another one."""
        self._processes.unreserve(job)

    def processes_ready(self) -> int:
        """How many body processes are ready and idle."""
        return self._processes.ready()

    def take_back(self) -> list[Job]:
        """Every job that has not been started; they are not run any more."""
        jobs: list[Job] = []
        while True:
            try:
                job = self._waiting.get_nowait()
            except Empty:
                break
            if isinstance(job, Job):
                jobs.append(job)
        while (urgent := self._next_urgent()) is not None:
            jobs.append(urgent)
        from_loop: list[Job] = []
        while self._loop is not None and (body := self._loop.take_back()) is not None:
            assert isinstance(body, _LoopBody)
            from_loop.append(body.job)
        return jobs + from_loop[::-1]

    def in_loop(self) -> int:
        """How many jobs the event loop has, running or waiting."""
        return 0 if self._loop is None else self._loop.in_hand()

    def stalled(self) -> str | None:
        """What cannot run bodies any more though it should, in a few words. Called every second by one thread."""
        if not self._closing and not all(thread.is_alive() for thread in self._threads):
            return "a thread that runs bodies has ended"
        blocked = 0.0 if self._loop is None else self._loop.blocked_for()
        if blocked > _BLOCKED_SECONDS:
            return f"the event loop has been blocked for {blocked:.0f} s, by an async task that does not await"
        return None

    def memory_bytes(self) -> int:
        """How much memory the body processes take that they share with nobody."""
        return self._processes.memory_bytes()

    def terminate(self, job: Job) -> None:
        """End a body, as REVOKED, when it has started; or do not start it. Nothing happens if it has ended."""
        job.terminated = True
        interrupt = self._interrupts.get(id(job))
        if interrupt is not None:
            interrupt()

    def close(self, grace: float) -> bool:
        """End every thread and process. Running bodies get ``grace`` seconds; False if one would not end."""
        self._closing = True
        self._processes.keep_none()
        for _ in self._threads:
            self._waiting.put(None)
        deadline = time.monotonic() + grace
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._abandoning = True
        for interrupt in list(self._interrupts.values()):
            interrupt()  # another worker will soon run it again
        self._processes.close()
        if self._loop is not None:
            self._loop.close(_STOP_THREADS_SECONDS)
        self._watchdog.close()
        deadline = time.monotonic() + _STOP_THREADS_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # Threads.

    def _run_jobs(self) -> None:
        try:
            self._run_until_closed(ThreadBody())
        except BaseException as error:  # noqa: BLE001 - a bug of ours: the worker must end, not go on with fewer threads
            self._failed(error)

    def _next_urgent(self) -> Job | None:
        try:
            return self._urgent.popleft()
        except IndexError:
            return None  # another thread was quicker

    def _run_until_closed(self, body: ThreadBody) -> None:
        while (job := self._waiting.get()) is not None:
            if self._urgent and (urgent := self._next_urgent()) is not None:
                self._waiting.put(job)  # behind the others: it is its looking mark that is left over
                job = urgent
            if job is _LOOK:
                continue
            job.started = time.monotonic()
            work = job.work
            assert work is not None, "only what can be run is handed out"
            try:
                if self._needs_process(job, work):
                    outcome = self._run_in_process(job, work)
                else:
                    outcome = self._run_in_thread(job, work, body)
            except Exception as error:  # what a call holds is its own trouble, whatever it is
                logger.exception("%s could not be run", job)
                outcome = outcome_of(error, work.policy, work.request, time.time())
            if self._abandoning:
                return
            if outcome is not None:
                job.outcome = outcome
                self._ended(job)

    def _may_begin(self, job: Job, work: Work) -> bool:
        """Called when nothing is left to do but to begin: settle what is to be settled first, tell what is to be told.

        False: it must not run.
        """
        if work.policy.acks_early and not self._settle_first(job):
            return False
        if work.policy.track_started:
            self._started(job)
        return True

    def _run_in_thread(self, job: Job, work: Work, body: ThreadBody) -> Outcome | None:
        if (work.policy.acks_early or work.policy.track_started) and not self._may_begin(job, work):
            return None
        body.begin()
        turn = body.turn
        self._interrupts[id(job)] = lambda: body.interrupt_until_done(self._watchdog, Terminated, turn)
        alarm: Alarm | None = None
        if work.soft_time_limit is not None:
            alarm = self._watchdog.after(
                work.soft_time_limit, lambda: body.interrupt_until_done(self._watchdog, SoftTimeLimitExceeded, turn)
            )
        try:
            if job.terminated:
                return Revoked(terminated=True)
            # In a context of its own: context variables, and so the decimal context, are as in a new thread.
            return contextvars.Context().run(run, work.task, work.policy, work.request)
        except (SoftTimeLimitExceeded, Terminated) as late:
            # Raised while the body's last line ran, it arrived after that.
            return outcome_of(late, work.policy, work.request, time.time())
        finally:
            body.end()
            del self._interrupts[id(job)]
            if alarm is not None:
                alarm.cancel()

    # Body processes.

    def _needs_process(self, job: Job, work: Work) -> bool:
        if job.delivery.attempt > 1 and self._target is not None:
            return True
        return not work.task.is_async and (work.policy.pool == "process" or work.time_limit is not None)

    def _run_in_process(self, job: Job, work: Work) -> Outcome | None:
        ended_by: list[BaseException] = []
        began = time.monotonic()
        if self._target is None:
            return self._ended_outside(work, MisuseError(_NO_PROCESS), began)
        try:
            process = self._processes.take(job)
        except WorkerLostError as error:
            return self._after_death(job, work, error, began, delay=_NO_PROCESS_DELAY_SECONDS)
        except OSError as error:
            # No memory, no descriptors, no processes left: that is this machine's trouble, not the task's.
            logger.warning("no body process can be started for %s: %s", job, error)
            return Postponed(_NO_PROCESS_DELAY_SECONDS, str(error))
        if not self._may_begin(job, work):
            self._processes.give_back(process)
            return None

        def end(error: BaseException) -> None:
            ended_by.append(error)
            process.kill()

        self._interrupts[id(job)] = lambda: end(Terminated())
        alarm: Alarm | None = None
        if work.time_limit is not None:
            exceeded = _limit_exceeded(work.time_limit)
            alarm = self._watchdog.after(work.time_limit, lambda: end(exceeded))
        began = time.monotonic()
        frame = Run(job.delivery.message, job.delivery.attempt, self._name, work.soft_time_limit)
        try:
            if job.terminated:
                end(Terminated())
            outcome = process.run(frame, self._answer)
        except (WorkerLostError, MisuseError) as error:
            self._processes.drop(process)
            if ended_by or isinstance(error, MisuseError):
                return self._ended_outside(work, ended_by[0] if ended_by else error, began)
            return self._after_death(job, work, error, began)
        finally:
            del self._interrupts[id(job)]
            if alarm is not None:
                alarm.cancel()
        if ended_by:
            self._processes.drop(process)
        else:
            self._processes.give_back(process)
        return outcome

    def _ended_outside(self, work: Work, error: BaseException, began: float) -> Outcome:
        """The outcome of a body that did not end by itself: as if it had raised ``error``; its handlers run here."""
        return self._finished(work, outcome_of(error, work.policy, work.request, time.time()), error, began)

    def _after_death(
        self, job: Job, work: Work, error: WorkerLostError, began: float, *, delay: float = 0.0
    ) -> Outcome:
        """The outcome of a body whose process died, not by our hand: it is a death like a worker's.

        The message is handed out again, after ``delay`` seconds, unless that has been done often enough; or unless
        it cannot be, because it was settled first.
        """
        attempt = job.delivery.attempt
        if job.settled or asks_for_tries_after_death(work.policy, error, work.call.retries):
            return self._ended_outside(work, error, began)
        if attempt < work.policy.max_deliveries:
            return Postponed(delay, str(error), keep_attempt=True)
        lost = error if attempt == 1 else WorkerLostError(f"handed out {attempt} times; the last time {error}")
        outcome = self._finished(work, Failed(failure_record(lost, None)), lost, began)
        return Unprocessable(outcome.failure) if isinstance(outcome, Failed) else outcome

    def _finished(self, work: Work, outcome: Outcome, error: BaseException, began: float) -> Outcome:
        """``outcome``, after the task's handlers for it have run."""
        if self._abandoning:
            return outcome  # nobody looks at it: the message goes back
        return contextvars.Context().run(_finish, work, outcome, error, time.monotonic() - began)

    def _answer(self, ask: Ask) -> Answer:
        conf = self._app.conf
        return answer_ask(
            ask,
            # The body tries again by itself, as its call says.
            lambda messages, seconds: self._app.publisher.publish(
                messages, publishing(conf, timeout=seconds, retry=False)
            ),
            self._app,
        )

    # The event loop.

    def _opened_loop(self) -> EventLoop:
        if self._loop is None:
            from ekiden.event_loop import EventLoop  # asyncio takes 40 ms to import, and not every app has async tasks

            self._loop = EventLoop(self._async_concurrency, failed=self._failed)
        return self._loop

    async def _run_in_loop(self, job: Job) -> None:
        import asyncio

        from ekiden.event_loop import Interruptible

        work = job.work
        assert work is not None, "only what can be run is handed out"
        job.started = time.monotonic()
        if work.policy.acks_early and not await asyncio.to_thread(self._settle_first, job):
            return
        if work.policy.track_started:
            self._started(job)
        body = Interruptible()
        loop = asyncio.get_running_loop()
        self._interrupts[id(job)] = lambda: _end_in_loop(loop, body)
        if job.terminated:
            body.end(Terminated())
        body.after(work.soft_time_limit, body.interrupt, SoftTimeLimitExceeded())
        body.after(work.time_limit, body.end, _limit_exceeded(work.time_limit or 0.0))
        try:
            outcome = await run_async(work.task, work.policy, work.request, body.run)
        except Exception as error:  # as for threads
            logger.exception("%s could not be run", job)
            outcome = outcome_of(error, work.policy, work.request, time.time())
        finally:
            del self._interrupts[id(job)]
            body.close()
        if not self._abandoning:
            job.outcome = outcome
            self._ended(job)


class _Look(Enum):
    """Stands in the queue of what waits for each job that is to be run before all others."""

    LOOK = "look"


_LOOK = _Look.LOOK


class _LoopBody:
    """A job as the event loop runs it."""

    __slots__ = ("_runner", "job")

    def __init__(self, runner: Runner, job: Job) -> None:
        self._runner = runner
        self.job = job

    async def run(self) -> None:
        """Await its body and say how it ended."""
        await self._runner._run_in_loop(self.job)


def _finish(work: Work, outcome: Outcome, error: BaseException, runtime: float) -> Outcome:
    execution = Execution(work.request, [])
    running.set(execution)
    return finish(work.task, work.policy, execution, outcome, value=error, runtime=runtime)


def _limit_exceeded(seconds: float) -> TimeLimitExceeded:
    return TimeLimitExceeded(f"it ran longer than its time_limit of {seconds:g} s")


def _end_in_loop(loop: asyncio.AbstractEventLoop, body: Interruptible) -> None:
    loop.call_soon_threadsafe(body.end, Terminated())


class BodyProcesses:
    """The body processes of one worker: taken for one body, kept for the next.

    ``_mutex`` guards all of it. ``_taken`` has those that run a body, are reserved for one, or are being started.
    One thread starts those that are wanted ahead, and lives as long as this: a process ends with the thread that
    started it.
    """

    def __init__(self, target: str | None) -> None:
        self._target = target
        self._mutex = threading.Lock()
        self._idle: list[BodyProcess] = []
        self._taken: set[BodyProcess] = set()
        self._keeps = True
        self._reserved: dict[int, BodyProcess] = {}
        self._wanted: SimpleQueue[bool] = SimpleQueue()
        self._starting = 0
        self._starter: threading.Thread | None = None
        self._cannot_start = False
        self._closed = False

    def ready(self) -> int:
        """How many are idle."""
        return len(self._idle)

    def reserve(self, job: Job, *, at_most: int) -> bool:
        """Keep an idle process for ``job``. False if there is none: then more are started, up to ``at_most`` in all.

        True without one when the last one could not be started: whoever takes one then learns why.
        """
        while (process := self._take_idle()) is not None:
            if process.is_usable():
                with self._mutex:
                    self._reserved[id(job)] = process
                return True
            self.drop(process)
        with self._mutex:
            could_not, self._cannot_start = self._cannot_start, False
            if could_not or self._closed or self._target is None:
                return True
            if self._starting < _PREPARED_AT_ONCE and max(len(self._taken), self._starting) < at_most:
                self._starting += 1
                self._wanted.put(True)
                if self._starter is None:
                    self._starter = threading.Thread(target=self._start_wanted, name="ekiden-body-start", daemon=True)
                    self._starter.start()
        return False

    def unreserve(self, job: Job) -> None:
        """``job`` needs none after all."""
        with self._mutex:
            process = self._reserved.pop(id(job), None)
        if process is not None:
            self.give_back(process)

    def _start_wanted(self) -> None:
        """Start those that are wanted, together; each is idle when it is ready."""
        while self._wanted.get():
            count = 1
            while count < _PREPARED_AT_ONCE and not self._wanted.empty():
                if not self._wanted.get():
                    return
                count += 1
            starting = []
            for _ in range(count):
                try:
                    starting.append(self._begun())
                except (WorkerLostError, OSError) as error:
                    self._note_started(error)
            for process in starting:
                try:
                    self._wait_until_ready(process)
                except WorkerLostError as error:
                    self._note_started(error)
                else:
                    self.give_back(process)
                    self._note_started(None)

    def _note_started(self, error: Exception | None) -> None:
        with self._mutex:
            self._starting -= 1
            if error is None or self._closed:
                return
            self._cannot_start = True
        logger.warning("a body process could not be started: %s", error)

    def take(self, job: Job) -> BodyProcess:
        """A process that is ready: the one that is reserved for ``job``, or an idle one, or a new one.

        Raises WorkerLostError when none can be started.
        """
        with self._mutex:
            reserved = self._reserved.pop(id(job), None)
        if reserved is not None:
            if reserved.is_usable():
                return reserved
            self.drop(reserved)
        while (idle := self._take_idle()) is not None:
            if idle.is_usable():
                return idle
            # It died, or what the last body left behind in it still writes: that is not the next call's fault.
            self.drop(idle)
        process = self._begun()
        self._wait_until_ready(process)
        return process

    def _begun(self) -> BodyProcess:
        """A new one, which is not ready yet."""
        with self._mutex:
            if self._closed or self._target is None:
                raise WorkerLostError("the worker is stopping")
            process = BodyProcess(self._target)
            self._taken.add(process)
        return process

    def _wait_until_ready(self, process: BodyProcess) -> None:
        try:
            process.wait_until_ready()
        except WorkerLostError:
            self.drop(process)
            raise

    def _take_idle(self) -> BodyProcess | None:
        with self._mutex:
            if not self._idle:
                return None
            process = self._idle.pop()
            self._taken.add(process)
            return process

    def give_back(self, process: BodyProcess) -> None:
        """Its body has ended by itself: keep it for the next one."""
        with self._mutex:
            self._taken.discard(process)
            if self._keeps:
                self._idle.append(process)
                return
        process.close()

    def drop(self, process: BodyProcess) -> None:
        """It has died, or was ended."""
        with self._mutex:
            self._taken.discard(process)
        process.kill()
        process.close()

    def memory_bytes(self) -> int:
        """How much memory they take that they share with nobody."""
        with self._mutex:
            pids = [process.pid for process in (*self._idle, *self._taken)]
        return sum(map(private_bytes, pids))

    def keep_none(self) -> None:
        """End those that run no body, and the others when theirs has ended.

        For while the threads that started them still run: the kernel ends them with their threads, and then it is
        harder to find what they have started.
        """
        with self._mutex:
            self._keeps = False
            idle, self._idle = self._idle, []
        for process in idle:
            process.close()

    def close(self) -> None:
        """End every process; those that run a body, at once."""
        self.keep_none()
        with self._mutex:
            self._closed = True
            taken = list(self._taken)
            reserved = list(self._reserved.values())
            self._reserved.clear()
        self._wanted.put(False)
        for process in taken:
            process.kill()
        for process in reserved:
            process.close()
        if self._starter is not None:
            self._starter.join(_STOP_THREADS_SECONDS)
