"""What the RabbitMQ transport writes and reads by itself, against pika's own encoding; and its pure decisions."""

from __future__ import annotations

import math
import struct
from typing import Any

import msgspec
import pika
import pytest
from ekiden.codec import FailureRecord
from ekiden.errors import BrokerRefused
from ekiden.execution import dead_letter
from ekiden.message import Delivery, Message, unsendable
from ekiden_rabbitmq import encoding, frames
from ekiden_rabbitmq.credit import shares
from ekiden_rabbitmq.publishing import Parcel, ToQueue, ToTopic
from ekiden_rabbitmq.sources import Arrival, Source, Sources, Subscription
from ekiden_rabbitmq.wire import WireConnection
from hypothesis import given
from hypothesis import strategies as st
from pika import spec
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.frame import Body, Header, Method, decode_frame

COUNTERS = ("x-delivery-count", "x-acquired-count")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.one_of(
    texts,
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
)
messages = st.builds(
    Message,
    st.one_of(texts.filter(lambda text: text and "\0" not in text), st.just("long " * 100)),
    st.just("queue"),
    st.binary(max_size=100),
    st.dictionaries(texts, values, max_size=5),
    st.integers(0, 9),
    st.one_of(st.none(), st.floats(0, 2e9)),
)


# Messages and properties.


@given(messages, st.integers(0, 100), st.booleans())
def test_a_message_comes_back_as_it_was(message: Message, hand_outs: int, lap: bool) -> None:
    properties = encoding.encode(message, hand_outs=hand_outs, lap=lap)

    arrived = encoding.decode(properties, message.body, "queue", priority=message.priority, counters=COUNTERS)

    assert arrived == encoding.Arrived(message, hand_outs, counted=False, lap=lap)
    assert [type(value) for value in arrived.message.headers.values()] == [
        type(value) for value in message.headers.values()
    ]


@given(messages)
def test_pika_reads_our_properties(message: Message) -> None:
    read = pika.BasicProperties().decode(encoding.encode(message, hand_outs=3))

    assert read.delivery_mode == 2
    assert read.priority == message.priority
    assert read.headers["ekiden-handouts"] == 3
    assert read.message_id == (message.id if len(message.id.encode()) <= 255 else "")


@pytest.mark.parametrize(
    ("headers", "earlier", "counted"),
    [
        ({}, 0, False),
        ({"x-delivery-count": 0}, 0, True),
        ({"x-delivery-count": 2}, 2, True),
        ({"x-delivery-count": 1, "x-acquired-count": 4}, 4, True),
        ({"x-delivery-count": 2, "x-death": [{"count": 1, "reason": "expired"}]}, 2, True),
    ],
)
def test_the_servers_count_is_added_to_our_own(headers: dict[str, Any], earlier: int, counted: bool) -> None:
    message = Message("id", "queue", b"body", {"kind": "x"}, 4)
    properties = pika.BasicProperties().decode(encoding.encode(message, hand_outs=10))
    properties.headers.update(headers)

    arrived = encoding.decode(b"".join(properties.encode()), b"body", "queue", priority=4, counters=COUNTERS)

    assert arrived == encoding.Arrived(message, 10 + earlier, counted, lap=False)


def test_a_message_of_another_program_is_delivered_with_what_a_header_can_hold() -> None:
    properties = pika.BasicProperties(
        content_type="text/plain",
        content_encoding="utf-8",
        headers={
            "text": "Grüße",
            "number": -7,
            "large": 2**40,
            "true": True,
            "nothing": None,
            "table": {"a": 1},
            "list": [1, 2],
            "x-delivery-count": 1,
        },
        priority=7,
        correlation_id="correlation",
        reply_to="somewhere",
        expiration="1000",
        message_id="theirs",
        timestamp=1,
        type="t",
        app_id="a",
    )

    arrived = encoding.decode(b"".join(properties.encode()), b"body", "queue", priority=4, counters=COUNTERS)

    assert arrived.message == Message(
        "theirs",
        "queue",
        b"body",
        {"text": "Grüße", "number": -7, "large": 2**40, "true": True, "nothing": None},
        7,
    )
    assert arrived.earlier == 1


def test_every_type_of_a_header_is_read_or_passed_over() -> None:
    entries = {
        "b": (b"b\xff", -1),
        "B": (b"B\xff", 255),
        "s": (b"s\xff\xfe", -2),
        "u": (b"u\xff\xfe", 65534),
        "i": (b"i\xff\xff\xff\xff", 2**32 - 1),
        "f": (b"f" + struct.pack(">f", 0.5), 0.5),
        "d": (b"d" + struct.pack(">d", 0.1), 0.1),
        "T": (b"T" + struct.pack(">Q", 10**9), 10**9),
        "x": (b"x\0\0\0\2hi", "hi"),
        "not text": (b"x\0\0\0\1\xff", None),
        "decimal": (b"D\1\0\0\0\5", None),
        "array": (b"A\0\0\0\2t\1", None),
        "last": (b"t\0", False),
    }
    table = b"".join(b"%c%b%b" % (len(name), name.encode(), data) for name, (data, _) in entries.items())
    properties = struct.pack(">HI", 0x2000, len(table)) + table

    headers = encoding.decode(properties, b"", "queue", priority=4, counters=()).message.headers

    assert dict(headers) == {name: value for name, (_, value) in entries.items() if value is not None}


def test_a_message_without_an_id_gets_one_of_its_own() -> None:
    ids = {encoding.decode(b"\0\0", b"", "queue", priority=4, counters=()).message.id for _ in range(10)}

    assert len(ids) == 10
    assert all(ids)


@given(st.binary(max_size=60))
def test_whatever_arrives_is_delivered(properties: bytes) -> None:
    assert_is_harmless(properties)


anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
carried = st.one_of(
    st.binary(max_size=30),
    anything.map(msgspec.json.encode),
    st.fixed_dictionaries({}, optional={"headers": anything, "due": anything, "id": anything}).map(msgspec.json.encode),
)
names = st.sampled_from(["ekiden", "ekiden-handouts", "ekiden-lap", *COUNTERS]) | st.text(max_size=5)
entry_types = st.sampled_from([b"S", b"x", b"l", b"L", b"d", b"f", b"t", b"V", b"T", b"I", b"D", b"A", b"F", b"?"])


@given(st.dictionaries(names, st.tuples(entry_types, carried | st.binary(min_size=8, max_size=8)), max_size=5))
def test_whatever_headers_arrive_are_delivered(entries: dict[str, tuple[bytes, bytes]]) -> None:
    table = b""
    for name, (kind, data) in entries.items():
        encoded = name.encode(errors="surrogatepass")
        counted = struct.pack(">I", len(data)) + data if kind in b"SxAF" else data
        table += b"%c%b%b%b" % (len(encoded), encoded, kind, counted)

    assert_is_harmless(struct.pack(">HI", 0x2000, len(table)) + table)


def assert_is_harmless(properties: bytes) -> None:
    """What arrived so is a message that can be sent again, counted on, and buried."""
    arrived = encoding.decode(properties, b"body", "queue", priority=4, counters=COUNTERS)
    message = arrived.message
    assert message.body == b"body"
    assert unsendable(message) is None
    assert 0 <= arrived.earlier < 2**31
    assert message.due is None or 0 <= message.due < 1e12
    again = encoding.encode(message, hand_outs=arrived.earlier + 1, lap=arrived.lap)
    assert encoding.too_large(message, again, encoding.FRAME_BYTES, is_copy=True) is None
    failure = FailureRecord(type="builtins.ValueError", message="\x01" * 10_000)
    dead = dead_letter(Delivery(message, None, arrived.earlier + 1), failure, 1e9)
    assert encoding.too_large(dead, encoding.encode(dead), encoding.FRAME_BYTES) is None


LARGE = {
    "one header": {"a": "x" * 130_000},
    "many headers": {f"name {number}": number for number in range(8000)},
    "what grows as JSON": {"a": "\x01" * 60_000, "b": "small"},
    "headers of ekiden's": {"ekiden-dead-error": "x" * 100_000, "a": "x" * 20_000},
    "names that are long": {f"{number:03}{'n' * 252}": 1 for number in range(480)},
}


@pytest.mark.parametrize("headers", LARGE.values(), ids=LARGE)
def test_of_headers_that_cannot_be_sent_again_the_small_ones_arrive(headers: dict[str, Any]) -> None:
    table = b"".join(b"%c%b%b" % (len(name), name.encode(), _amqp_value(value)) for name, value in headers.items())
    properties = struct.pack(">HI", 0x2000, len(table)) + table

    assert_is_harmless(properties)

    arrived = encoding.decode(properties, b"body", "queue", priority=4, counters=COUNTERS).message.headers
    assert arrived.items() <= headers.items()
    assert "b" not in headers or arrived["b"] == "small"


def _amqp_value(value: str | int) -> bytes:
    if isinstance(value, int):
        return b"l" + struct.pack(">q", value)
    return b"S" + struct.pack(">I", len(value.encode())) + value.encode()


@pytest.mark.parametrize(
    ("headers", "attempt"),
    [
        ({"ekiden-handouts": 2**63 - 1}, encoding.MOST_HAND_OUTS),
        ({"ekiden-handouts": 2**63 - 1, "x-delivery-count": 2**63 - 1}, encoding.MOST_HAND_OUTS),
        ({"ekiden-handouts": -5}, 0),
        ({"x-delivery-count": -(2**63), "ekiden-handouts": 3}, 3),
        ({"ekiden-handouts": True}, 0),
        ({"x-delivery-count": "7"}, 0),
        ({"x-delivery-count": None, "ekiden-handouts": [7]}, 0),
    ],
)
def test_counts_that_cannot_be_are_bounded(headers: dict[str, Any], attempt: int) -> None:
    properties = b"".join(pika.BasicProperties(headers=headers).encode())

    assert encoding.decode(properties, b"", "queue", priority=4, counters=COUNTERS).earlier == attempt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"headers":{"list":[1],"kind":"x"}}', Message("mine", "queue", b"", {"kind": "x"})),
        ('{"headers":[1],"due":5}', Message("mine", "queue", b"", {}, due=5.0)),
        ('{"due":"soon","id":7}', Message("mine", "queue", b"")),
        ('{"due":1e308}', Message("mine", "queue", b"", due=encoding.LATEST_DUE)),
        ('{"due":-1e308}', Message("mine", "queue", b"", due=0.0)),
        ("[" * 100_000, Message("mine", "queue", b"")),
        ('{"id":"a\\u0000b"}', Message("ab", "queue", b"")),
        ("null", Message("mine", "queue", b"")),
    ],
)
def test_a_header_of_ours_that_another_wrote_is_read_as_far_as_it_goes(text: str, expected: Message) -> None:
    properties = b"".join(pika.BasicProperties(headers={"ekiden": text}, message_id="mine").encode())

    assert encoding.decode(properties, b"", "queue", priority=4, counters=COUNTERS).message == expected


def test_a_message_that_is_just_small_enough_arrives_whole() -> None:
    largest = encoding.LARGEST_HEADERS_BYTES - len('{"a":""}') - 100
    message = Message("i" * 300, "queue", b"", {"a": "x" * largest}, due=1e9 + 0.5)
    properties = encoding.encode(message)

    assert encoding.too_large(message, properties, encoding.FRAME_BYTES) is None
    assert encoding.decode(properties, b"", "queue", priority=4, counters=COUNTERS).message == message


@pytest.mark.parametrize("frame_max", [4096, 65_536, encoding.FRAME_BYTES])
def test_what_no_frame_carries_is_refused_and_what_one_carries_can_be_buried(frame_max: int) -> None:
    for size in range(0, 2 * frame_max, frame_max // 16):
        message = Message("id", "queue", b"", {"a": "x" * size})
        properties = encoding.encode(message)

        refused = encoding.too_large(message, properties, frame_max)

        assert refused is not None or len(properties) + encoding.OVERHEAD_BYTES <= frame_max - frame_max // 16
        assert (refused is None) is (size < frame_max * 14 // 16)


def test_an_id_that_is_too_long_is_refused_and_told_in_part() -> None:
    with pytest.raises(BrokerRefused, match="its id takes 5000 bytes") as caught:
        encoding.encode(Message("\n" + "i" * 4999, "queue", b""))

    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


WRONG: dict[str, Message] = {
    "an id of a number": Message(7, "queue", b""),  # type: ignore[arg-type]
    "a due of text": Message("id", "queue", b"", due="soon"),  # type: ignore[arg-type]
    "a due beyond floats": Message("id", "queue", b"", due=10**400),
    "due never": Message("id", "queue", b"", due=math.inf),
    "due at no time": Message("id", "queue", b"", due=math.nan),
    "a priority of a fraction": Message("id", "queue", b"", priority=4.5),  # type: ignore[arg-type]
    "a priority of text": Message("id", "queue", b"", priority="4"),  # type: ignore[arg-type]
    "a header of endless digits": Message("id", "queue", b"", {"a": 10**5000}),
    "a queue of a number": Message("id", 7, b""),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", WRONG.values(), ids=WRONG)
def test_a_message_that_is_none_is_refused_by_itself(message: Message) -> None:
    parcel = Parcel(ToQueue(message))

    assert isinstance(parcel.error, BrokerRefused)
    assert parcel.is_answered


def test_a_payload_is_bytes() -> None:
    assert isinstance(Parcel(ToTopic("topic", "text")).error, BrokerRefused)  # type: ignore[arg-type]


@pytest.mark.parametrize("message", [Message("\ud800", "queue", b""), Message("id", "queue", b"", {"h": "\ud800"})])
def test_text_that_is_no_text_is_refused(message: Message) -> None:
    with pytest.raises(BrokerRefused, match="cannot be encoded"):
        encoding.encode(message)


# Frames.


@pytest.mark.parametrize("size", [0, 1, 100, 4096 - 8, 4096, 20_000])
def test_pika_reads_what_we_publish(size: int) -> None:
    message = Message("id", "queue", bytes(size), {"kind": "x"})
    properties = encoding.encode(message)

    data = b"".join(frames.publish(3, b"exchange", b"key", properties, message.body, mandatory=True, frame_max=4096))

    method, header, *parts = all_frames(data)
    assert isinstance(method.method, spec.Basic.Publish)
    assert (method.method.exchange, method.method.routing_key, method.method.mandatory) == ("exchange", "key", True)
    assert header.body_size == size
    assert header.properties.message_id == "id"
    assert b"".join(part.fragment for part in parts) == message.body
    assert len(parts) == math.ceil(size / (4096 - 8))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (frames.ack(3, 2**40), spec.Basic.Ack(2**40, multiple=False)),
        (frames.ack(3, 7, multiple=True), spec.Basic.Ack(7, multiple=True)),
        (frames.get(3, "größe".encode()), spec.Basic.Get(queue="größe", no_ack=False)),
        (frames.barrier(3), spec.Channel.Flow(active=True)),
        (frames.put_back(3, 2**40), spec.Basic.Nack(2**40, multiple=False, requeue=True)),
    ],
)
def test_pika_reads_our_other_methods(data: bytes, expected: Any) -> None:
    (method,) = all_frames(data)

    assert method.channel_number == 3
    assert method.method == expected


def test_we_read_what_pika_writes() -> None:
    deliver = arguments(spec.Basic.Deliver("tag", 2**40, redelivered=True, exchange="e", routing_key="k"))
    returned = arguments(spec.Basic.Return(312, "NO_ROUTE", "exchange", "key"))
    got = arguments(spec.Basic.GetOk(5, redelivered=False, exchange="", routing_key="k", message_count=1))

    assert frames.delivered(deliver) == (b"tag", 2**40, True)
    assert frames.returned(returned) == (312, b"exchange", b"key")
    assert frames.got(got) == (5, False)
    assert frames.confirmed(arguments(spec.Basic.Ack(9, multiple=True))) == (9, True)
    assert frames.confirmed(arguments(spec.Basic.Nack(9, multiple=False))) == (9, False)


class Recorder:
    """A channel that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def content(self, method: int, arguments: bytes, properties: bytes, body: bytes) -> None:
        self.told.append((method, frames.delivered(arguments)[1], properties, body))

    def confirm_arrived(self, method: int, arguments: bytes) -> None:
        self.told.append((method, *frames.confirmed(arguments)))

    def burst_ended(self) -> None:
        self.told.append("end")


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_contents_are_read_however_they_are_cut(sizes: list[int], cuts: list[int]) -> None:
    properties = encoding.encode(Message("id", "queue", b"", {"kind": "x"}))
    data, expected = b"", []
    for number, size in enumerate(sizes, start=1):
        body = bytes([number]) * size
        data += delivery(number, properties, body) + Method(1, spec.Basic.Ack(number, multiple=False)).marshal()
        expected += [(frames.BASIC_DELIVER, number, properties, body), (frames.BASIC_ACK, number, False)]
    reader, connection = Recorder(), a_connection()
    connection.readers[1] = reader

    for piece in in_pieces(data, cuts):
        connection._on_data_available(piece)

    assert [what for what in reader.told if what != "end"] == expected
    assert reader.told[-1] == "end"
    assert connection.bytes_received == len(data)


def test_what_arrives_together_is_told_as_one_burst() -> None:
    properties = encoding.encode(Message("id", "queue", b""))
    reader, connection = Recorder(), a_connection()
    connection.readers[1] = reader

    connection._on_data_available(b"".join(delivery(number, properties, b"x") for number in range(1, 101)))

    assert reader.told.count("end") == 1
    assert len(reader.told) == 101


def all_frames(data: bytes) -> list[Any]:
    found = []
    while data:
        length, frame = decode_frame(data)
        found.append(frame)
        data = data[length:]
    return found


def arguments(method: Any) -> bytes:
    """The payload of a method's frame, as the wire hands it on."""
    return bytes(Method(1, method).marshal()[7:-1])


def delivery(number: int, properties: bytes, body: bytes) -> bytes:
    """A delivery as a server sends it, in frames of at most 128 bytes."""
    data = Method(1, spec.Basic.Deliver("tag", number, redelivered=False, exchange="", routing_key="k")).marshal()
    header = Header(1, len(body), pika.BasicProperties().decode(properties)).marshal()
    parts = [Body(1, body[begin : begin + 120]).marshal() for begin in range(0, len(body), 120)]
    return bytes(b"".join([data, header, *parts]))


def in_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    pieces, turn = [], 0
    while data:
        cut = cuts[turn % len(cuts)]
        pieces.append(data[:cut])
        data, turn = data[cut:], turn + 1
    return pieces


def a_connection() -> WireConnection:
    """One that is connected to nothing."""
    loop = IOLoop()
    nbio = SelectorIOServicesAdapter(loop)
    connection = WireConnection(pika.ConnectionParameters(), nbio, failed=lambda error: None)
    loop.close()
    return connection


# Credits.


@pytest.mark.parametrize(
    ("room", "waiting", "strict", "expected"),
    [
        pytest.param(512, [[0]], False, [[512]], id="one source gets all of it"),
        pytest.param(10, [[10, 10, 10, 0]], False, [[10, 1, 1, 1]], id="the most urgent band comes first"),
        pytest.param(10, [[3, 10, 10]], False, [[3, 7, 1]], id="the next band gets what is left"),
        pytest.param(8, [[200], [0], [20]], False, [[4], [1], [4]], id="queues share, idle ones may have one"),
        pytest.param(10, [[100], [2], [100]], False, [[4], [2], [4]], id="what one queue does not need is the others'"),
        pytest.param(10, [[30], [30]], True, [[10], [1]], id="in strict order the first queue comes first"),
        pytest.param(10, [[0], [30]], True, [[1], [10]], id="and the second when the first has nothing"),
        pytest.param(100, [[3, 0], [2, 0]], False, [[51, 1], [49, 1]], id="the rest goes where something waits"),
        pytest.param(0, [[5], [5]], False, [[1], [1]], id="each may have one"),
    ],
)
def test_shares_of_a_window(room: int, waiting: list[list[int]], strict: bool, expected: list[list[int]]) -> None:
    assert shares(room, waiting, strict=strict) == expected


@given(
    st.integers(0, 1000),
    st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=10), min_size=1, max_size=5),
    st.booleans(),
)
def test_shares_use_the_room_and_exceed_it_by_one_for_each_source(
    room: int, waiting: list[list[int]], strict: bool
) -> None:
    found = shares(room, waiting, strict=strict)

    credits_of = [credit for bands in found for credit in bands]
    assert [len(bands) for bands in found] == [len(bands) for bands in waiting]
    assert min(credits_of) >= 1
    assert room <= sum(credits_of) <= room + len(credits_of)


# What is taken, in which order.


class Shop:
    """Sources with parked deliveries, whose bodies say where they come from."""

    def __init__(self, *queues: str, strict: bool = False) -> None:
        self.sources = Sources(queues, strict=strict)
        self._numbers = 0

    def park(self, queue: str, priority: int, count: int, *, credit: int = 100, expects: int = 0) -> Source:
        source = Source(queue, priority, f"{queue}.{priority}")
        source.subscription = Subscription(source, "tag", credit, expects)
        for _ in range(count):
            self._numbers += 1
            channel: Any = None
            body = f"{queue}{priority}".encode()
            arrival = Arrival(source.subscription, channel, self._numbers, False, b"", body)
            source.arrived(arrival)
            source.parked.append(arrival)
        self.sources.add(source)
        return source

    def take(self, most: int, *, verified: bool = False) -> list[str]:
        return [arrival.body.decode() for arrival in self.sources.take(most, verified=verified)]


def test_the_most_urgent_band_is_taken_first() -> None:
    shop = Shop("a")
    shop.park("a", 4, 2)
    shop.park("a", 9, 2)
    shop.park("a", 0, 2)

    assert shop.take(10) == ["a9", "a9", "a4", "a4", "a0", "a0"]


@pytest.mark.parametrize(("credit", "expects"), [(2, 0), (100, 3)], ids=["full", "settling in"])
def test_a_band_that_may_have_more_bars_the_less_urgent_ones(credit: int, expects: int) -> None:
    shop = Shop("a", "b")
    shop.park("a", 9, 2, credit=credit, expects=expects)
    shop.park("a", 4, 2)
    shop.park("b", 4, 1)

    assert shop.take(10) == ["a9", "a9", "b4"]


def test_queues_are_served_in_turn() -> None:
    shop = Shop("a", "b")
    shop.park("a", 4, 6)
    shop.park("b", 4, 6)

    assert [shop.take(2) for _ in range(4)] == [["a4", "a4"], ["b4", "b4"], ["a4", "a4"], ["b4", "b4"]]


def test_in_strict_order_a_later_queue_is_served_when_the_first_is_known_to_be_empty() -> None:
    shop = Shop("a", "b", strict=True)
    first = shop.park("a", 4, 1)
    shop.park("b", 9, 2)

    assert shop.take(10) == ["a4"]
    assert shop.take(10) == []
    assert first.subscription is not None
    first.subscription.expects = 2
    assert shop.take(10, verified=True) == []
    first.subscription.expects = 1
    assert shop.take(10, verified=True) == ["b9", "b9"]
