"""Many callers' messages in few publishes.

Callers stand in a line, and the first in it publishes: its own messages, and those of all who wait behind it (group
commit). Each caller has its own answers, its own error and its own deadline, and tries again by itself. No thread is
needed for callers that may block; for ``async`` callers one thread, started at the first one, publishes for all.

    _line      every caller that publishes or waits, in the order in which they came; the first one publishes
    _waiting   those of them that wait for the first one

**An interruption at any point leaves nothing locked**: an exception out of a signal handler (Ctrl-C, an alarm) may come
after every call. So there is no lock whose holder could vanish between taking it and noting that. A caller enters the
line by an assignment and leaves it by one call of C, the first of its ``finally``; in between the line itself says who
publishes. A wake-up may be lost with the caller that owed it: therefore whoever waits looks again by itself. When the
one who publishes is interrupted, the next in the line publishes the messages of all who wait once more.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ekiden.errors import BrokerUnavailable, TransportError
from ekiden.message import STORED, Message, Published, PublishOutcome
from ekiden.options import Publishing
from ekiden.transport import Transport

if TYPE_CHECKING:
    from ekiden.futures import PublishingThread

Answer = TypeVar("Answer")

_LOOK_AGAIN_SECONDS = 0.2

_TAKEN_ALONG = 0.1
"""A caller takes along those whose deadlines are later than its own by this share of its timeout at most: their publish
ends with the last of these deadlines."""


class _Group:
    """What became of the messages that were published together; one assignment answers them all."""

    __slots__ = ("answers", "error", "is_shared")

    def __init__(self, *, is_shared: bool) -> None:
        self.is_shared = is_shared
        self.answers: list[Published] | None = None
        self.error: TransportError | None = None


class _Batch(msgspec.Struct, eq=False):
    """One caller's messages. ``called`` (where it waits) gets an item when it is to look; ``group`` tells the answers.

    ``deadline`` is on the monotonic clock. ``start``: where its messages are among the group's.
    """

    messages: Sequence[Message]
    deadline: float
    timeout: float
    called: SimpleQueue[None] | None = None
    group: _Group | None = None
    start: int = 0

    @property
    def is_answered(self) -> bool:
        """Whether it is known what became of the messages."""
        group = self.group
        return group is not None and (group.answers is not None or group.error is not None)

    def look(self) -> None:
        """Have its caller look whether it is answered, or the first in the line."""
        if self.called is not None:
            self.called.put(None)


class Publisher:
    """Publishes for any number of threads over one transport."""

    def __init__(self, transport: Callable[[], Transport]) -> None:
        self._transport = transport
        self._mutex = threading.Lock()
        self._line: dict[_Batch, None] = {}
        self._waiting: dict[_Batch, None] = {}
        self._async: PublishingThread | None = None

    def publish(self, messages: Sequence[Message], how: Publishing, deadline: float | None = None) -> list[Published]:
        """Publish and return an answer for each message.

        It ends within ``how.timeout``, or by ``deadline`` (on the monotonic clock) where that was set when more than
        publishing began. What the broker could not do now, whether it was raised or answered, is tried again until
        then, if that is how. Raises BrokerUnavailable when the broker could not be reached, BrokerRefused when it
        will not.
        """
        if deadline is None:
            deadline = time.monotonic() + how.timeout
        line, batch = self._line, _Batch(messages, deadline, how.timeout)
        answers: list[Published] | None = None
        error: BrokerUnavailable | None = None
        try:
            line[batch] = None
            if len(line) == 1:
                # Nobody else is publishing: the ordinary case, and the shortest way.
                answers = self._transport().publish(messages, deadline=deadline)
            else:
                answers = self._publish_together(batch)
        except BrokerUnavailable as trouble:
            if how.retry is None:
                raise
            error = trouble
        finally:
            line.pop(batch, None)  # the first call: an interruption comes before the try, or after this
            if line:
                self._call_first()
        if answers is not None and (how.retry is None or answers.count(STORED) == len(answers)):
            return answers
        return self._publish_again(Tries(messages, how, deadline), answers, error)

    def persist(self, act: Callable[[float], Answer], how: Publishing, deadline: float) -> Answer:
        """Do what has to be done at the broker before publishing, and try it again as ``publish`` would.

        ``act`` is given the deadline.
        """
        tries = Tries((), how, deadline)
        while True:
            try:
                return act(deadline)
            except BrokerUnavailable as error:
                pause = tries.pause_after(None, error)
                if pause is None:
                    raise
            time.sleep(pause)

    def _publish_together(self, batch: _Batch) -> list[Published]:
        """Wait for who is publishing; by then our messages have been taken along, or it is our turn to take all."""
        batch.called = SimpleQueue()
        try:
            self._waiting[batch] = None
            while not batch.is_answered:
                if list(self._line)[:1] == [batch]:
                    self._publish_waiting(batch)
                    continue
                left = batch.deadline - time.monotonic()
                if left <= 0:
                    raise BrokerUnavailable(
                        f"{batch.messages[0].queue}: nothing could be published within {batch.timeout:g} s; the broker "
                        "does not answer."
                    )
                with suppress(Empty):
                    batch.called.get(timeout=min(left, _LOOK_AGAIN_SECONDS))
        finally:
            self._waiting.pop(batch, None)
        group = batch.group
        assert group is not None
        if group.error is not None:
            raise _own_error(group.error) if group.is_shared else group.error
        assert group.answers is not None
        return group.answers[batch.start : batch.start + len(batch.messages)]

    def _publish_waiting(self, first: _Batch) -> None:
        """Publish what everybody waits for whose deadline allows it."""
        latest = first.deadline + first.timeout * _TAKEN_ALONG
        batches = [first]
        batches += [
            each
            for each in list(self._waiting)
            if each is not first and each.deadline <= latest and not each.is_answered
        ]
        group = _Group(is_shared=len(batches) > 1)
        messages: list[Message] = []
        for each in batches:
            each.start = len(messages)
            each.group = group
            messages += each.messages
        try:
            group.answers = self._transport().publish(messages, deadline=max(each.deadline for each in batches))
        except TransportError as error:
            group.error = error
        for each in batches[1:]:
            self._line.pop(each, None)
            each.look()

    def _call_first(self) -> None:
        """Somebody has left the line: who is the first in it now is to look."""
        for first in list(self._line)[:1]:
            first.look()

    def _publish_again(
        self, tries: Tries, answers: list[Published] | None, error: BrokerUnavailable | None
    ) -> list[Published]:
        """Try what the broker could not do until it can, or there are no more tries."""
        once = Publishing(tries.how.timeout, None)
        while (pause := tries.pause_after(answers, error)) is not None:
            time.sleep(pause)
            answers, error = None, None
            try:
                answers = self.publish(tries.left(), once, tries.deadline)
            except BrokerUnavailable as trouble:
                error = trouble
        return tries.outcome()

    async def publish_async(
        self, messages: Sequence[Message], how: Publishing, deadline: float | None = None
    ) -> list[Published]:
        """The same for ``async`` callers: their messages go out together, from one thread."""
        from ekiden.futures import PublishingThread  # asyncio takes 40 ms to import, and not every program awaits

        if deadline is None:
            deadline = time.monotonic() + how.timeout
        with self._mutex:
            if self._async is None or self._async.has_failed:
                self._async = PublishingThread(self.publish)
            publishing = self._async
        return await publishing.publish(messages, how, deadline)

    def close(self) -> None:
        """End the thread for ``async`` callers, if there is one, after it has published what it was given."""
        with self._mutex:
            publishing, self._async = self._async, None
        if publishing is not None:
            publishing.close()

    def forget(self) -> None:
        """In a forked child: a new lock, nobody in the line, no thread."""
        self._mutex = threading.Lock()
        self._line = {}
        self._waiting = {}
        self._async = None


class Tries:
    """What has become of one caller's messages so far, over all its tries. Owned by one thread.

    ``deadline`` is on the monotonic clock.
    """

    def __init__(self, messages: Sequence[Message], how: Publishing, deadline: float) -> None:
        self.messages = messages
        self.how = how
        self.deadline = deadline
        self._answers: list[Published | None] = [None] * len(messages)
        self._left: Sequence[int] = range(len(messages))
        self._error: BrokerUnavailable | None = None
        self._count = 0

    def left(self) -> list[Message]:
        """What is to be published (once more)."""
        return [self.messages[number] for number in self._left]

    def pause_after(self, answers: Sequence[Published] | None, error: BrokerUnavailable | None) -> float | None:
        """How many seconds after this try is the next one; None: there is none.

        ``answers`` are those to what was ``left``, or ``error`` was raised instead.
        """
        self._count += 1
        self._error = error
        if answers is not None:
            for number, answer in zip(self._left, answers, strict=True):
                self._answers[number] = answer
            self._left = [
                number
                for number, answer in zip(self._left, answers, strict=True)
                if answer.outcome is PublishOutcome.FAILED and isinstance(answer.error, BrokerUnavailable)
            ]
            if not self._left:
                return None
        return _pause(self.how, self._count, self.deadline)

    def outcome(self) -> list[Published]:
        """An answer for each message. Raises the error that the last try raised, if it was about all of them."""
        if self._error is not None:
            if len(self._left) == len(self.messages):
                raise self._error
            for number in self._left:
                self._answers[number] = Published(PublishOutcome.FAILED, self._error)
        return [answer for answer in self._answers if answer is not None]


def _pause(how: Publishing, tries: int, deadline: float) -> float | None:
    """Seconds until the next try after so many; None where there is to be none."""
    if how.retry is None or (how.retry.max_retries is not None and tries > how.retry.max_retries):
        return None
    pause = how.retry.pause(tries)
    if time.monotonic() + pause >= deadline:
        return None
    return pause * random.uniform(0.5, 1.0)  # not all at once, when many wait for one broker


def _own_error(error: TransportError) -> TransportError:
    """A copy, so that several threads do not raise one exception object."""
    own = type(error)(*error.args)
    own.__cause__ = error.__cause__
    return own


def refusal(messages: Sequence[Message], answers: Sequence[Published]) -> TransportError | None:
    """The first error among ``answers``, as one that may be raised; None when every message is with the broker."""
    if answers.count(STORED) == len(answers) == len(messages):
        return None
    for message, answer in zip(messages, answers, strict=True):
        if answer.outcome is PublishOutcome.FAILED:
            if isinstance(answer.error, TransportError):
                return answer.error
            return TransportError(f"{message.queue}: the broker did not store the message: {answer.error}")
    return None
