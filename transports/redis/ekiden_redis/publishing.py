"""Publishing: messages are packed, sorted by queue, cut into slices, and stored by one script for each slice."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from ekiden.errors import BrokerRefused, EkidenError
from ekiden.message import DUPLICATE, REPLY_PREFIX, STORED, Message, Published, PublishOutcome

from ekiden_redis import scripts
from ekiden_redis.client import Call, Client
from ekiden_redis.connection import Part
from ekiden_redis.full import LARGE_BYTES, does_not_hold, memory_of, never_fits
from ekiden_redis.keys import queue_keys
from ekiden_redis.packing import Packed, packed

SLICE_BYTES = 4 * 1024 * 1024
"""About how much one script is sent at most, if it is more than one message."""

REPLY_QUEUE_KEPT_MS = b"60000"
"""How long a ``reply.*`` queue outlives its consumer."""


class Slice(msgspec.Struct, frozen=True):
    """Messages of one queue that one script stores; ``numbers`` are their positions in the batch."""

    queue: str
    numbers: list[int]
    messages: list[Packed]


def publish(
    client: Client, messages: Sequence[Message], *, deadline: float | None = None, beyond: bool = False
) -> list[Published]:
    """Store ``messages``; as ``Transport.publish``. ``beyond``: also in a server that has reached its maxmemory."""
    answers: list[Published] = [STORED] * len(messages)
    by_queue: dict[str, Slice] = {}
    for number, message in enumerate(messages):
        value = packed(message, max_message_bytes=client.options.max_message_bytes)
        if isinstance(value, BrokerRefused):
            answers[number] = Published(PublishOutcome.FAILED, value)
            continue
        queue = by_queue.get(message.queue)
        if queue is None:
            queue = by_queue[message.queue] = Slice(message.queue, [], [])
        queue.numbers.append(number)
        queue.messages.append(value)
    slices = [slice_ for queue in by_queue.values() for slice_ in _cut(queue)]
    if slices:
        _store(client, slices, answers, deadline, beyond=beyond)
    return answers


def _store(
    client: Client, slices: Sequence[Slice], answers: list[Published], deadline: float | None, *, beyond: bool
) -> None:
    """Store ``slices`` and note each message's answer; raises when nothing could be asked."""
    prefix = client.options.prefix
    replies = client.run_all([_call(prefix, slice_, beyond=beyond) for slice_ in slices], by=deadline)
    failed: list[tuple[Slice, EkidenError]] = []
    for slice_, reply in zip(slices, replies, strict=True):
        if isinstance(reply, EkidenError):
            failed.append((slice_, reply))
        else:
            for position in reply:
                answers[slice_.numbers[position]] = DUPLICATE
    if failed:
        _note_failures(client, failed, answers, asked=len(slices), deadline=deadline, beyond=beyond)


def _note_failures(
    client: Client,
    failed: Sequence[tuple[Slice, EkidenError]],
    answers: list[Published],
    *,
    asked: int,
    deadline: float | None,
    beyond: bool,
) -> None:
    errors = [error for _, error in failed]
    alone = len(failed) == 1 and len(failed[0][0].numbers) == 1
    if any(map(client.errors.is_too_large, errors)) and not alone:
        # The server has closed the connection over one of them. Which one shows when each goes by itself.
        for slice_, _ in failed:
            for number, message in zip(slice_.numbers, slice_.messages, strict=True):
                _store(client, [Slice(slice_.queue, [number], [message])], answers, deadline, beyond=beyond)
        return
    if any(map(client.errors.is_full, errors)) and not alone and (parts := _without_large(failed)):
        # A large one may have filled the server while it was being sent, and then it has refused the others too.
        for part in parts:
            _store(client, part, answers, deadline, beyond=beyond)
        return
    if len(failed) == asked and not any(map(client.errors.is_answer, errors)):
        raise errors[0]
    for slice_, error in failed:
        refusal = _never_fits(client, slice_) if client.errors.is_full(error) else None
        for number in slice_.numbers:
            answers[number] = Published(PublishOutcome.FAILED, refusal or error)


def _without_large(failed: Sequence[tuple[Slice, EkidenError]]) -> list[list[Slice]]:
    """The small messages of these slices, and each large one, to be sent apart; nothing where none of them is large."""
    small: list[Slice] = []
    large: list[list[Slice]] = []
    for slice_, _ in failed:
        some = Slice(slice_.queue, [], [])
        for number, message in zip(slice_.numbers, slice_.messages, strict=True):
            if len(message.value) > LARGE_BYTES:
                large.append([Slice(slice_.queue, [number], [message])])
            else:
                some.numbers.append(number)
                some.messages.append(message)
        if some.numbers:
            small.append(some)
    return [*([small] if small else []), *large] if large else []


def _never_fits(client: Client, slice_: Slice) -> BrokerRefused | None:
    """Why what a full server has refused would be refused by it if it were empty; None when it would not be."""
    size = sum(len(message.value) for message in slice_.messages)
    if len(slice_.numbers) > 1 or size <= LARGE_BYTES:
        return None
    memory = memory_of(client, queue_keys(client.options.prefix, slice_.queue).messages)
    return BrokerRefused(does_not_hold(client.place, size, memory)) if never_fits(size, memory) else None


def _call(prefix: str, slice_: Slice, *, beyond: bool) -> Call:
    keys = queue_keys(prefix, slice_.queue)
    arguments: list[Part] = [REPLY_QUEUE_KEPT_MS, "1" if beyond else ""]
    for message in slice_.messages:
        arguments += (message.id, message.rank, message.due, message.value)
    wanted = [keys.messages, keys.held, keys.ready, keys.delayed, keys.bell, keys.sequence]
    if slice_.queue.startswith(REPLY_PREFIX):
        wanted.append(keys.open)
    return Call(scripts.PUBLISH, wanted, arguments)


def _cut(queue: Slice) -> list[Slice]:
    """``queue`` in parts that one script takes."""
    if len(queue.numbers) == 1:
        return [queue]
    slices: list[Slice] = []
    start = size = 0
    for end, message in enumerate(queue.messages):
        if end > start and (end - start == scripts.AT_ONCE or size + len(message.value) > SLICE_BYTES):
            slices.append(Slice(queue.queue, queue.numbers[start:end], queue.messages[start:end]))
            start, size = end, 0
        size += len(message.value)
    slices.append(Slice(queue.queue, queue.numbers[start:], queue.messages[start:]))
    return slices
