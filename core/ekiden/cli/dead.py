"""``ekiden dead``: looks at dead letters, sends them back, deletes them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any
from uuid import uuid4

import click

from ekiden.app import Ekiden
from ekiden.cli.output import (
    json_option,
    open_app,
    plural,
    print_fields,
    print_json,
    print_table,
    say,
    when,
)
from ekiden.cli.quantities import AT_LEAST_ONE
from ekiden.cli.queues import delete_messages
from ekiden.cli.target import AppCommand, app_argument, queue_argument
from ekiden.codec import decode_call
from ekiden.errors import BrokerRefused, ConfigurationError, MessageError, TransportError
from ekiden.execution import redriven
from ekiden.message import DEAD_SUFFIX, RESERVED_HEADER_PREFIX, Delivery, Ending, Message, SettleOutcome
from ekiden.routes import check_queue_name
from ekiden.signature import Call
from ekiden.transport import Consumer

_AT_ONCE = 100
_LONGEST_SHOWN_ERROR = 80
_NOTHING_LEFT_SECONDS = 0.5


@click.group()
def dead() -> None:
    """Messages that failed for good: look at them, send them back, delete them.

    What fails for good, or cannot be processed at all, is kept in the queue's dead letters with the reason.

    \b
    ekiden dead list shop:app emails
    ekiden dead show shop:app emails 0190d0c3f6ab4b1f...
    ekiden dead retry shop:app emails --all               once the cause is gone
    ekiden dead purge shop:app emails
    """


class DeadLetter:
    """One of them: the message, the call that it carries if it can be read, and what its headers say."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.call: Call | None = None
        with suppress(MessageError):  # garbage: that is why it is here
            self.call = decode_call(message.body, message.headers)

    @property
    def id(self) -> str:
        """The task's id; the message's own where no call can be read."""
        return self.message.id if self.call is None else self.call.id

    def is_one_of(self, ids: Sequence[str]) -> bool:
        """Whether it is meant by one of these ids."""
        return self.id in ids or self.message.id in ids

    def told(self, what: str) -> Any:
        """What a header says of its death."""
        return self.message.headers.get(f"{RESERVED_HEADER_PREFIX}dead-{what}")

    @property
    def origin(self) -> str | None:
        """The queue that it came from, as far as its headers say so."""
        queue = self.told("queue")
        return queue if isinstance(queue, str) else None

    def row(self) -> dict[str, Any]:
        """What ``dead list`` tells of it."""
        return {
            "id": self.id,
            "task": None if self.call is None else self.call.task,
            "reason": self.told("reason"),
            "error": self.told("error"),
            "attempts": self.told("attempts"),
            "at": when(self.told("at")),
        }

    def whole(self) -> dict[str, Any]:
        """Everything that is known of it."""
        call, message = self.call, self.message
        own = {name: value for name, value in message.headers.items() if not name.startswith(RESERVED_HEADER_PREFIX)}
        return {
            **self.row(),
            "queue": self.told("queue"),
            "message_id": message.id,
            "priority": message.priority,
            "args": None if call is None else call.args,
            "kwargs": None if call is None else call.kwargs,
            "tries": None if call is None else call.retries + 1,
            "sent": None if call is None else when(call.sent),
            "headers": own,
            "body": message.body.decode("utf-8", "backslashreplace") if call is None else None,
        }


@dead.command("list", cls=AppCommand)
@app_argument
@queue_argument
@click.option("--limit", type=AT_LEAST_ONE, help="Show at most so many.")
@json_option
def list_letters(target: str, queue: str, limit: int | None, as_json: bool) -> None:
    """List the dead letters of a queue.

    \b
    ekiden dead list shop:app emails
    ekiden dead list shop:app emails --json | jq '.[].task'
    """
    with open_app(target) as app:
        rows = [letter.row() for letter in islice(_letters(app, queue), limit)]
    if as_json:
        print_json(rows)
    elif rows:
        print_table([{**row, "error": _first_line(row["error"])} for row in rows])
    else:
        say(f"{_plain(queue)} has no dead letters.")


@dead.command(cls=AppCommand)
@app_argument
@queue_argument
@click.argument("letter_id", metavar="ID")
@json_option
def show(target: str, queue: str, letter_id: str, as_json: bool) -> None:
    """Show one dead letter whole: its arguments, its headers, what went wrong.

    \b
    ekiden dead show shop:app emails 0190d0c3f6ab4b1f...
    """
    with open_app(target) as app:
        found = next((letter for letter in _letters(app, queue) if letter.is_one_of([letter_id])), None)
    if found is None:
        raise ConfigurationError(f"{_plain(queue)} has no dead letter {letter_id}; `ekiden dead list` names them.")
    if as_json:
        print_json(found.whole())
    else:
        print_fields(found.whole())


@dead.command(cls=AppCommand)
@app_argument
@queue_argument
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="All that are there now.")
def retry(target: str, queue: str, ids: tuple[str, ...], every: bool) -> None:
    """Send dead letters back to the queue that they came from, to be tried once more.

    \b
    ekiden dead retry shop:app emails 0190d0c3f6ab4b1f...
    ekiden dead retry shop:app emails --all

    Their stored results are forgotten: the tasks are PENDING again. They count as sent now: what was to expire some
    time after it was sent expires so long after this.
    """
    if every == bool(ids):
        raise click.UsageError("say which: the ids of some, or --all.")
    with open_app(target) as app:
        there = app.transport.depth(_dead(queue)).ready or 0
        sent, stuck = 0, list[DeadLetter]()
        with click.progressbar(length=there if every else len(ids), label="Sending back") as bar:
            for number in _send_back(app, queue, ids, there, stuck):
                sent += number
                bar.update(number)
    say(f"{plural(sent, 'dead letter')} of {_plain(queue)} sent back.")
    missing = len(ids) - sent - len(stuck)
    if stuck:
        raise ConfigurationError(
            f"{plural(len(stuck), 'dead letter')} cannot be sent back and {'stays' if len(stuck) == 1 else 'stay'} in "
            f"{_dead(queue)}, such as {stuck[0].id}: nothing can be sent to the queue that it came from, "
            f"{stuck[0].origin or _plain(queue)!r}. `ekiden dead show` tells more."
        )
    if missing > 0:
        raise ConfigurationError(
            f"{plural(missing, 'dead letter')} could not be found in {_dead(queue)}; `ekiden dead list` names "
            "those that are there."
        )


@dead.command("purge", cls=AppCommand)
@app_argument
@queue_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge_letters(target: str, queue: str, yes: bool) -> None:
    """Delete the dead letters of a queue.

    \b
    ekiden dead purge shop:app emails
    """
    with open_app(target) as app:
        delete_messages(app, _dead(queue), yes=yes)


def _letters(app: Ekiden, queue: str) -> Iterator[DeadLetter]:
    after: str | None = None
    while page := app.transport.browse(_dead(queue), after=after, limit=_AT_ONCE):
        yield from (DeadLetter(seen.message) for seen in page)
        after = page[-1].cursor


def _send_back(app: Ekiden, queue: str, ids: Sequence[str], there: int, stuck: list[DeadLetter]) -> Iterator[int]:
    """Send back those of ``ids``, or the next ``there`` without any; yields how many, batch by batch.

    Each is settled and published anew in one act, so none is lost or doubled. What is not wanted, or cannot be sent
    back (it is added to ``stuck``), is held until the end, and then given back as if nobody had looked at it.
    """
    wanted = len(ids) or there
    transport = app.transport
    consumer = transport.consumer([_dead(queue)], lease=app.conf.lease, prefetch=there + _AT_ONCE, name=uuid4().hex)
    unwanted: list[Delivery] = []
    with consumer:
        while wanted > 0 and (deliveries := consumer.receive(min(_AT_ONCE, there + 1), _NOTHING_LEFT_SECONDS)):
            chosen = [each for each in deliveries if not ids or DeadLetter(each.message).is_one_of(ids)][:wanted]
            unwanted += [each for each in deliveries if each not in chosen]
            sent, refused = _redrive(app, queue, consumer, chosen)
            yield sent
            wanted -= len(chosen)
            unwanted += refused
            stuck += [DeadLetter(each.message) for each in refused]
        consumer.release(unwanted)


def _redrive(app: Ekiden, queue: str, consumer: Consumer, deliveries: Sequence[Delivery]) -> tuple[int, list[Delivery]]:
    """Send these back; returns how many went, and those that cannot be sent to the queue that they came from."""
    letters = {id(delivery): DeadLetter(delivery.message) for delivery in deliveries}
    origins = {key: letter.origin or _plain(queue) for key, letter in letters.items()}
    going = [each for each in deliveries if _is_queue_name(origins[id(each)])]
    refused = [each for each in deliveries if not _is_queue_name(origins[id(each)])]
    if app.stores_results():
        # A stored failure would stand for ever, and tell the worker that this try has been made already.
        calls = [letters[id(each)].call for each in going]
        app.backend.forget([call.id for call in calls if call is not None])
    now = time.time()
    answers = consumer.settle([Ending(each, (redriven(each.message, origins[id(each)], now=now),)) for each in going])
    for delivery, answer in zip(going, answers, strict=True):
        if isinstance(answer.error, BrokerRefused):
            refused.append(delivery)
        elif answer.outcome is SettleOutcome.FAILED:
            raise answer.error if isinstance(answer.error, TransportError) else TransportError(str(answer.error))
    return sum(answer.outcome is SettleOutcome.SETTLED for answer in answers), refused


def _is_queue_name(name: str) -> bool:
    try:
        check_queue_name(name)
    except ConfigurationError:
        return False
    return True


def _plain(queue: str) -> str:
    """The queue, whether it or its dead letters were named."""
    return queue.removesuffix(DEAD_SUFFIX)


def _dead(queue: str) -> str:
    return _plain(queue) + DEAD_SUFFIX


def _first_line(error: object) -> str | None:
    if not isinstance(error, str):
        return None
    line = error.strip().partition("\n")[0]
    return line if len(line) <= _LONGEST_SHOWN_ERROR else f"{line[: _LONGEST_SHOWN_ERROR - 3]}..."
