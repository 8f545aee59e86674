"""The names and arguments of what is made at a RabbitMQ server, by its version, and where delayed messages go."""

from collections.abc import Sequence

import pytest
from ekiden.message import MAX_QUEUE_NAME_LENGTH
from ekiden_rabbitmq.delays import (
    LEVELS,
    LONGEST_UNITS,
    STRANDED,
    UNIT_SECONDS,
    Delays,
    Route,
    delays_of,
    units_of,
    word_of,
)
from ekiden_rabbitmq.options import RabbitMQOptions
from ekiden_rabbitmq.topology import (
    BindExchange,
    BindQueue,
    DeclareExchange,
    DeclareQueue,
    Next,
    Step,
    Topology,
    after_looking,
    after_making,
    is_temporary,
    queue_name,
    shortened,
    topic_key,
)
from ekiden_rabbitmq.versions import OLDEST_SUPPORTED, TABLE, differences_of, server_in
from hypothesis import given
from hypothesis import strategies as st

RUN = differences_of((3, 10, 8))
queues = st.text(min_size=1, max_size=MAX_QUEUE_NAME_LENGTH).filter(str.isprintable)
priorities = st.integers(0, 9)


def topology(version: tuple[int, int, int] = (3, 10, 8), **options: object) -> Topology:
    return Topology(RabbitMQOptions(**options), differences_of(version))  # type: ignore[arg-type]


# Names.


@pytest.mark.parametrize(
    ("prefix", "queue", "priority", "expected"),
    [
        ("", "shop", 4, "shop"),
        ("", "shop", 9, "shop.priority.9"),
        ("", "shop", 0, "shop.priority.0"),
        ("test-", "shop", 4, "test-shop"),
        ("test-", "shop", 9, "test-shop.priority.9"),
        ("", "shop.priority.9", 4, "shop.priority.9.priority.4"),
        ("", "shop.priority.10", 4, "shop.priority.10"),
    ],
)
def test_a_queue_has_its_own_name_and_a_band_tells_its_priority(
    prefix: str, queue: str, priority: int, expected: str
) -> None:
    assert queue_name(prefix, queue, priority) == expected


look_alikes = st.sampled_from(["shop", "shop.priority.9", "shop.priority.4", "shop.priority.9.priority.4", "a" * 255])


@given(queues | look_alikes, priorities, queues | look_alikes, priorities)
@pytest.mark.slow
def test_no_two_bands_share_a_name(queue: str, priority: int, other: str, other_priority: int) -> None:
    same = (queue, priority) == (other, other_priority)

    assert (queue_name("", queue, priority) == queue_name("", other, other_priority)) is same


@given(queues, priorities)
def test_every_name_fits_into_amqp(queue: str, priority: int) -> None:
    assert len(queue_name("p" * 100, queue, priority).encode()) <= 255


def test_a_name_that_is_too_long_keeps_its_beginning_and_its_end() -> None:
    queue = "\N{ROCKET}" * 200

    name = queue_name("", queue, 9)

    assert name.startswith("\N{ROCKET}" * 20)
    assert name.endswith(".priority.9")
    assert name != queue_name("", queue[:-1] + "x", 9)


@pytest.mark.parametrize("name", ["q" * 254, "q" * 255, "ü" * 64, "\N{ROCKET}" * 32])
def test_a_name_that_just_fits_stays_as_it_is(name: str) -> None:
    assert shortened(name) == name


@given(queues, priorities)
def test_what_a_server_says_of_a_name_has_no_more_bytes_than_it_can_send(queue: str, priority: int) -> None:
    """Beyond 255 bytes it cuts, by characters from 4.0 on, and ends the connection where these take more bytes."""
    name = queue_name("", queue, priority)

    said = f"ACCESS_REFUSED - configure access to queue '{name}' in vhost 'production' refused for user 'application'"

    assert name.isascii() or len(said.encode()) <= 255


@given(st.text(max_size=300), st.text(max_size=300))
def test_every_text_is_the_name_of_a_topic_of_its_own(one: str, other: str) -> None:
    keys = [topic_key(text) for text in (one, other)]

    assert all(len(key.encode()) <= 255 for key in keys)
    assert (keys[0] == keys[1]) is (one == other)


# Queues, by version and option.


@pytest.mark.parametrize(
    ("version", "queue_type", "expected"),
    [
        ((3, 7, 28), None, {}),
        ((3, 7, 28), "quorum", {}),
        ((3, 8, 0), None, {"x-queue-type": "quorum"}),
        ((3, 10, 8), None, {"x-queue-type": "quorum"}),
        ((3, 10, 8), "classic", {}),
        ((3, 13, 7), None, {"x-queue-type": "quorum"}),
        ((4, 0, 0), None, {"x-queue-type": "quorum", "x-delivery-limit": -1}),
        ((4, 3, 5), None, {"x-queue-type": "quorum", "x-delivery-limit": -1}),
        ((4, 3, 5), "classic", {}),
    ],
)
def test_a_queue_is_of_the_best_type_that_the_server_has_and_drops_nothing(
    version: tuple[int, int, int], queue_type: str | None, expected: dict[str, object]
) -> None:
    declared = topology(version, queue_type=queue_type).queue("shop")

    assert declared == DeclareQueue("shop", expected)  # type: ignore[arg-type]
    assert declared.durable


def test_a_queue_expires_where_the_url_says_so() -> None:
    assert topology(queue_expires=1.5).queue("shop").arguments["x-expires"] == 1500


@pytest.mark.parametrize("version", [(3, 10, 8), (4, 3, 0)])
def test_a_temporary_queue_is_durable_and_expires(version: tuple[int, int, int]) -> None:
    declared = topology(version, prefix="p-").queue("reply.7c41", 9)

    assert declared.name == "p-reply.7c41"
    assert declared.durable
    assert declared.arguments == {"x-queue-type": "classic", "x-expires": 60_000}
    assert is_temporary("reply.7c41")
    assert not is_temporary("replying")


def test_a_listener_has_a_bounded_queue_of_its_own() -> None:
    declared = topology().listener_queue()

    assert (declared.name, declared.exclusive, declared.auto_delete, declared.durable) == ("", True, True, False)
    assert declared.arguments == {"x-queue-type": "classic", "x-max-length": 10_000}


def test_exchanges_carry_the_prefix() -> None:
    assert topology(prefix="p-").topics == DeclareExchange("p-ekiden.topics", "direct")
    assert topology(prefix="p-").announcements == DeclareExchange("p-ekiden.announcements", "fanout")


@pytest.mark.parametrize(
    ("reply_code", "expected"), [(404, Next.MAKE), (403, Next.FAIL), (405, Next.FAIL), (406, Next.FAIL)]
)
def test_what_follows_a_look(reply_code: int, expected: Next) -> None:
    assert after_looking(reply_code) is expected


@pytest.mark.parametrize(
    ("reply_code", "reply_text", "expected"),
    [
        (406, "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/': ...", Next.ADOPT),
        (406, "PRECONDITION_FAILED - invalid arg 'x-expires' for queue 'q' in vhost '/': ...", Next.FAIL),
        (403, "ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'", Next.FAIL),
    ],
)
def test_what_follows_a_declaration_that_failed(reply_code: int, reply_text: str, expected: Next) -> None:
    assert after_making(reply_code, reply_text) is expected


# Versions.


@pytest.mark.parametrize(
    ("version", "since"),
    [
        ((0, 0, 0), (0, 0)),
        ((3, 7, 28), (0, 0)),
        ((3, 8, 0), (3, 8)),
        ((3, 9, 29), (3, 8)),
        ((3, 10, 0), (3, 10)),
        ((3, 13, 7), (3, 10)),
        ((4, 0, 0), (4, 0)),
        ((4, 2, 9), (4, 0)),
        ((4, 3, 0), (4, 3)),
        ((5, 0, 0), (4, 3)),
    ],
)
def test_a_version_has_the_last_line_that_it_reaches(version: tuple[int, int, int], since: tuple[int, int]) -> None:
    assert differences_of(version).since == since


def test_the_table_goes_upwards_and_knows_what_the_docs_support() -> None:
    assert [line.since for line in TABLE] == sorted({line.since for line in TABLE})
    assert any(line.since == OLDEST_SUPPORTED for line in TABLE)
    assert differences_of(OLDEST_SUPPORTED).quorum_time_to_live


@pytest.mark.parametrize(
    ("properties", "version", "text"),
    [
        ({"product": "RabbitMQ", "version": "3.10.8"}, (3, 10, 8), "RabbitMQ 3.10.8"),
        ({"product": "RabbitMQ", "version": "4.1.0-rc.2"}, (4, 1, 0), "RabbitMQ 4.1.0"),
        ({"product": "RabbitMQ", "version": "4.3.5+12.gabc"}, (4, 3, 5), "RabbitMQ 4.3.5"),
        ({"product": "LavinMQ", "version": "v2"}, (0, 0, 0), "LavinMQ 0.0.0"),
        ({}, (0, 0, 0), "AMQP broker 0.0.0"),
    ],
)
def test_a_server_tells_its_version(properties: dict[str, object], version: tuple[int, int, int], text: str) -> None:
    server = server_in(properties)

    assert server.version == version
    assert server.text == text
    assert server.differences is differences_of(version)


# Delays. The server's part is played here by what the steps say; test_rabbitmq_delays.py asks a real one.


class Virtual:
    """A virtual host in which the steps were carried out: says how long a message rests, and where it ends."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.queues = {step.name: step for step in steps if isinstance(step, DeclareQueue)}
        self.exchanges = {step.name: step for step in steps if isinstance(step, DeclareExchange)}
        self.bindings = [step for step in steps if isinstance(step, BindQueue | BindExchange)]

    def follow(self, exchange: str, routing_key: str) -> tuple[int, list[str], str]:
        """Milliseconds in all, the queues where it rested, and the queue where it stays."""
        waited, rested = 0, []
        while True:
            (queue,) = self.routed(exchange, routing_key)
            dead_letters_to = (
                self.queues[queue].arguments.get("x-dead-letter-exchange") if queue in self.queues else None
            )
            if dead_letters_to is None:
                return waited, rested, queue
            waited += int(self.queues[queue].arguments["x-message-ttl"])
            rested.append(queue)
            exchange = str(dead_letters_to)

    def routed(self, exchange: str, routing_key: str) -> list[str]:
        found = []
        for binding in self.bindings:
            source = binding.source if isinstance(binding, BindExchange) else binding.exchange
            if source == exchange and self.matches(exchange, binding.routing_key, routing_key):
                found += (
                    self.routed(binding.destination, routing_key)
                    if isinstance(binding, BindExchange)
                    else [binding.queue]
                )
        alternate = self.exchanges[exchange].arguments.get("alternate-exchange")
        return self.routed(str(alternate), routing_key) if not found and alternate else found

    def matches(self, exchange: str, pattern: str, key: str) -> bool:
        return self.exchanges[exchange].kind == "fanout" or topic_matches(pattern.split("."), key.split("."))


def topic_matches(pattern: list[str], words: list[str]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(topic_matches(pattern[1:], words[begin:]) for begin in range(len(words) + 1))
    return bool(words) and pattern[0] in {"*", words[0]} and topic_matches(pattern[1:], words[1:])


TARGETS = ["shop", "a.b.*.#", "shop.priority.9", "*"]


def all_levels(quorum: bool) -> Virtual:
    delays = Delays(quorum, RUN)
    steps = delays.foundation()
    for level in range(LEVELS):
        steps += delays.level(level)
    return Virtual([*steps, *map(delays.target, TARGETS)])


WHOLE = {quorum: all_levels(quorum) for quorum in (True, False)}


@given(st.integers(1, LONGEST_UNITS), st.sampled_from(TARGETS), st.booleans())
def test_a_message_rests_as_long_as_it_shall_and_reaches_its_queue(units: int, queue: str, quorum: bool) -> None:
    route = Delays(quorum, RUN).route(queue, units * UNIT_SECONDS)

    assert route is not None
    assert not route.further
    waited, rested, arrived = WHOLE[quorum].follow(route.exchange, route.routing_key)
    assert waited == units * 100
    assert len(rested) == units.bit_count()
    assert arrived == queue


def test_the_levels_that_a_route_names_are_all_that_it_needs() -> None:
    delays = Delays(True, RUN)
    route = delays.route("shop", 12.7)
    assert route is not None
    steps = delays.foundation()
    for level in range(route.level + 1):
        steps += delays.level(level)

    waited, _, arrived = Virtual([*steps, delays.target("shop")]).follow(route.exchange, route.routing_key)

    assert (waited, arrived) == (12_700, "shop")


def test_a_message_whose_queue_is_gone_is_kept() -> None:
    route = Delays(True, RUN).route("deleted", 0.3)
    assert route is not None

    waited, _, arrived = WHOLE[True].follow(route.exchange, route.routing_key)

    assert (waited, arrived) == (300, STRANDED)


@pytest.mark.parametrize(
    ("seconds", "units"),
    [
        (-5.0, 0),
        (0.0, 0),
        (0.0005, 0),
        (0.01, 1),
        (0.1, 1),
        (0.1005, 1),
        (0.102, 2),
        (0.35, 4),
        (59.9998, 600),
        (3600.0, 36_000),
        (float("nan"), 0),
        (float("-inf"), 0),
        (float("inf"), 10**13),
        (1e308, 10**13),
    ],
)
def test_delays_are_rounded_up(seconds: float, units: int) -> None:
    assert max(0, units_of(seconds)) == units
    assert (Delays(True, RUN).route("shop", seconds) is None) is (units == 0)


def test_a_delay_beyond_all_levels_is_a_first_lap() -> None:
    century = 100 * 365 * 24 * 3600.0

    route = Delays(True, RUN).route("shop", century)

    assert route is not None
    assert route.further
    assert WHOLE[True].follow(route.exchange, route.routing_key)[0] == LONGEST_UNITS * 100


@given(st.integers(1, LONGEST_UNITS), queues)
def test_every_routing_key_fits_into_amqp(units: int, queue: str) -> None:
    route = Delays(True, RUN).route(queue, units * UNIT_SECONDS)

    assert isinstance(route, Route)
    assert len(route.routing_key.encode()) <= 255


@given(queues, queues)
def test_every_queue_has_a_word_of_its_own(queue: str, other: str) -> None:
    assert (word_of(queue) == word_of(other)) is (queue == other)


def test_levels_hand_on_at_least_once_where_the_server_can() -> None:
    _, _, declared, _ = Delays(True, RUN).level(7)

    assert declared == DeclareQueue(
        "ekiden.delay.07-12.8s",
        {
            "x-message-ttl": 12_800,
            "x-dead-letter-exchange": "ekiden.delay.06-6.4s",
            "x-queue-type": "quorum",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )


def test_classic_levels_are_others() -> None:
    names = [
        {step.name for step in Delays(quorum, RUN).level(3) if isinstance(step, DeclareQueue)}
        for quorum in (True, False)
    ]

    assert names == [{"ekiden.delay.03-0.8s"}, {"ekiden.delay.classic.03-0.8s"}]


@pytest.mark.parametrize(
    ("version", "queue_type", "quorum"),
    [((3, 9, 0), None, False), ((3, 10, 0), None, True), ((3, 10, 0), "classic", False), ((4, 3, 0), None, True)],
)
def test_levels_are_quorum_queues_where_these_have_a_time_to_live(
    version: tuple[int, int, int], queue_type: str | None, quorum: bool
) -> None:
    assert delays_of(topology(version, queue_type=queue_type)) == Delays(quorum, differences_of(version))


def test_no_level_lives_longer_than_servers_take() -> None:
    # 3.10.8 takes 214,748,364,800 ms and not 6,871,947,673,600.
    longest = max(int(queue.arguments.get("x-message-ttl", 0)) for queue in WHOLE[True].queues.values())

    assert longest <= 134_217_728_000
