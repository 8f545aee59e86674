"""Brings what has ended to the backend and the broker, in batches, and keeps the leases of all that is held.

Always in this order: the result is stored, then the delivery is settled together with what follows from it. What cannot
be stored or settled now is kept, renewed and tried again; meanwhile ``in_trouble`` tells the receiver to claim no more.
A reply to who waits for one goes with the settling; where many are due at once to the same caller they go before it,
in one message.
One thread does all of it, so the consumer is settled, released and extended by one thread only.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue

import msgspec

from ekiden.app import Ekiden
from ekiden.codec import FailureRecord, OutcomeRecord, encode_outcome
from ekiden.errors import (
    TRANSPORT_IS_GONE,
    BackendError,
    BackendRefused,
    BrokerRefused,
    EkidenError,
    MisuseError,
    TransportError,
)
from ekiden.execution import Context, Verdict, dead_letter, keeps_result, verdict, wanted_reply_queue
from ekiden.failures import failure_record, type_name
from ekiden.job import Job
from ekiden.loggers import safe_logger
from ekiden.message import Ending, Settled, SettleOutcome, derived_id, new_id
from ekiden.options import Policy, publishing
from ekiden.outcomes import Failed, Postponed, Rejected, Retried, SecondCopy, Succeeded, Unprocessable
from ekiden.publisher import refusal
from ekiden.replies import REPLY_TO_HEADER, reply_message
from ekiden.results import Backend, StoredResult, each_apart
from ekiden.safe_text import block, text_of
from ekiden.states import State
from ekiden.transport import Consumer

logger = safe_logger("ekiden.worker")

_AT_MOST = 1000
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_RENEWALS_PER_LEASE = 3
_CLOSE_SECONDS = 2.0
_REFUSED_DELAY_SECONDS = 60.0
_FEW_REPLIES = 3
_REPLIES_AT_ONCE = 500
_SMALL_REPLY_BYTES = 2000


class _First:
    """A job that is to be settled before its body starts; ``done`` is set when ``may_run`` is known.

    ``asked``: the broker was asked to settle it, and perhaps has, without an answer that arrived.
    """

    __slots__ = ("asked", "done", "job", "may_run")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.asked = False
        self.done = threading.Event()
        self.may_run = False


class _Started(msgspec.Struct, frozen=True):
    """A body has started, and its task wants that to be stored."""

    job: Job


class _GiveBack(msgspec.Struct, frozen=True):
    """Jobs that were never started and are not to be. ``done`` is set when they are given back."""

    jobs: list[Job]
    delay: float
    done: threading.Event


class _Unsettled:
    """An ended job on its way: first its result is stored, then its delivery is ended.

    ``replied``: the reply it owes, if any, has been sent, or is among ``publish``. ``refusals`` counts how often the
    broker did not take what follows, ``unstorable`` says that the store did not take its result: next is less.
    """

    __slots__ = ("job", "publish", "refusals", "replied", "stored", "unstorable", "verdict")

    def __init__(self, job: Job, found: Verdict, *, refusals: int = 0, unstorable: bool = False) -> None:
        self.job = job
        self.refusals = refusals
        self.unstorable = unstorable
        self.verdict = found
        self.stored = found.result is None
        self.replied = found.reply is None
        self.publish = found.publish


class Settler:
    """Owned by a Worker; ``held`` is the worker's, and ends here: what is settled is taken out of it."""

    def __init__(
        self,
        app: Ekiden,
        consumer: Consumer,
        backend: Backend | None,
        *,
        held: dict[int, Job],
        name: str,
        lease: float,
        progressed: Callable[[], None],
        tick: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._app = app
        self._consumer = consumer
        self._backend = backend
        self._held = held
        self._name = name
        self._renew_every = lease / _RENEWALS_PER_LEASE
        self._progressed = progressed
        self._tick = tick
        self._failed = failed
        self._queue: SimpleQueue[Job | _First | _Started | _GiveBack | None] = SimpleQueue()
        self._unsettled: list[_Unsettled] = []
        self._giving_back: list[_GiveBack] = []
        self._firsts: list[_First] = []
        self._starts: list[_Started] = []
        self._closing = threading.Event()
        self._pause = 0.0
        self._try_at = 0.0
        self._free_at = time.monotonic()
        self._renew_at = self._free_at + self._renew_every
        self._renewed_at = self.last_turn = self._free_at
        self._renewal_logged_at: float | None = None
        self.in_trouble = False
        self.ended = 0
        self._thread = threading.Thread(target=self._run, name="ekiden-settler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    # Called by any thread.

    def end(self, job: Job) -> None:
        """``job.outcome`` is known: bring it home."""
        self._queue.put(job)

    def started(self, job: Job) -> None:
        """Store that a body has started."""
        self._queue.put(_Started(job))

    def give_back(self, jobs: list[Job], delay: float = 0.0) -> threading.Event:
        """Release jobs that were never started; the event says that it is done."""
        giving_back = _GiveBack(jobs, delay, threading.Event())
        for job in jobs:
            job.given_back = True
        if jobs:
            self._queue.put(giving_back)
        return giving_back.done

    def settle_first(self, job: Job) -> bool:
        """Settle a job before its body, and wait until that is confirmed. False: it must not run."""
        first = _First(job)
        self._queue.put(first)
        first.done.wait()
        return first.may_run

    def unfinished(self) -> int:
        """About how many jobs in hand have not ended yet; what else is on its way to the settler makes it fewer."""
        return len(self._held) - self._queue.qsize() - len(self._unsettled)

    def is_waiting(self) -> bool:
        """Whether a job in hand has not ended yet, save those that are given back."""
        return any(job.outcome is None and not job.given_back for job in list(self._held.values()))

    def close(self) -> None:
        """Bring home what has ended, trying for a short time if there is trouble, and end the thread."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join()

    # The thread.

    def _run(self) -> None:
        try:
            self._bring_home()
        except BaseException as error:  # noqa: BLE001 - a bug of ours: the worker must end, not go on without settling
            self._failed(error)
            self._refuse_firsts()

    def _bring_home(self) -> None:
        give_up_at: float | None = None
        while True:
            self._receive()
            now = time.monotonic()
            if now >= self._renew_at:
                # Before anything is stored: after a long standstill some of it may be another worker's.
                self._renew(now)
            if now >= self._try_at and self._has_work():
                self._work()
            self._free_at = self.last_turn = time.monotonic()
            self._tick()
            if self._closing.is_set():
                give_up_at = give_up_at or now + _CLOSE_SECONDS
                if self._queue.empty() and (not self._has_work() or now >= give_up_at):
                    self._refuse_firsts()
                    return

    def _receive(self) -> None:
        """Wait for something to do, and take along everything that is there."""
        now = time.monotonic()
        until = min(self._renew_at, self._try_at) if self._has_work() else self._renew_at
        longest = 0.05 if self._closing.is_set() else 1.0
        try:
            item = self._queue.get(timeout=min(max(0.0, until - now), longest))
        except Empty:
            return
        context = self._context()
        ended = 0
        for _ in range(_AT_MOST):
            if isinstance(item, Job):
                ended += 1
                self._judge(item, context)
            elif isinstance(item, _First):
                self._firsts.append(item)
            elif isinstance(item, _Started):
                self._starts.append(item)
            elif isinstance(item, _GiveBack):
                self._giving_back.append(item)
            try:
                item = self._queue.get_nowait()
            except Empty:
                break
        else:
            self._queue.put(item)
        self.ended += ended
        self._progressed()

    def _context(self) -> Context:
        conf = self._app.conf
        return Context(time.time(), self._name, self._app.route, conf.result_expires, self._backend is not None)

    def _judge(self, job: Job, context: Context) -> None:
        assert job.outcome is not None
        policy = None if job.work is None else job.work.policy
        try:
            found = verdict(job.delivery, job.call, policy, job.outcome, context)
        except Exception as error:  # noqa: BLE001 - whatever a call holds is its own trouble
            found = self._unsendable(job, error, context)
        if job.settled and found.release is not None:
            # It was settled first, so there is nothing to give back. Its id is free: it is the same message again.
            again = msgspec.structs.replace(job.delivery.message, due=context.now + found.release)
            found = Verdict(publish=(again,))
        self._unsettled.append(_Unsettled(job, found))
        if not isinstance(job.outcome, Succeeded):
            _log_outcome(job)
        elif logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s succeeded in %.3f s", job, job.outcome.runtime or 0.0)

    def _unsendable(self, job: Job, error: Exception, context: Context) -> Verdict:
        """The verdict on a call from which something follows that can never be sent: a queue name that cannot be.

        The call itself has failed. Raises nothing, whatever it holds.
        """
        if not isinstance(error, EkidenError):
            logger.error("%s: what follows from it cannot be written", job, exc_info=error)
        unlinked = None if job.call is None else msgspec.structs.replace(job.call, on_success=(), on_error=())
        job.outcome = Unprocessable(failure_record(error, None))
        try:
            return verdict(job.delivery, unlinked, _policy_of(job), job.outcome, context)
        except Exception:
            logger.exception("%s cannot be buried, and is set aside for %d s", job, _REFUSED_DELAY_SECONDS)
            return Verdict(release=_REFUSED_DELAY_SECONDS)

    def _has_work(self) -> bool:
        return bool(self._unsettled or self._giving_back or self._firsts or self._starts)

    def _work(self) -> None:
        try:
            # Each of these is a call of its own, which a broker that is silent may hold up for some time.
            self._store()
            self.last_turn = time.monotonic()
            if self._firsts:
                self._settle_firsts()
                self.last_turn = time.monotonic()
            self._settle()
            self.last_turn = time.monotonic()
            if self._unsettled or self._giving_back:
                self._release()
        except TRANSPORT_IS_GONE:
            raise
        except (BackendError, TransportError) as error:
            self._trouble(error)
        else:
            if self._pause:
                logger.warning("results are stored and messages settled again")
            self._pause = 0.0
            self._try_at = 0.0
            self.in_trouble = False
            self._progressed()

    def _trouble(self, error: EkidenError) -> None:
        self.in_trouble = True
        self._pause = min(self._pause * 2 or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        self._try_at = time.monotonic() + self._pause
        logger.warning(
            "%d ended tasks are kept and tried again in %.1f s: %s", len(self._unsettled), self._pause, error
        )

    def _store(self) -> None:
        started = [(each.job, self._started_result(each.job)) for each in self._starts if _keeps_result(each.job)]
        results = [result for _, result in started]
        storing = [each for each in self._unsettled if not each.stored and not each.job.lost]
        results += [each.verdict.result for each in storing if each.verdict.result is not None]
        refused = {}
        if results and self._backend is not None:
            try:
                self._backend.put(results)
            except BackendRefused:
                refused = self._store_apart(self._backend, results)
        if started:
            self._tell_started(started)
        self._starts.clear()
        for each in storing:
            each.stored = True
        if refused:
            for each in storing:
                if each.verdict.result is not None and id(each.verdict.result) in refused:
                    self._store_less_of(each, refused[id(each.verdict.result)])
            self._store()
            return
        replying = [each for each in self._unsettled if not each.replied and not each.job.lost]
        if replying:
            self._reply(replying)

    def _store_apart(self, backend: Backend, results: list[StoredResult]) -> dict[int, BackendRefused]:
        """Store what the store takes, and return its refusals by the ``id()`` of what it will never take."""
        answers = zip(results, each_apart(backend.put, results), strict=True)
        refused = {id(result): answer for result, answer in answers if isinstance(answer, BackendRefused)}
        for result in results:
            if id(result) in refused and result.state == State.STARTED:
                logger.error("the store does not take that %s has started: %s", result.task_id, refused[id(result)])
        return refused

    def _store_less_of(self, each: _Unsettled, refusal_: BackendRefused) -> None:
        """The store will never take this result: the call has failed. If it takes not even that, nothing is stored."""
        if each.unstorable:
            logger.error("%s: nothing can be stored of how it ended: %s", each.job, refusal_)
            each.verdict = msgspec.structs.replace(each.verdict, result=None)
            return
        failure = failure_record(MisuseError(f"its result cannot be stored: {text_of(refusal_)}"), None)
        each.job.outcome = Unprocessable(failure) if each.job.work is None else Failed(failure)
        _log_outcome(each.job)
        context = self._context()
        try:
            found = verdict(each.job.delivery, each.job.call, _policy_of(each.job), each.job.outcome, context)
        except Exception as error:  # noqa: BLE001 - as above
            found = self._unsendable(each.job, error, context)
        self._unsettled[self._unsettled.index(each)] = _Unsettled(each.job, found, unstorable=True)

    def _started_result(self, job: Job) -> StoredResult:
        assert job.call is not None
        call = job.call
        record = OutcomeRecord(
            task=call.task,
            worker=self._name,
            retries=call.retries,
            queue=job.delivery.message.queue,
            parent=call.parent,
            root=call.root,
        )
        expires = self._app.conf.result_expires
        return StoredResult(call.id, State.STARTED, call.retries, encode_outcome(record), expires)

    def _tell_started(self, started: list[tuple[Job, StoredResult]]) -> None:
        """Tell those who wait for replies that bodies have started."""
        by_queue: dict[str, list[StoredResult]] = {}
        for job, result in started:
            queue = _reply_queue(job)
            if queue is not None:
                by_queue.setdefault(queue, []).append(result)
        if by_queue and (refused := self._publish_replies(by_queue)):
            logger.error("the broker takes no reply that says STARTED: %s", refused)

    def _reply(self, replying: list[_Unsettled]) -> None:
        """Send the many replies to one caller together; have the few, and the large ones, go with the settling."""
        by_queue: dict[str, list[_Unsettled]] = {}
        for each in replying:
            reply, queue = each.verdict.reply, each.verdict.reply_to
            if reply is not None and queue is not None and len(reply.body) <= _SMALL_REPLY_BYTES:
                by_queue.setdefault(queue, []).append(each)
        many = {queue: group for queue, group in by_queue.items() if len(group) > _FEW_REPLIES}
        together = {
            queue: [each.verdict.reply for each in group if each.verdict.reply] for queue, group in many.items()
        }
        if together and not self._publish_replies(together):
            for group in many.values():
                for each in group:
                    each.replied = True
        for each in replying:
            reply, queue = each.verdict.reply, each.verdict.reply_to
            if not each.replied and reply is not None and queue is not None:
                message_id = derived_id(each.job.delivery.message.id, "reply")
                each.publish = (*each.publish, reply_message((reply,), queue, message_id))
                each.replied = True

    def _publish_replies(self, by_queue: dict[str, list[StoredResult]]) -> BrokerRefused | None:
        """Publish replies, each caller's together; or say why the broker refuses one. Raises other TransportErrors."""
        messages = [
            reply_message(group[start : start + _REPLIES_AT_ONCE], queue, new_id())
            for queue, group in by_queue.items()
            for start in range(0, len(group), _REPLIES_AT_ONCE)
        ]
        how = publishing(self._app.conf, retry=False)  # the settler itself tries again
        error = refusal(messages, self._app.publisher.publish(messages, how))
        if error is not None and not isinstance(error, BrokerRefused):
            raise error
        return error

    def _settle_firsts(self) -> None:
        answers = self._consumer.settle([Ending(each.job.delivery) for each in self._firsts])
        kept = []
        for first, answer in zip(self._firsts, answers, strict=True):
            if answer.outcome is SettleOutcome.FAILED:
                first.asked = True
                kept.append(first)
                continue
            first.job.settled = True
            first.may_run = answer.outcome is SettleOutcome.SETTLED
            if not first.may_run:
                self._drop_lost(first.job)
            first.done.set()
        self._firsts = kept
        _raise_failed(answers)

    def _settle(self) -> None:
        """End the deliveries of what is stored; publish what follows from those that were settled first."""
        if any(each.job.settled for each in self._unsettled):
            self._publish_for_settled()
        settling = [each for each in self._unsettled if each.verdict.release is None and not each.job.settled]
        if not settling:
            return
        answers = self._consumer.settle([Ending(each.job.delivery, each.publish) for each in settling])
        ended = set()
        refused = False
        trouble: TransportError | None = None
        for each, answer in zip(settling, answers, strict=True):
            if answer.outcome is SettleOutcome.FAILED:
                if isinstance(answer.error, TransportError) and not isinstance(answer.error, BrokerRefused):
                    trouble = answer.error
                else:
                    # Refused; or an error that says nothing of the broker, so it is about what was to be published.
                    self._publish_less_of(each, answer.error)
                    refused = True
                continue
            ended.add(id(each))
            if answer.outcome is SettleOutcome.LOST:
                self._drop_lost(each.job)
            else:
                self._held.pop(id(each.job), None)
        self._unsettled = [each for each in self._unsettled if id(each) not in ended]
        if trouble is not None:
            raise trouble
        if refused:
            self._store()
            self._settle()

    def _publish_for_settled(self) -> None:
        for each in [each for each in self._unsettled if each.job.settled]:
            if each.publish:
                how = publishing(self._app.conf, retry=False)  # the settler itself tries again
                answers = self._app.publisher.publish(each.publish, how)
                error = refusal(each.publish, answers)
                if isinstance(error, BrokerRefused):
                    self._publish_less_of(each, error)
                    continue
                if error is not None:
                    raise error
            self._unsettled.remove(each)
            self._held.pop(id(each.job), None)

    def _publish_less_of(self, each: _Unsettled, error: Exception | None) -> None:
        """The broker will never take what follows: a copy goes to the dead letters instead, if it takes that.

        Else a copy without the message's own headers; and what it does not take even so, it is to keep for a while.
        """
        job = each.job
        if each.refusals == 0:
            logger.error("%s goes to the dead letters: the broker does not take what follows: %s", job, error)
            # A success that is stored already stays one; a next try that never comes is a failure.
            trouble = error or BrokerRefused("the broker does not take what follows")
            instead = _Unsettled(job, self._unsendable(job, trouble, self._context()), refusals=1)
            self._unsettled[self._unsettled.index(each)] = instead
        elif each.refusals == 1:
            logger.error("%s: the broker takes no copy of it for the dead letters: %s", job, error)
            failure = failure_record(error or BrokerRefused("the broker does not take its dead letter"), None)
            each.refusals = 2
            each.publish = (dead_letter(job.delivery, failure, time.time(), bare=True),)
        else:
            logger.error("%s cannot be buried, and is set aside for %d s: %s", job, _REFUSED_DELAY_SECONDS, error)
            each.verdict = Verdict(release=None if job.settled else _REFUSED_DELAY_SECONDS)
            each.publish = ()

    def _release(self) -> None:
        for giving_back in list(self._giving_back):
            self._consumer.release([job.delivery for job in giving_back.jobs], giving_back.delay)
            for job in giving_back.jobs:
                self._held.pop(id(job), None)
            self._giving_back.remove(giving_back)
            giving_back.done.set()
        together: dict[tuple[float, bool], list[_Unsettled]] = {}
        for each in self._unsettled:
            if each.verdict.release is not None:
                together.setdefault((each.verdict.release, each.verdict.keep_attempt), []).append(each)
        for (delay, keep_attempt), group in together.items():
            deliveries = [each.job.delivery for each in group]
            if keep_attempt:
                self._consumer.release(deliveries, delay, keep_attempt=True)
            else:
                self._consumer.release(deliveries, delay)
            for each in group:
                self._unsettled.remove(each)
                self._held.pop(id(each.job), None)

    def _drop_lost(self, job: Job) -> None:
        job.lost = True
        self._held.pop(id(job), None)
        logger.warning("%s was lost: its lease ended and another worker has it; what it did here is not counted", job)

    def _refuse_firsts(self) -> None:
        for first in self._firsts:
            first.done.set()
        self._firsts.clear()

    def _renew(self, now: float) -> None:
        late = now - max(self._renew_at, self._free_at)
        if late > self._renew_every:
            self._warn_of_late_renewal(late)
        self._renew_at = now + self._renew_every
        # What may be settled already cannot be renewed, and would be taken for lost: settling it again tells.
        asked = {id(first.job) for first in self._firsts if first.asked}
        jobs = [job for job in list(self._held.values()) if not job.settled and id(job) not in asked]
        if not jobs:
            self._renewed_at, self._renewal_logged_at = now, None
            return
        failure: Exception | None = None
        for job, answer in zip(jobs, self._extend(jobs), strict=True):
            if answer.outcome is SettleOutcome.LOST and id(job) in self._held:
                self._drop_lost(job)
            elif answer.outcome is SettleOutcome.FAILED:
                failure = failure or answer.error or TransportError("the broker did not say why")
        self._unsettled = [each for each in self._unsettled if not each.job.lost]
        self._note_renewal(now, len(jobs), failure)

    def _extend(self, jobs: list[Job]) -> list[Settled]:
        try:
            return self._consumer.extend([job.delivery for job in jobs])
        except TRANSPORT_IS_GONE:
            raise
        except TransportError as error:
            return [Settled(SettleOutcome.FAILED, error)] * len(jobs)

    def _note_renewal(self, now: float, count: int, failure: Exception | None) -> None:
        """Have what failed tried again soon, and log it: at first, and every few seconds while it lasts."""
        if failure is None:
            if self._renewal_logged_at is not None:
                logger.warning("leases are renewed again")
            self._renewed_at = now
            self._renewal_logged_at = None
            return
        if isinstance(failure, TRANSPORT_IS_GONE):
            raise failure
        self._renew_at = now + min(1.0, self._renew_every / _RENEWALS_PER_LEASE)
        if self._renewal_logged_at is None or now - self._renewal_logged_at >= _LONGEST_PAUSE_SECONDS:
            self._renewal_logged_at = now
            left = self._renew_every * _RENEWALS_PER_LEASE - (now - self._renewed_at)
            logger.warning(
                "the leases of up to %d deliveries were not renewed, %s; tried again in %.1f s: %s",
                count,
                f"and end in {left:.0f} s unless they are" if left > 0 else "and may have ended: others may run them",
                self._renew_at - now,
                failure,
            )

    def _warn_of_late_renewal(self, late: float) -> None:
        # One that has just ended is still held: it may be what held the interpreter until now.
        began = [job for job in list(self._held.values()) if job.started is not None and job.started < self._renew_at]
        names = ", ".join(f"{job} (for {time.monotonic() - (job.started or 0):.0f} s)" for job in began[:5])
        logger.warning(
            "leases were renewed %.1f s late: this process was stopped, or the interpreter was held by one of %s; "
            "declare it with pool='process'",
            late,
            names or "no running task",
        )


def _policy_of(job: Job) -> Policy | None:
    return None if job.work is None else job.work.policy


def _keeps_result(job: Job) -> bool:
    return job.call is not None and keeps_result(job.call, _policy_of(job))


def _reply_queue(job: Job) -> str | None:
    if job.call is None or REPLY_TO_HEADER not in job.delivery.message.headers:
        return None
    return wanted_reply_queue(job.delivery.message, job.call, _policy_of(job))


def _raise_failed(answers: Iterable[Settled]) -> None:
    for answer in answers:
        if answer.outcome is SettleOutcome.FAILED:
            if isinstance(answer.error, TransportError):
                raise answer.error
            raise TransportError(f"the broker did not take what follows: {answer.error}")


def _log_outcome(job: Job) -> None:
    match job.outcome:
        case Retried(failure=failure):
            reason = f": {failure.type}: {failure.message}" if failure is not None else ""
            logger.info("%s will be tried again%s", job, reason)
        case Failed(failure=failure):
            expected = job.work is not None and _is_expected(failure.type, job.work.policy.throws)
            if expected:
                logger.info("%s failed as declared: %s: %s", job, failure.type, failure.message)
            else:
                _log_failure(job, failure)
        case Unprocessable(failure=failure):
            logger.warning("%s goes to the dead letters: %s", job, failure.message)
        case Rejected(reason=reason, requeue=requeue):
            logger.warning("%s was rejected%s: %s", job, ", to be run again" if requeue else "", reason)
        case SecondCopy():
            logger.warning("%s is a second copy of a step that has begun elsewhere; it is settled and not run", job)
        case Postponed(reason=reason, keep_attempt=True):
            logger.warning("%s is handed out again, attempt %d of it counts: %s", job, job.delivery.attempt, reason)
        case Postponed(reason=reason, delay=delay):
            logger.debug("%s is given back for %.1f s: %s", job, delay, reason)
        case other:
            logger.info("%s: %s", job, type(other).__name__)


def _log_failure(job: Job, failure: FailureRecord) -> None:
    if failure.traceback:
        logger.error("%s failed: %s: %s\n%s", job, failure.type, failure.message, block(failure.traceback))
    else:
        logger.error("%s failed: %s: %s", job, failure.type, failure.message)


def _is_expected(name: str, kinds: tuple[type[BaseException], ...]) -> bool:
    return name in map(type_name, kinds)
