"""What is published is what is delivered, byte for byte, and each message gets an answer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ekiden.errors import BrokerRefused
from ekiden.message import DUPLICATE, STORED, HeaderValue, Message, PublishOutcome, new_id
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, bodies, ids, numbered, settle
from ekiden.times import LATEST_TIME
from ekiden.transport import Transport, TransportDescription

HEADERS: dict[str, HeaderValue] = {
    "text": "plain",
    "empty": "",
    "unicode": "Grüße, 世界 \N{ROCKET} \x00 end",
    "naïve key": "with a space and an accent",
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "beyond the doubles": 2**53 + 1,
    "zero": 0,
    "fraction": 0.1,
    "true": True,
    "false": False,
    "nothing": None,
}

BODIES = {
    "nothing": b"",
    "one byte": b"\x00",
    "every byte": bytes(range(256)),
    "what looks like text": '{"unicode": "Grüße 世界"}'.encode(),
    "a megabyte": bytes(range(256)) * 4096,
}

QUEUE_NAMES = {
    "200 characters": "q" * 200,
    "one character": "q",
    "punctuation": "a.b-c_d:e",
    "slashes": "a/b//c",
    "spaces": "a b  c ",
    "a pattern": "a*[b]?{c}%_",
    "quotes": "a'b\"c`d",
    "of a URL": "a?b=c&d#e@f%20",
    "unicode": "größe-世界",
    "upper case": "QUEUE",
    "an underscore first": "_queue",
}

UNSENDABLE: dict[str, Callable[[str], Message]] = {
    "a name of 201 characters": lambda queue: a_message("q" * 201),
    "no name": lambda queue: a_message(""),
    "a line break in its name": lambda queue: a_message("a\nb"),
    "priority 10": lambda queue: a_message(queue, priority=10),
    "priority -1": lambda queue: a_message(queue, priority=-1),
    "a body of text": lambda queue: Message(new_id(), queue, "text"),  # type: ignore[arg-type]
    "priority 4.5": lambda queue: a_message(queue, priority=4.5),  # type: ignore[arg-type]
    "priority true": lambda queue: a_message(queue, priority=True),
    "due at no time": lambda queue: Message(new_id(), queue, b"", due=math.nan),
    "due at infinity": lambda queue: Message(new_id(), queue, b"", due=math.inf),
    "due before all time": lambda queue: Message(new_id(), queue, b"", due=-math.inf),
    "due in the year 3001": lambda queue: Message(new_id(), queue, b"", due=LATEST_TIME + 366 * 86_400),
    "due at the largest number": lambda queue: Message(new_id(), queue, b"", due=1.7e308),
    "due at a huge integer": lambda queue: Message(new_id(), queue, b"", due=10**400),
    "due before 1970": lambda queue: Message(new_id(), queue, b"", due=-1.0),
    "due at true": lambda queue: Message(new_id(), queue, b"", due=True),
    "due at a text": lambda queue: Message(new_id(), queue, b"", due="soon"),  # type: ignore[arg-type]
    "a header that is no number": lambda queue: a_message(queue, headers={"x": math.nan}),
    "a header of infinity": lambda queue: a_message(queue, headers={"x": -math.inf}),
    "a header of 65 bits": lambda queue: a_message(queue, headers={"x": 2**63}),
    "a header of a list": lambda queue: a_message(queue, headers={"list": ["x"]}),  # type: ignore[dict-item]
    "a header of a surrogate": lambda queue: a_message(queue, headers={"x": "caf\udce9"}),
    "a header under a surrogate": lambda queue: a_message(queue, headers={"caf\udce9": "x"}),
    "a header under a number": lambda queue: a_message(queue, headers={5: "x"}),  # type: ignore[dict-item]
    "a header of bytes": lambda queue: a_message(queue, headers={"x": b"x"}),  # type: ignore[dict-item]
    "no id": lambda queue: Message("", queue, b""),
    "an id of a surrogate": lambda queue: Message("caf\udce9", queue, b""),
    "an id of a zero byte": lambda queue: Message("a\0b", queue, b""),
    "an id that is a number": lambda queue: Message(5, queue, b""),  # type: ignore[arg-type]
    "a name of a surrogate": lambda queue: Message(new_id(), "caf\udce9", b""),
    "a name that is none": lambda queue: Message(new_id(), None, b""),  # type: ignore[arg-type]
}


class Messages(TransportFixtures):
    """Contents, headers, names, ids and answers."""

    def test_a_message_arrives_as_it_was_published(self, transport: Transport, queue: str) -> None:
        message = a_message(queue, b"hello", headers={"kind": "greeting"}, priority=7)

        answers = transport.publish([message])

        assert answers == [STORED]
        delivery = self.collect_one(self.consume(transport, queue))
        assert delivery.message == message
        assert delivery.attempt == 1

    @pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
    def test_every_body_arrives_unchanged(self, transport: Transport, queue: str, body: bytes) -> None:
        transport.publish([a_message(queue, body)])

        delivery = self.collect_one(self.consume(transport, queue))

        assert type(delivery.message.body) is bytes
        assert delivery.message.body == body

    @pytest.mark.parametrize("name", HEADERS)
    def test_every_header_arrives_with_its_type(self, transport: Transport, queue: str, name: str) -> None:
        transport.publish([a_message(queue, headers={name: HEADERS[name]})])

        headers = self.collect_one(self.consume(transport, queue)).message.headers

        assert dict(headers) == {name: HEADERS[name]}
        assert type(headers[name]) is type(HEADERS[name])

    def test_many_headers_arrive_together(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue, headers=HEADERS)])

        assert dict(self.collect_one(self.consume(transport, queue)).message.headers) == HEADERS

    def test_changing_the_headers_afterwards_changes_no_message(self, transport: Transport, queue: str) -> None:
        headers: dict[str, HeaderValue] = {"kind": "first"}
        transport.publish([a_message(queue, headers=headers)])

        headers["kind"] = "second"

        assert dict(self.collect_one(self.consume(transport, queue)).message.headers) == {"kind": "first"}

    @pytest.mark.parametrize("name", QUEUE_NAMES.values(), ids=QUEUE_NAMES)
    def test_every_legal_name_is_a_queue_of_its_own(self, transport: Transport, name: str) -> None:
        neighbour = name[:-1] + "!"
        transport.publish([a_message(name, b"mine"), a_message(neighbour, b"the neighbour's")])

        consumer = self.consume(transport, name)

        assert bodies(self.collect(consumer, 1)) == [b"mine"]
        self.assert_nothing_comes(consumer, within=0.05)
        assert self.collect_one(self.consume(transport, neighbour)).message.queue == neighbour

    def test_publishing_nothing_is_answered_with_nothing(self, transport: Transport) -> None:
        assert transport.publish([]) == []

    def test_a_batch_for_several_queues_is_answered_one_by_one(self, transport: Transport, queue: str) -> None:
        messages = [a_message(f"{queue}-{number % 5}", b"%d" % number) for number in range(500)]

        answers = transport.publish(messages)

        assert answers == [STORED] * 500
        for number in range(5):
            consumer = self.consume(transport, f"{queue}-{number}")
            assert bodies(self.collect(consumer, 100)) == [b"%d" % n for n in range(number, 500, 5)]

    @pytest.mark.parametrize("spoil", UNSENDABLE.values(), ids=UNSENDABLE)
    def test_a_message_that_no_broker_carries_does_not_spoil_its_batch(
        self, transport: Transport, queue: str, spoil: Callable[[str], Message]
    ) -> None:
        good = numbered(queue, 20)

        answers = transport.publish([*good[:10], spoil(queue), *good[10:]])

        assert [answer.outcome for answer in answers[:10] + answers[11:]] == [PublishOutcome.STORED] * 20
        assert answers[10].outcome is PublishOutcome.FAILED
        assert isinstance(answers[10].error, BrokerRefused)
        assert ids(self.collect(self.consume(transport, queue), 20)) == [message.id for message in good]

    def test_an_id_that_the_queue_holds_is_a_duplicate(
        self, transport: Transport, description: TransportDescription, queue: str
    ) -> None:
        message = a_message(queue, b"first")
        again = a_message(queue, b"second", id=message.id)
        second_answer = DUPLICATE if description.names_duplicates else STORED

        answers = [*transport.publish([message]), *transport.publish([a_message(queue, b"other"), again])]

        assert answers == [STORED, STORED, second_answer]
        stored = [b"first", b"other"] if description.names_duplicates else [b"first", b"other", b"second"]
        assert bodies(self.collect(self.consume(transport, queue), len(stored))) == stored

    def test_an_id_twice_in_one_batch_is_a_duplicate(
        self, transport: Transport, description: TransportDescription, queue: str
    ) -> None:
        message = a_message(queue)

        answers = transport.publish([message, message])

        assert answers == [STORED, DUPLICATE if description.names_duplicates else STORED]

    @pytest.mark.parametrize("where", ["delayed", "leased"])
    def test_an_id_is_a_duplicate_while_its_message_is(
        self, transport: Transport, description: TransportDescription, queue: str, where: str
    ) -> None:
        message = a_message(queue, due_in=3600 if where == "delayed" else None)
        transport.publish([message])
        if where == "leased":
            self.collect_one(self.consume(transport, queue))

        answers = transport.publish([a_message(queue, id=message.id)])

        assert answers == [DUPLICATE if description.names_duplicates else STORED]

    def test_an_id_is_free_in_another_queue(self, transport: Transport, queue: str) -> None:
        message = a_message(queue, b"here")

        answers = transport.publish([message, a_message(f"{queue}.dead", b"there", id=message.id)])

        assert answers == [STORED, STORED]
        assert bodies([self.collect_one(self.consume(transport, f"{queue}.dead"))]) == [b"there"]

    def test_an_id_is_free_again_once_its_message_is_settled(self, transport: Transport, queue: str) -> None:
        message = a_message(queue)
        transport.publish([message])
        consumer = self.consume(transport, queue)
        settle(consumer, [self.collect_one(consumer)])

        answers = transport.publish([message])

        assert answers == [STORED]
        assert ids([self.collect_one(consumer)]) == [message.id]

    def test_an_id_is_free_again_once_its_message_is_purged(self, transport: Transport, queue: str) -> None:
        messages = [a_message(queue), a_message(queue, due_in=3600)]
        transport.publish(messages)
        transport.purge(queue)

        answers = transport.publish(messages)

        assert answers == [STORED, STORED]

    def test_a_reply_that_nobody_waits_for_is_dropped(self, transport: Transport, queue: str) -> None:
        reply_queue = f"reply.{queue}"

        answers = transport.publish([a_message(reply_queue), a_message(queue)])

        assert answers == [STORED, STORED]
        self.assert_depth(transport, reply_queue, ready=0)
        self.assert_nothing_comes(self.consume(transport, reply_queue))

    def test_a_reply_reaches_who_waits_for_it(self, transport: Transport, other: Transport, queue: str) -> None:
        reply_queue = f"reply.{queue}"
        consumer = self.consume(transport, reply_queue)

        other.publish([a_message(reply_queue, b"answer")])

        delivery = self.collect_one(consumer)
        assert delivery.message.body == b"answer"
        assert settle(consumer, [delivery])
