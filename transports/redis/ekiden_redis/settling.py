"""Settling: what follows is published and the delivery is forgotten, in one script where all keys are on one server.

In a cluster, queues are on several servers, and a script is carried out on one. Then it takes three steps: extend
(does the delivery still hold?), publish, settle. Who dies in between leaves messages published and a delivery that
comes back; publishing them once more finds their ids taken. What follows in very large numbers goes the same way, so
that no script holds the server up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec
from ekiden.errors import BrokerRefused, BrokerUnavailable, EkidenError, TransportError
from ekiden.message import (
    LOST,
    REPLY_PREFIX,
    SETTLED,
    Delivery,
    Ending,
    Published,
    PublishOutcome,
    Settled,
    SettleOutcome,
)

from ekiden_redis import scripts
from ekiden_redis.client import Call, Client
from ekiden_redis.connection import Part, Reply
from ekiden_redis.full import Memory, does_not_hold, may_follow, memory_of, never_fits
from ekiden_redis.keys import queue_keys, slot_of
from ekiden_redis.packing import Packed, packed, value_of
from ekiden_redis.publishing import REPLY_QUEUE_KEPT_MS, SLICE_BYTES, publish

Item = TypeVar("Item")


_GONE = Settled(SettleOutcome.LOST)
"""The message is not there: it was settled, by this consumer or another one."""


class _FollowedEnding(msgspec.Struct, frozen=True):
    """An ending with the messages that follow, packed, each with its queue. ``number`` is its position in the batch."""

    number: int
    ending: Ending
    messages: list[tuple[str, Packed]]

    def queues(self) -> dict[str, None]:
        """Its own queue, then those of what follows, each once."""
        return {self.ending.delivery.message.queue: None} | dict.fromkeys(queue for queue, _ in self.messages)

    def size(self) -> int:
        """Bytes that are sent for it, about."""
        return sum(len(message.value) for _, message in self.messages)

    def grows_by(self) -> int:
        """By how many bytes what follows is larger than what is forgotten for it; replies, taken away soon, are not."""
        stay = sum(len(message.value) for queue, message in self.messages if not queue.startswith(REPLY_PREFIX))
        forgotten = self.ending.delivery.message
        return stay - len(value_of(forgotten.priority, forgotten.due, forgotten.headers, forgotten.body))


class Settler:
    """Settles for one consumer, whose lease is ``lease`` seconds.

    ``holds(delivery)``: whether nobody else can have had it since this consumer claimed or extended it.
    """

    def __init__(self, client: Client, lease: float, holds: Callable[[Delivery], bool]) -> None:
        self._client = client
        self._lease_ms = b"%d" % round(lease * 1000)
        self._holds = holds

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        """As ``Consumer.settle``."""
        answers: list[Settled] = [SETTLED] * len(endings)
        plain: dict[str, list[int]] = {}
        together: list[_FollowedEnding] = []
        in_steps: list[_FollowedEnding] = []
        for number, ending in enumerate(endings):
            if not ending.publish:
                plain.setdefault(ending.delivery.message.queue, []).append(number)
                continue
            followed = self._followed(number, ending)
            if isinstance(followed, BrokerRefused):
                answers[number] = Settled(SettleOutcome.FAILED, followed)
            elif self._fits_one_script(followed):
                together.append(followed)
            else:
                in_steps.append(followed)
        self._settle_plain(plain, endings, answers)
        self._hand_over(self._batches(together), answers)
        if in_steps:
            self._settle_in_steps(in_steps, answers)
        return [
            self._known(ending.delivery) if answer is _GONE else answer
            for ending, answer in zip(endings, answers, strict=True)
        ]

    def _known(self, delivery: Delivery) -> Settled:
        """What became of one that is not there: while it was ours, only an earlier call can have settled it."""
        return SETTLED if self._holds(delivery) else LOST

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """As ``Consumer.extend``."""
        answers: list[Settled] = [SETTLED] * len(deliveries)
        by_queue: dict[str, list[int]] = {}
        for number, delivery in enumerate(deliveries):
            by_queue.setdefault(delivery.message.queue, []).append(number)
        numbers_of_calls, calls = [], []
        for queue, numbers in by_queue.items():
            keys = queue_keys(self._client.options.prefix, queue)
            for some in sliced(numbers):
                tags = [deliveries[number].tag for number in some]
                numbers_of_calls.append(some)
                calls.append(Call(scripts.EXTEND, (keys.held, keys.leased), (self._lease_ms, *tags)))
        self._note(self._client.run_all(calls), numbers_of_calls, answers)
        return answers

    def _followed(self, number: int, ending: Ending) -> _FollowedEnding | BrokerRefused:
        messages: list[tuple[str, Packed]] = []
        for message in ending.publish:
            value = packed(message, max_message_bytes=self._client.options.max_message_bytes)
            if isinstance(value, BrokerRefused):
                return value
            messages.append((message.queue, value))
        return _FollowedEnding(number, ending, messages)

    def _fits_one_script(self, followed: _FollowedEnding) -> bool:
        if len(followed.messages) > scripts.AT_ONCE or followed.size() > SLICE_BYTES:
            return False
        if not self._client.is_cluster:
            return True
        prefix = self._client.options.prefix
        return len({slot_of(queue_keys(prefix, queue).messages) for queue in followed.queues()}) == 1

    def _settle_plain(self, plain: dict[str, list[int]], endings: Sequence[Ending], answers: list[Settled]) -> None:
        numbers_of_calls: list[list[int]] = []
        calls: list[Call] = []
        for queue, numbers in plain.items():
            keys = queue_keys(self._client.options.prefix, queue)
            for some in sliced(numbers):
                tags = [endings[number].delivery.tag for number in some]
                numbers_of_calls.append(some)
                calls.append(Call(scripts.SETTLE, (keys.messages, keys.held, keys.leased), tags))
        self._note(self._client.run_all(calls), numbers_of_calls, answers)

    def _batches(self, followed: Iterable[_FollowedEnding]) -> list[list[_FollowedEnding]]:
        """Those that go into one script each: of one slot in a cluster, and no more than a script should do."""
        batches: list[list[_FollowedEnding]] = []
        count = size = 0
        for each in followed:
            count += 1 + len(each.messages)
            size += each.size()
            if not batches or self._client.is_cluster or count > scripts.AT_ONCE or size > SLICE_BYTES:
                batches.append([])
                count, size = 1 + len(each.messages), each.size()
            batches[-1].append(each)
        return batches

    def _hand_over(self, batches: Sequence[Sequence[_FollowedEnding]], answers: list[Settled]) -> None:
        if not batches:
            return
        replies = self._client.run_all([self._hand_over_call(batch) for batch in batches])
        replies = [
            self._hand_over_beyond(batch, reply, answers) if self._is_full(reply) else reply
            for batch, reply in zip(batches, replies, strict=True)
        ]
        if any(isinstance(reply, EkidenError) and self._client.errors.is_too_large(reply) for reply in replies):
            # The server has closed the connection over it. Which one it was shows when each goes by itself.
            for number, batch in enumerate(batches):
                if isinstance(replies[number], EkidenError) and len(batches) + len(batch) > 2:
                    for each in batch:
                        self._hand_over([[each]], answers)
                else:
                    self._note([replies[number]], [[each.number for each in batch]], answers)
            return
        self._note(replies, [[each.number for each in batch] for batch in batches], answers)

    def _is_full(self, reply: Reply | EkidenError) -> bool:
        return isinstance(reply, EkidenError) and self._client.errors.is_full(reply)

    def _hand_over_beyond(
        self, batch: Sequence[_FollowedEnding], full: EkidenError, answers: list[Settled]
    ) -> Reply | EkidenError:
        """Hand over those of a batch that may go into a full server; returns the positions of all that are lost."""
        memory = self._memory(batch[0])
        going = [position for position, each in enumerate(batch) if may_follow(each.grows_by(), memory)]
        lost: list[int] = []
        if going:
            (reply,) = self._client.run_all(
                [self._hand_over_call([batch[position] for position in going], beyond=True)]
            )
            if isinstance(reply, EkidenError):
                return reply
            lost = [going[position] for position in reply]
        for position, each in enumerate(batch):
            if position not in going:
                answers[each.number] = self._does_not_fit(each, memory) or _failed(full)
        return lost

    def _memory(self, each: _FollowedEnding) -> Memory | None:
        """That of the server that holds the ended message."""
        queue = each.ending.delivery.message.queue
        return memory_of(self._client, queue_keys(self._client.options.prefix, queue).messages)

    def _does_not_fit(self, each: _FollowedEnding, memory: Memory | None) -> Settled | None:
        """The answer to an ending that would not fit into the server if it were empty; None for another one."""
        if not never_fits(each.size(), memory):
            return None
        refusal = BrokerRefused(does_not_hold(self._client.place, each.size(), memory))
        return Settled(SettleOutcome.FAILED, refusal)

    def _hand_over_call(self, batch: Sequence[_FollowedEnding], *, beyond: bool = False) -> Call:
        prefix = self._client.options.prefix
        queues: dict[str, int] = {}
        keys: list[bytes] = []
        for each in batch:
            for queue in each.queues():
                if queue not in queues:
                    queues[queue] = len(queues)
                    of = queue_keys(prefix, queue)
                    keys += (of.messages, of.held, of.ready, of.delayed, of.leased, of.bell, of.sequence, of.open)
        arguments: list[Part] = [REPLY_QUEUE_KEPT_MS, "1" if beyond else ""]
        for each in batch:
            delivery = each.ending.delivery
            arguments += (str(queues[delivery.message.queue]), delivery.tag, str(len(each.messages)))
            for queue, message in each.messages:
                temporary = "1" if queue.startswith(REPLY_PREFIX) else "0"
                arguments += (str(queues[queue]), temporary, message.id, message.rank, message.due, message.value)
        return Call(scripts.HAND_OVER, keys, arguments)

    def _settle_in_steps(self, followed: Sequence[_FollowedEnding], answers: list[Settled]) -> None:
        held = self.extend([each.ending.delivery for each in followed])
        going: list[_FollowedEnding] = []
        for each, answer in zip(followed, held, strict=True):
            if answer.outcome is SettleOutcome.SETTLED:
                going.append(each)
            else:
                answers[each.number] = answer
        plain: dict[str, list[int]] = {}
        for position, (each, failure) in enumerate(zip(going, self._published(going), strict=True)):
            if failure is not None:
                answers[each.number] = failure
            else:
                plain.setdefault(each.ending.delivery.message.queue, []).append(position)
        settled = [SETTLED] * len(going)
        self._settle_plain(plain, [each.ending for each in going], settled)
        for positions in plain.values():
            for position in positions:
                answers[going[position].number] = settled[position]

    def _published(self, going: Sequence[_FollowedEnding]) -> list[Settled | None]:
        """Publish what follows each; returns for each why that failed, or None."""
        messages = [message for each in going for message in each.ending.publish]
        try:
            published = iter(publish(self._client, messages))
        except TransportError as error:
            return [_failed(error)] * len(going)
        failures = [_first_failure([next(published) for _ in each.ending.publish]) for each in going]
        for position, each in enumerate(going):
            failure = failures[position]
            is_full = failure is not None and self._is_full(failure.error)
            if is_full and may_follow(each.grows_by(), self._memory(each)):
                failures[position] = _first_failure(publish(self._client, each.ending.publish, beyond=True))
        return failures

    def _note(
        self, replies: Sequence[Reply | EkidenError], numbers_of_calls: Sequence[Sequence[int]], answers: list[Settled]
    ) -> None:
        """Note what each call answered for the endings of these numbers: the positions of those that are lost."""
        for numbers, reply in zip(numbers_of_calls, replies, strict=True):
            if isinstance(reply, EkidenError):
                too_large = len(numbers) == 1 and self._client.errors.is_too_large(reply)
                for number in numbers:
                    answers[number] = Settled(SettleOutcome.FAILED, reply) if too_large else _failed(reply)
            else:
                for position in reply:
                    if position < 0:
                        answers[numbers[-1 - position]] = _GONE
                    else:
                        answers[numbers[position]] = LOST


def sliced(items: list[Item]) -> Iterator[list[Item]]:
    """``items`` in parts that one script takes."""
    for start in range(0, len(items), scripts.AT_ONCE):
        yield items[start : start + scripts.AT_ONCE]


def _first_failure(published: Sequence[Published]) -> Settled | None:
    failed = (Settled(SettleOutcome.FAILED, each.error) for each in published if each.outcome is PublishOutcome.FAILED)
    return next(failed, None)


def _failed(error: EkidenError) -> Settled:
    """It is the server that is in trouble, not an ending: when it is put right, all of them are good."""
    return Settled(SettleOutcome.FAILED, BrokerUnavailable(str(error)))
