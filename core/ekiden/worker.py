"""One worker process: receives, decides what may start, hands out, stops.

Threads, and what each owns:

    receiver      the thread that calls ``Worker.run``: claims deliveries, decides which may start, hands them out
    runner        ``--threads`` threads for ``def`` bodies, and one event loop for ``async def`` ones
    settler       stores results, settles and releases deliveries in batches, renews leases
    control       listens for what apps tell workers, such as to end a task

A delivery becomes a Job. ``_held`` has every job that is not settled: the receiver adds, the settler removes, and
everything in it has its lease renewed. Nothing is held that will not start shortly: how many deliveries are in hand
follows how fast they are worked off.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from ekiden import hooks
from ekiden.app import Ekiden, target_of
from ekiden.codec import decode_call
from ekiden.control import HeardRevocations, revocations
from ekiden.control_listener import ControlListener
from ekiden.errors import (
    TRANSPORT_IS_GONE,
    BackendError,
    BackendRefused,
    ConfigurationError,
    MessageError,
    NewerFormat,
    NotRegistered,
    TransportClosed,
    TransportError,
    WorkerLostError,
)
from ekiden.execution import with_last_error
from ekiden.failures import failure_record
from ekiden.job import Job, Work, signal_revoked
from ekiden.locks import Flag
from ekiden.loggers import safe_logger
from ekiden.message import DEAD_SUFFIX, Delivery, Message
from ekiden.options import Policy, check_limits
from ekiden.outcomes import AlreadyEnded, Expired, Outcome, Postponed, Revoked, SecondCopy, Unprocessable
from ekiden.plan import EXIT_UNCLEAN, WorkerOptions, unique_name
from ekiden.ratelimit import RateLimiter
from ekiden.request import Request
from ekiden.results import Backend, BeginOutcome, Start, each_apart
from ekiden.routes import check_queue_name
from ekiden.runner import Runner
from ekiden.settler import Settler
from ekiden.signature import Call
from ekiden.spawning import resident_bytes
from ekiden.task import Task
from ekiden.times import shown
from ekiden.transport import Consumer, Transport

logger = safe_logger("ekiden.worker")

_RECEIVE_SECONDS = 1.0
_BURST_RECEIVE_SECONDS = 0.1
_NO_ROOM_SECONDS = 0.25
_IN_HAND_SECONDS = 0.1
_CLAIMS_IN_HAND = 3
_WAITED_TOO_LONG_SECONDS = 0.5
_RATE_WINDOW_SECONDS = 0.02
_RATE_STEP_SECONDS = 0.05
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_TICK_SECONDS = 1.0
_STALLED_SECONDS = 45.0
_UNKNOWN_TASK_DELAY_SECONDS = 5.0
_STARTS_AT_ONCE_SECONDS = 0.02
_HELD_BACK_SECONDS = 0.2
_ALONE_FROM_ATTEMPT = 3
_GIVEN_BACK_WITHIN_SECONDS = 1.0
_FEWER_CLAIMED_SECONDS = 1.0
_AT_ONCE_SECONDS = 1.0
_LONGEST_NAME = 200
_BYTES_PER_MB = 1_000_000


class Worker:
    """Works for one app until it is stopped. ``run`` blocks; ``stop`` may be called by any thread.

    ``claims_name``: the name in ``options`` was chosen by somebody, so that another worker may have it. ``instance``
    is the supervisor's; its processes may follow each other under one name.
    """

    def __init__(
        self, app: Ekiden, options: WorkerOptions, *, claims_name: bool = True, instance: str | None = None
    ) -> None:
        conf = app.conf
        self._app = app
        self._options = options
        self.queues = tuple(options.queues or conf.worker_queues or app.queues())
        self.name = options.name or unique_name()
        if not self.name.isprintable() or len(self.name) > _LONGEST_NAME:
            raise ConfigurationError(
                f"{shown(self.name)} is no name of a worker; that is 1 to {_LONGEST_NAME} printable characters."
            )
        self._claims_name = claims_name and options.name is not None
        self._instance = instance or unique_name()
        self.lease = options.lease or conf.lease
        self.threads = options.threads or conf.worker_threads
        self.async_concurrency = options.async_concurrency or conf.worker_async_concurrency
        self.prefetch = options.prefetch or conf.worker_prefetch
        self.max_tasks = options.max_tasks
        self.grace = conf.worker_grace if options.grace is None else options.grace
        self._check_queues()
        self._target = target_of(app)
        self._policies = {name: self.policy(task) for name, task in app.tasks.items()}
        self._check_policies()
        self._held: dict[int, Job] = {}
        self._room = Flag()
        self._stopping = Flag()
        self._at_once = Flag()
        self.ready = Flag()
        self.recycled = False
        self._failure: BaseException | None = None
        self._settler: Settler | None = None
        self._runner: Runner | None = None
        self._consumer: Consumer | None = None
        self._control: ControlListener | None = None
        self._rate = 0.0
        self._rate_measured_at = 0.0
        self._rate_measured_count = 0
        self._ticked_at = 0.0
        self.last_turn = time.monotonic()

    def stop(self, *, at_once: bool = False) -> None:
        """Claim no more, give back what has not started, let the rest finish; ``at_once``: do not wait for it."""
        if at_once:
            self._at_once.set()
        self._stopping.set()
        self._room.set()
        if self._consumer is not None:
            self._stop_claiming(self._consumer)

    @property
    def failure(self) -> BaseException | None:
        """What ended it, if it could not go on. It was logged when it happened."""
        return self._failure

    def ends_at_once(self) -> bool:
        """Whether it was stopped without waiting for running tasks."""
        return self._at_once.is_set()

    def stalled(self) -> str | None:
        """What of it does no work any more though it should, in a few words; None while all is well.

        Called every second by one thread. A task may take as long as it likes, and a broker may be away: neither is
        meant.
        """
        now = time.monotonic()
        if self._settler is None or self._runner is None or self._control is None:
            return None
        if not self._stopping.is_set():
            if now - self.last_turn > _STALLED_SECONDS:
                return f"the thread that receives has been stuck for {now - self.last_turn:.0f} s"
            if not self._control.is_alive():
                return "the thread that hears what apps tell workers has ended"
        if now - self._settler.last_turn > _STALLED_SECONDS:
            since = now - self._settler.last_turn
            return f"the thread that stores results and settles has been stuck for {since:.0f} s"
        return self._runner.stalled() or _stalled_transport(self._app.opened_transport())

    def warnings(self) -> list[str]:
        """What its tasks should not rely on with this broker and backend: one sentence each.

        Raises BrokerUnavailable where the broker has to be asked and does not answer. May be called by any thread.
        """
        found = []
        policies = dict(self._policies)  # the receiver adds some
        held = self._app.opened_transport().longest_hold
        if held is not None:
            limited = [name for name, each in policies.items() if (each.time_limit or 0.0) > held]
            if limited:
                found.append(
                    f"the broker takes back what a worker holds for more than {held:g} s, and gives it to another one: "
                    f"the time_limit is longer of {', '.join(limited)}"
                )
        named = self._app.queues()
        unknown = [queue for queue in self._options.queues if queue not in named]
        if unknown:
            found.append(
                f"no task and no route of the app sends to {', '.join(unknown)}; its calls go to {', '.join(named)}"
            )
        for queue, limit in self._app.opened_transport().delivery_limits(self.queues).items():
            # The hand-out after the last of max_deliveries is the one that sends it to the dead letters.
            late = [name for name, each in policies.items() if each.max_deliveries > limit]
            if late:
                found.append(
                    f"the broker drops a message of the queue {queue} that comes back more than {limit} times, before "
                    f"max_deliveries sends it to the dead letters: the limit is higher of {', '.join(late)}"
                )
        rated = [name for name, each in policies.items() if each.rate is not None]
        if rated and not self._app.stores_results():
            found.append(
                f"rate limits hold for each worker process by itself, because no backend stores what all have started: "
                f"{', '.join(rated)}"
            )
        return found

    def run(self) -> bool:
        """Work until stopped. False if a body was still running when the grace was over.

        Raises ConfigurationError for what cannot work, such as a name that another worker has; BrokerUnavailable when
        the broker cannot be reached at start.
        """
        app = self._app
        hooks.worker_init.send(self.name)
        hooks.worker_process_init.send(self.name)
        opened = app.opened_backend()
        backend = opened if opened.stores else None
        self._control = ears = ControlListener(app, backend, self._held, self._terminate, failed=self.fail)
        self._consumer = consumer = self._opened_consumer(ears)
        if consumer is None:
            ears.close()
            return True
        self._settler = settler = Settler(
            app,
            consumer,
            backend,
            held=self._held,
            name=self.name,
            lease=self.lease,
            progressed=self._room.set,
            tick=self._tick,
            failed=self.fail,
        )
        self._runner = runner = Runner(
            app,
            name=self.name,
            threads=self.threads,
            async_concurrency=self.async_concurrency,
            target=self._target,
            settle_first=settler.settle_first,
            started=settler.started,
            ended=settler.end,
            failed=self.fail,
        )
        settler.start()
        runner.start()
        ears.start()
        receiver = _Receiver(
            self,
            app,
            consumer=consumer,
            backend=backend,
            settler=settler,
            runner=runner,
            policies=self._policies,
            heard=ears.heard,
        )
        hooks.worker_ready.send(self.name)
        self.ready.set()
        logger.info("%s is ready: queues %s, %d threads", self.name, ", ".join(self.queues), self.threads)
        try:
            receiver.run()
        finally:
            clean = self._wind_up(consumer, settler, runner, ears)
        if self._failure is not None:
            raise self._failure
        return clean

    def _opened_consumer(self, ears: ControlListener) -> Consumer | None:
        """The consumer, after its name was claimed: opening it takes over what a dead worker of that name held.

        None when this worker was stopped before the name was its own.
        """
        transport = self._app.opened_transport()
        try:
            ears.subscribe()
            if self._claims_name and not ears.claim_name(self.name, self._instance, self._stopping):
                return None
            return transport.consumer(
                self.queues, lease=self.lease, prefetch=self.prefetch, name=self.name, strict=self._options.strict
            )
        except BaseException:
            ears.close()
            raise

    def _terminate(self, job: Job) -> None:
        if self._runner is not None:
            self._runner.terminate(job)

    def fail(self, error: BaseException) -> None:
        """A thread of ours has met what it cannot handle. The worker ends with it; its deliveries go back."""
        if isinstance(error, TransportClosed):
            if not self._stopping.is_set():
                logger.error("%s ends: its app was closed in this process", self.name)
        else:
            logger.critical("%s cannot go on and ends: %r", self.name, error, exc_info=error)
        self._failure = self._failure or error
        self.stop(at_once=True)

    # Called by the receiver.

    def policy(self, task: Task[..., Any]) -> Policy:
        """A task's options with the settings merged in, and this worker's word on where bodies run."""
        pool = self._options.pool
        found = self._app.policy(task)
        return found if pool is None or task.options.pool is not UNSET else msgspec.structs.replace(found, pool=pool)

    def is_stopping(self) -> bool:
        """Whether no more is to be claimed."""
        return self._stopping.is_set()

    def wait_for_room(self, seconds: float) -> None:
        """Wait until something has ended, at most ``seconds``."""
        self._room.wait(seconds)
        self._room.clear()

    def wait_for_stop(self, seconds: float) -> None:
        """Wait until nothing is to be claimed any more, at most ``seconds``."""
        self._stopping.wait(seconds)

    def starts_within(self, seconds: float, settler: Settler) -> int:
        """How many bodies will start within so many seconds, if it goes on as it went."""
        now = time.monotonic()
        elapsed = now - self._rate_measured_at
        if elapsed >= _RATE_WINDOW_SECONDS:
            self._rate = 0.5 * self._rate + 0.5 * (settler.ended - self._rate_measured_count) / elapsed
            self._rate_measured_at = now
            self._rate_measured_count = settler.ended
        return int(self._rate * seconds)

    def is_burst(self) -> bool:
        """Whether to end when nothing is left."""
        return self._options.burst

    # Starting and stopping.

    def _check_queues(self) -> None:
        for queue in self.queues:
            if queue.endswith(DEAD_SUFFIX):
                raise ConfigurationError(
                    f"{queue} holds dead letters, which no worker runs; `ekiden dead retry` sends them back."
                )
            check_queue_name(queue)

    def _check_policies(self) -> None:
        """Refuse, at start, limits that cannot be kept here."""
        for name, policy in self._policies.items():
            check_limits(f"task {name}, with the settings", soft=policy.soft_time_limit, hard=policy.time_limit)
            task = self._app.tasks[name]
            if task.is_async or self._target is not None:
                continue
            if policy.pool == "process" or policy.time_limit is not None:
                raise ConfigurationError(
                    f"task {name} needs a process of its own (time_limit or pool='process'), and such a process has to "
                    "import the app: define the app at the top level of a module."
                )

    def _tick(self) -> None:
        """Called often by the settler: whether it is time to be replaced. Cheap."""
        now = time.monotonic()
        if now - self._ticked_at < _TICK_SECONDS and self.max_tasks is None:
            return
        self._ticked_at = now
        assert self._settler is not None
        too_many = self.max_tasks is not None and self._settler.ended >= self.max_tasks
        limit = self._options.max_memory_mb
        if not self._stopping.is_set() and (
            too_many or (limit is not None and self._memory_bytes() > limit * _BYTES_PER_MB)
        ):
            self.recycled = True
            logger.info("%s ends to be replaced: %s", self.name, "enough tasks" if too_many else "enough memory")
            self.stop()

    def _memory_bytes(self) -> int:
        """What this process and its body processes take together; what those share with it is counted once."""
        return resident_bytes(os.getpid()) + (0 if self._runner is None else self._runner.memory_bytes())

    def _stop_claiming(self, consumer: Consumer) -> None:
        try:
            consumer.stop()
        except TRANSPORT_IS_GONE:
            return  # it claims nothing any more
        except TransportError as error:
            logger.warning("%s could not tell the broker that it claims no more: %s", self.name, error)

    def _wind_up(self, consumer: Consumer, settler: Settler, runner: Runner, ears: ControlListener) -> bool:
        hooks.worker_shutting_down.send(self.name)
        self._stop_claiming(consumer)
        settler.give_back(runner.take_back())
        clean = self._wait_for_bodies(settler)
        clean = runner.close(0.0 if not clean or self._at_once.is_set() else _AT_ONCE_SECONDS) and clean
        settler.close()
        if self._failure is not None:
            self._give_back_unstarted(consumer)
        ears.close()  # until now this worker had its name
        consumer.close()
        hooks.worker_process_shutdown.send(self.name, pid=os.getpid(), exitcode=0 if clean else EXIT_UNCLEAN)
        hooks.worker_shutdown.send(self.name)
        logger.info("%s has stopped%s", self.name, "" if clean else "; tasks that were running come back")
        return clean

    def _give_back_unstarted(self, consumer: Consumer) -> None:
        """Do what the settler could not do any more: a failure of ours counts against nothing that had not started."""
        unstarted = [job.delivery for job in self._held.values() if job.given_back]
        if unstarted:
            with contextlib.suppress(TransportError, *TRANSPORT_IS_GONE):  # then they come back as if they had started
                consumer.release(unstarted)

    def _wait_for_bodies(self, settler: Settler) -> bool:
        deadline = time.monotonic() + self.grace
        while settler.is_waiting() and not self._at_once.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self.wait_for_room(min(left, _NO_ROOM_SECONDS))
        return not settler.is_waiting()


class _Receiver:
    """Claims, decides what may start, hands out. Everything in the receiving thread."""

    def __init__(
        self,
        worker: Worker,
        app: Ekiden,
        *,
        consumer: Consumer,
        backend: Backend | None,
        settler: Settler,
        runner: Runner,
        policies: dict[str, Policy],
        heard: HeardRevocations,
    ) -> None:
        self._worker = worker
        self._app = app
        self._consumer = consumer
        self._backend = backend
        self._heard = heard
        self._settler = settler
        self._runner = runner
        self._policies = policies
        self._rates = RateLimiter(backend)
        self._held = worker._held
        self._has_async = any(task.is_async for task in app.tasks.values())
        self._has_sync = not all(task.is_async for task in app.tasks.values())
        self._pause = 0.0
        self._left = math.inf if worker.max_tasks is None else worker.max_tasks
        self._ahead = _IN_HAND_SECONDS
        self._fewer_until = 0.0
        # Where the broker adds a second message of an id of the user's own, the fence lets one of them run.
        described = app.opened_transport().description
        self._fences_sendings = not described.names_duplicates
        self._suspects_alone = not described.connection_is_lease

    def run(self) -> None:
        """Until the worker is to stop, or, in a burst, nothing is left."""
        worker = self._worker
        wait = _BURST_RECEIVE_SECONDS if worker.is_burst() else _RECEIVE_SECONDS
        while not worker.is_stopping():
            worker.last_turn = time.monotonic()
            room = self._room()
            if room <= 0:
                worker.wait_for_room(_NO_ROOM_SECONDS)
                self._give_back_what_waits_too_long()
                continue
            began = time.monotonic()
            try:
                deliveries = self._consumer.receive(room, wait)
                if len(deliveries) == room:
                    self._ahead = _ahead_of(time.monotonic() - began)
                if not deliveries and worker.is_burst() and self._nothing_left():
                    return
            except TRANSPORT_IS_GONE as error:
                worker.fail(error)
                return
            except TransportError as error:
                self._pause_after(error)
                continue
            self._left -= len(deliveries)
            trouble = self._take(deliveries)
            if trouble is None:
                self._pause = 0.0
            else:
                self._pause_after(trouble)

    def _room(self) -> int:
        if self._settler.in_trouble:
            return 0
        room = int(min(self._room_for_bodies(), self._worker.prefetch - len(self._held), self._left))
        if self._fewer_until and room > 1:
            if time.monotonic() < self._fewer_until:
                return min(room, max(1, self._runner.processes_ready()))
            self._fewer_until = 0.0
        return room

    def _room_for_bodies(self) -> int:
        """How many more would start shortly. Whether in threads or in the loop shows only when they are here."""
        worker = self._worker
        shortly = worker.starts_within(self._ahead, self._settler)
        in_loop = self._runner.in_loop()
        for_threads = worker.threads + shortly - (self._settler.unfinished() - in_loop)
        if not self._has_async:
            return for_threads
        for_loop = worker.async_concurrency + shortly - in_loop
        if not self._has_sync:
            return for_loop
        return min(for_loop, for_threads if for_threads > 0 else worker.threads)

    def _pause_after(self, error: TransportError | BackendError) -> None:
        self._pause = min(self._pause * 2 or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        logger.warning("nothing can be received; tried again in %.1f s: %s", self._pause, error)
        self._worker.wait_for_stop(self._pause)

    def _nothing_left(self) -> bool:
        if self._held:
            return False
        transport = self._app.opened_transport()
        return not any(transport.depth(queue).ready for queue in self._worker.queues)

    def _give_back_what_waits_too_long(self) -> None:
        """Tasks have become slow: somebody else may start sooner what has waited here for long."""
        oldest = time.monotonic() - _WAITED_TOO_LONG_SECONDS
        jobs = self._runner.take_back()
        young = [job for job in jobs if job.taken > oldest]
        self._give_back([job for job in jobs if job.taken <= oldest])
        self._runner.submit(young)

    def _give_back(self, jobs: list[Job], delay: float = 0.0) -> threading.Event:
        self._left += len(jobs)
        for job in jobs:
            self._runner.unreserve(job)
        return self._settler.give_back(jobs, delay)

    # One batch of deliveries.

    def _take(self, deliveries: Sequence[Delivery]) -> BackendError | None:
        """Start or end each of ``deliveries``; or say why those that should start were given back."""
        now, taken = time.time(), time.monotonic()
        jobs = []
        for delivery in deliveries:
            try:
                job = self._job(delivery, taken)
            except Exception as error:  # what a message holds is its own trouble, whatever it is
                logger.exception("message %s cannot be read", delivery.message.id)
                job = Job(delivery, taken=taken, outcome=Unprocessable(failure_record(error, None)))
            self._held[id(job)] = job
            jobs.append(job)
        exact = [
            job
            for job in jobs
            if job.work is not None
            # From the second hand-out on; from the first, where that is the only one.
            and (job.delivery.attempt > 1 or job.work.policy.max_deliveries == 1)
            and job.delivery.attempt <= job.work.policy.max_deliveries
        ]
        if exact and not self._worker.is_burst():
            jobs = self._without_held_back(jobs, exact)
        undecided = [(job, job.call) for job in jobs if job.outcome is None and job.call is not None]
        trouble = None
        try:
            if self._backend is not None:
                self._ask_fence(self._backend, undecided, now)
            self._refuse(undecided, now)
            self._limit_rates(jobs, now)
        except BackendError as error:
            trouble = error
            self._give_back([job for job in jobs if job.outcome is None])
            jobs = [job for job in jobs if job.outcome is not None]
        starting = []
        for job in jobs:
            if job.outcome is None:
                starting.append(job)
                if hooks.task_received.receivers and job.work is not None:
                    hooks.task_received.send(job.work.task, request=job.work.request)
            else:
                self._runner.unreserve(job)
                self._settler.end(job)
        self._runner.submit(starting)
        return trouble

    def _without_held_back(self, jobs: list[Job], exact: list[Job]) -> list[Job]:
        """``jobs`` without those of ``exact``, whose hand-outs are to be starts, that cannot start at once.

        These are given back, with their attempt, before any of the others starts and may kill this worker. So from
        its second hand-out on, a message that is in a dead worker's hand had been started by it.

        Two deaths make a suspect, and of suspects one is in hand at a time: the one that kills this worker again does
        not take the same others with it each time, until they are buried as well. Not where the broker pushes: what is
        held back there has been handed out, and would be charged with the next death without having run.
        """
        busy = self._settler.unfinished() - self._runner.in_loop() - len(jobs)
        room = max(0, self._worker.threads - busy) + self._worker.starts_within(_STARTS_AT_ONCE_SECONDS, self._settler)
        suspects = sum(_is_suspect(job) for job in list(self._held.values())) - sum(map(_is_suspect, jobs))
        held_back = []
        for job in exact:
            is_barred = self._suspects_alone and suspects > 0 and _is_suspect(job)
            if room > 0 and not is_barred and self._runner.reserve(job):
                room -= 1
                suspects += _is_suspect(job)
            else:
                held_back.append(job)
        if held_back:
            self._fewer_until = time.monotonic() + _FEWER_CLAIMED_SECONDS
            self._give_back(held_back, _HELD_BACK_SECONDS).wait(_GIVEN_BACK_WITHIN_SECONDS)
        return [job for job in jobs if not job.given_back]

    def _job(self, delivery: Delivery, taken: float) -> Job:
        """Read a delivery; ``outcome`` is set for what cannot be read. ``work`` is None for an unknown task's."""
        message = delivery.message
        try:
            call = decode_call(message.body, message.headers)
        except NewerFormat as error:
            return Job(delivery, taken=taken, outcome=self._of_newer_format(delivery, error))
        except MessageError as error:
            return Job(delivery, taken=taken, outcome=Unprocessable(failure_record(error, None)))
        if call.sending is not None and self._fences_sendings:
            call = msgspec.structs.replace(call, fenced=True)
        task = self._app.find_task(call.task)
        if task is None:
            return Job(delivery, taken=taken, call=call)
        policy = self._policies.get(call.task)
        if policy is None:
            policy = self._policies[call.task] = self._worker.policy(task)
        request = Request(
            call,
            message.queue,
            message.priority,
            delivery.attempt,
            message.headers,
            self._worker.name,
            limits=(call.time_limit or policy.time_limit, call.soft_time_limit or policy.soft_time_limit),
        )
        return Job(delivery, taken=taken, call=call, work=Work(call, task, policy, request))

    def _of_newer_format(self, delivery: Delivery, error: NewerFormat) -> Outcome:
        message = delivery.message
        since = max(message_time(message.id) or 0.0, message.due or 0.0)
        if abs(time.time() - since) < self._app.conf.unknown_task_grace:
            return Postponed(_UNKNOWN_TASK_DELAY_SECONDS, str(error))
        return Unprocessable(failure_record(error, None))

    def _may_become_known(self, call: Call, now: float) -> bool:
        """Whether the task of a call may be known soon: a deploy is rolling since the call could first have run.

        What claims to come from the far future would wait for ever.
        """
        return abs(now - _runnable_since(call)) < self._app.conf.unknown_task_grace

    def _of_unknown_task(self, call: Call, now: float) -> Outcome:
        known = ", ".join(sorted(self._app.tasks)[:20]) or "none"
        text = f"{call.task} is not a task of this worker, which knows {known}; import its module, or add it to include"
        grace = self._app.conf.unknown_task_grace
        if self._may_become_known(call, now):
            left = grace - (now - _runnable_since(call))
            logger.warning("%s[%s] waits, for %.0f s at most: %s", call.task, call.id, left, text)
            return Postponed(min(_UNKNOWN_TASK_DELAY_SECONDS, max(0.1, grace / 10)), text)
        return Unprocessable(failure_record(NotRegistered(with_last_error(text, call)), None))

    def _ask_fence(self, backend: Backend, jobs: list[tuple[Job, Call]], now: float) -> None:
        """Of what may be a second copy, whether it has begun or ended elsewhere. Asked before all else.

        Whatever else is found of a call that has ended, such as that it has expired since, comes too late.
        """
        fenced = [
            (job, call)
            for job, call in jobs
            if (call.fenced or job.delivery.attempt > 1)
            and (job.work is not None or not self._may_become_known(call, now))
        ]
        if not fenced:
            return
        expires = self._app.conf.result_expires
        starts = [Start(call.id, call.retries, _copy_of(job.delivery.message, call), expires) for job, call in fenced]
        for (job, _), answer in zip(fenced, each_apart(backend.begin, starts), strict=True):
            if isinstance(answer, BackendRefused):
                job.outcome = Unprocessable(failure_record(answer, None))
            elif answer.outcome is BeginOutcome.SECOND_COPY:
                job.outcome = SecondCopy()
            elif answer.outcome is BeginOutcome.ENDED and answer.result is not None:
                job.outcome = AlreadyEnded(answer.result.state, answer.result.body)

    def _refuse(self, jobs: list[tuple[Job, Call]], now: float) -> None:
        """End what is not to run: what has expired, was revoked, is of an unknown task, was handed out too often."""
        for job, call in jobs:
            if call.expires is not None and call.expires <= now and job.outcome is None:
                job.outcome = Expired()
                if job.work is not None:
                    signal_revoked(job.work, expired=True)
        asked = [(job, call) for job, call in jobs if job.outcome is None]
        if not asked:
            return
        ids = [call.id for _, call in asked]
        revoked = {} if self._backend is None else revocations(self._backend, ids)
        if self._heard.by_id:
            revoked |= self._heard.of(ids, time.time())
        for job, call in asked:
            work = job.work
            if call.id in revoked:
                job.outcome = Revoked()
                if work is not None:
                    signal_revoked(work)
            elif work is None:
                job.outcome = self._of_unknown_task(call, now)
            elif job.delivery.attempt > work.policy.max_deliveries:
                often = work.policy.max_deliveries
                text = (
                    f"handed out {often} times, and each time its worker died before it ended, or it gave itself back"
                )
                job.outcome = Unprocessable(failure_record(WorkerLostError(with_last_error(text, call)), None))

    def _limit_rates(self, jobs: list[Job], now: float) -> None:
        limited: dict[str, list[Job]] = {}
        for job in jobs:
            if job.outcome is None and job.work is not None and job.work.policy.rate is not None:
                limited.setdefault(job.work.call.task, []).append(job)
        for name, group in limited.items():
            rate = self._policies[name].rate
            assert rate is not None
            for job, wait in zip(group, self._rates.take(name, rate, len(group), now), strict=True):
                if wait > 0:
                    # What waits about equally long is given back in one act. A little early costs nothing: starts are
                    # granted ahead by more than this.
                    job.outcome = Postponed(max(wait - wait % _RATE_STEP_SECONDS, _RATE_STEP_SECONDS), "its rate limit")


def _copy_of(message: Message, call: Call) -> str:
    """What the fence knows a message by: its id, and which sending it is where several may have that id."""
    return message.id if call.sending is None else f"{message.id} {call.sending}"


def _runnable_since(call: Call) -> float:
    """When a call could first have run (seconds since the epoch)."""
    return call.sent if call.eta is None else max(call.sent, call.eta)


def _is_suspect(job: Job) -> bool:
    """Whether two workers, or body processes, have died with it."""
    return job.delivery.attempt >= _ALONE_FROM_ATTEMPT


def _ahead_of(claim_seconds: float) -> float:
    """For how many seconds of work there should be enough in hand, if a claim takes so long.

    While a distant broker answers one claim, the bodies work on what the last ones brought.
    """
    return max(_IN_HAND_SECONDS, min(_CLAIMS_IN_HAND * claim_seconds, _WAITED_TOO_LONG_SECONDS))


def message_time(message_id: str) -> float | None:
    """When a message was made (seconds since the epoch), as far as its id tells."""
    try:
        return int(message_id[:12], 16) / 1000
    except ValueError:
        return None


def _stalled_transport(transport: Transport) -> str | None:
    try:
        return transport.stalled()
    except Exception as error:  # noqa: BLE001 - a plugin's: what it cannot say is not well
        return f"the transport cannot say whether its threads work: {error!r}"
