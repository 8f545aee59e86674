"""Many callers' messages in few publishes.

Whoever comes first takes everybody's waiting messages along in one ``Transport.publish`` (group commit); the others
wait for its answer, each with its own deadline, and each gets only its own error. If the caller that publishes is
interrupted, the next one waiting takes over. No thread is needed for callers that may block; for ``async`` callers
one thread, started at the first one, publishes and resolves their futures.

State: ``_waiting`` (guarded by ``_mutex``) holds the batches nobody has an answer for; ``_leading`` is held by the
caller that publishes. Whoever waits is called when its answer is there, or when it is its turn to publish: each by
itself, so that nobody whose answer is there queues behind the next publish. A forked child starts with new locks and
nothing waiting.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from ekiden.errors import BrokerUnavailable, TransportError
from ekiden.message import Message, Published, PublishOutcome
from ekiden.options import Publishing
from ekiden.transport import Transport

if TYPE_CHECKING:
    from ekiden.futures import PublishingThread

Answer = TypeVar("Answer")


class _Batch:
    """One caller's messages, and their answers once they are known. ``called`` gets an item when it is to look."""

    __slots__ = ("answers", "called", "deadline", "error", "messages")

    def __init__(self, messages: Sequence[Message], deadline: float) -> None:
        self.messages = messages
        self.deadline = deadline
        self.answers: list[Published] | None = None
        self.error: Exception | None = None
        self.called: SimpleQueue[None] = SimpleQueue()

    @property
    def is_answered(self) -> bool:
        """Whether it is known what became of the messages."""
        return self.answers is not None or self.error is not None


class Publisher:
    """Publishes for any number of threads over one transport."""

    def __init__(self, transport: Callable[[], Transport]) -> None:
        self._transport = transport
        self._mutex = threading.Lock()
        self._leading = threading.Lock()
        self._waiting: list[_Batch] = []
        self._async: PublishingThread | None = None

    def publish(self, messages: Sequence[Message], how: Publishing) -> list[Published]:
        """Publish and return an answer for each message.

        Raises BrokerUnavailable when the broker could not be reached within the timeout (after trying again, if that
        is how), BrokerRefused when it will not.
        """
        deadline = time.monotonic() + how.timeout
        tries = 0
        while True:
            try:
                if not self._waiting and self._leading.acquire(blocking=False):
                    # Nobody else is publishing: the ordinary case, and the shortest way.
                    try:
                        return self._transport().publish(messages, deadline=deadline)
                    finally:
                        self._leading.release()
                        if self._waiting:
                            self._call_next()
                return self._publish_together(messages, deadline, how.timeout)
            except BrokerUnavailable as error:
                tries += 1
                _pause_after(error, tries, how, deadline)

    def persist(self, act: Callable[[], Answer], how: Publishing) -> Answer:
        """Do what has to be done at the broker before publishing, and try it again as ``publish`` would."""
        deadline = time.monotonic() + how.timeout
        tries = 0
        while True:
            try:
                return act()
            except BrokerUnavailable as error:
                tries += 1
                _pause_after(error, tries, how, deadline)

    def _publish_together(self, messages: Sequence[Message], deadline: float, timeout: float) -> list[Published]:
        """Wait for whoever is publishing; by then our messages have been taken along, or it is our turn to take all."""
        batch = _Batch(messages, deadline)
        with self._mutex:
            self._waiting.append(batch)
        try:
            while not batch.is_answered:
                if self._leading.acquire(blocking=False):
                    try:
                        self._publish_waiting()
                    finally:
                        self._leading.release()
                        self._call_next()
                else:
                    batch.called.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            raise BrokerUnavailable(
                f"{messages[0].queue}: nothing could be published within {timeout:g} s; the broker does not answer."
            ) from None
        finally:
            if not batch.is_answered:
                self._leave(batch)
        if batch.error is not None:
            raise batch.error
        assert batch.answers is not None
        return batch.answers

    def _leave(self, batch: _Batch) -> None:
        """Wait no more. It may have been our turn."""
        with self._mutex:
            if batch in self._waiting:
                self._waiting.remove(batch)
        self._call_next()

    def _call_next(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting[0].called.put(None)

    def _publish_waiting(self) -> None:
        """Publish what everybody waits for. An interruption leaves the batches waiting for the next caller."""
        with self._mutex:
            batches = list(self._waiting)
        if not batches:
            return
        transport = self._transport()
        messages = batches[0].messages if len(batches) == 1 else [each for b in batches for each in b.messages]
        try:
            answers = transport.publish(messages, deadline=max(batch.deadline for batch in batches))
        except TransportError as error:
            for batch in batches:
                batch.error = _own_error(error) if len(batches) > 1 else error
        else:
            start = 0
            for batch in batches:
                batch.answers = answers[start : start + len(batch.messages)]
                start += len(batch.messages)
        with self._mutex:
            self._waiting = [each for each in self._waiting if not each.is_answered]
        for batch in batches:
            batch.called.put(None)

    async def publish_async(self, messages: Sequence[Message], how: Publishing) -> list[Published]:
        """The same for ``async`` callers: their messages go out together, from one thread."""
        from ekiden.futures import PublishingThread  # asyncio takes 40 ms to import, and not every program awaits

        with self._mutex:
            if self._async is None or self._async.has_failed:
                self._async = PublishingThread(self.publish)
            publishing = self._async
        return await publishing.publish(messages, how)

    def close(self) -> None:
        """End the thread for ``async`` callers, if there is one, after it has published what it was given."""
        with self._mutex:
            publishing, self._async = self._async, None
        if publishing is not None:
            publishing.close()

    def forget(self) -> None:
        """In a forked child: new locks, nothing waiting, no thread."""
        self._mutex = threading.Lock()
        self._leading = threading.Lock()
        self._waiting = []
        self._async = None


def _pause_after(error: BrokerUnavailable, tries: int, how: Publishing, deadline: float) -> None:
    """Wait before the next try; or raise ``error``, where there is to be none."""
    if how.retry is None or (how.retry.max_retries is not None and tries > how.retry.max_retries):
        raise error
    pause = how.retry.pause(tries)
    if time.monotonic() + pause >= deadline:
        raise error
    time.sleep(pause * random.uniform(0.5, 1.0))  # not all at once, when many wait for one broker


def _own_error(error: TransportError) -> TransportError:
    """A copy, so that several threads do not raise one exception object."""
    own = type(error)(*error.args)
    own.__cause__ = error.__cause__
    return own


def refusal(messages: Sequence[Message], answers: Sequence[Published]) -> TransportError | None:
    """The first error among ``answers``, as one that may be raised; None when every message is with the broker."""
    for message, answer in zip(messages, answers, strict=True):
        if answer.outcome is PublishOutcome.FAILED:
            if isinstance(answer.error, TransportError):
                return answer.error
            return TransportError(f"{message.queue}: the broker did not store the message: {answer.error}")
    return None
