"""Many callers' messages in few publishes, each caller with its own answer, deadline and error."""

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.memory import MemoryTransport
from ekiden.message import Message, Published, PublishOutcome, new_id
from ekiden.options import publishing
from ekiden.publisher import Publisher, refusal
from ekiden.settings import Settings
from ekiden.urls import parse_url

from tests.working import PATIENCE, eventually

HOW = publishing(Settings(), timeout=PATIENCE)
NOT_NOW = Published(PublishOutcome.FAILED, BrokerUnavailable("not now"))


class GatedTransport(MemoryTransport):
    """A memory broker whose publishes can be held up, and made to fail."""

    def __init__(self, url: str) -> None:
        super().__init__(parse_url(url))
        self.batches: list[list[str]] = []
        self.deadlines: list[float | None] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failures: list[BaseException] = []
        self.unable: dict[str, int] = {}
        """How often a message of that id is answered with "not now"."""
        self.leaves_after: int | None = None

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        self.batches.append([message.id for message in messages])
        self.deadlines.append(deadline)
        assert self.gate.wait(PATIENCE)
        if self.failures:
            raise self.failures.pop(0)
        if self.leaves_after is not None and len(self.batches) > self.leaves_after:
            raise BrokerUnavailable("away")
        able = [each for each in messages if self.unable.get(each.id, 0) <= 0]
        stored = iter(super().publish(able, deadline=deadline))
        answers = [next(stored) if self.unable.get(each.id, 0) <= 0 else NOT_NOW for each in messages]
        for each in messages:
            self.unable[each.id] = self.unable.get(each.id, 0) - 1
        return answers


@pytest.fixture
def transport() -> Iterator[GatedTransport]:
    with GatedTransport(f"memory://{new_id()}") as transport:
        yield transport


@pytest.fixture
def publisher(transport: GatedTransport) -> Iterator[Publisher]:
    publisher = Publisher(lambda: transport)
    yield publisher
    publisher.close()


def message(name: str, **fields: Any) -> Message:
    return Message(name, "queue", b"", **fields)


class Callers:
    """Threads that publish one message each, and what came of it."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self.answers: dict[str, Any] = {}
        self.threads: list[threading.Thread] = []

    def start(self, sent: Message, how: Any = HOW) -> None:
        def publish() -> None:
            try:
                self.answers[sent.id] = self._publisher.publish([sent], how)[0].outcome
            except BaseException as error:  # noqa: BLE001 - that is what the test asks for
                self.answers[sent.id] = error

        self.threads.append(threading.Thread(target=publish))
        self.threads[-1].start()

    def join(self) -> dict[str, Any]:
        for thread in self.threads:
            thread.join(PATIENCE)
        return self.answers


def are_waiting(publisher: Publisher, count: int) -> bool:
    return len(publisher._waiting) == count


def hold_up(transport: GatedTransport, callers: Callers, *waiting: Message) -> None:
    """Have one caller held up in the broker, and the others wait for it."""
    transport.gate.clear()
    callers.start(message("first"))
    eventually(lambda: transport.batches, what="the first is publishing")
    for each in waiting:
        callers.start(each)
    publisher = callers._publisher
    eventually(lambda: len(publisher._waiting) == len(waiting), what="the others wait")


def test_one_publish_takes_along_everybody_who_waits(transport: GatedTransport, publisher: Publisher) -> None:
    callers = Callers(publisher)
    hold_up(transport, callers, *(message(name) for name in "abcde"))

    transport.gate.set()

    assert set(callers.join().values()) == {PublishOutcome.STORED}
    assert [sorted(batch) for batch in transport.batches] == [["first"], ["a", "b", "c", "d", "e"]]


def test_each_caller_gets_its_own_answer_only(transport: GatedTransport, publisher: Publisher) -> None:
    callers = Callers(publisher)
    transport.publish([message("known")])
    transport.batches.clear()
    hold_up(transport, callers, message("fine"), message("bad", priority=99), message("known"))

    transport.gate.set()

    assert callers.join() == {
        "first": PublishOutcome.STORED,
        "fine": PublishOutcome.STORED,
        "bad": PublishOutcome.FAILED,
        "known": PublishOutcome.DUPLICATE,
    }


def test_an_error_of_the_broker_reaches_all_that_it_meets_each_with_its_own(
    transport: GatedTransport, publisher: Publisher
) -> None:
    callers = Callers(publisher)
    hold_up(transport, callers, message("a"), message("b"))
    transport.failures = [BrokerRefused("one"), BrokerRefused("two")]

    transport.gate.set()

    answers = callers.join()
    assert (str(answers["first"]), str(answers["a"]), str(answers["b"])) == ("one", "two", "two")
    assert answers["a"] is not answers["b"]


def test_when_the_one_who_publishes_is_interrupted_the_next_takes_over(
    transport: GatedTransport, publisher: Publisher
) -> None:
    callers = Callers(publisher)
    hold_up(transport, callers, message("a"), message("b"))
    transport.failures = [KeyboardInterrupt(), KeyboardInterrupt()]

    transport.gate.set()

    answers = callers.join()
    outcomes = sorted(str(answers[name]) for name in ("a", "b"))
    assert isinstance(answers["first"], KeyboardInterrupt)
    assert outcomes == ["", "PublishOutcome.STORED"]


def test_callers_that_publish_again_and_again_share_most_publishes(
    transport: GatedTransport, publisher: Publisher
) -> None:
    each_takes = threading.Event()
    callers, times = 16, 20

    def publish_often(caller: int) -> None:
        for number in range(times):
            publisher.publish([message(f"{caller}-{number}")], HOW)

    class SlowTransport(GatedTransport):
        def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
            each_takes.wait(0.005)
            return super().publish(messages, deadline=deadline)

    with SlowTransport(f"memory://{new_id()}") as slow:
        publisher._transport = lambda: slow
        threads = [threading.Thread(target=publish_often, args=(caller,)) for caller in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)

        assert slow.depth("queue").ready == callers * times
        assert len(slow.batches) < callers * times / 3


def test_waiting_for_others_ends_at_ones_own_deadline(transport: GatedTransport, publisher: Publisher) -> None:
    callers = Callers(publisher)
    hold_up(transport, callers)
    began = time.monotonic()

    with pytest.raises(BrokerUnavailable, match=r"within 0\.1 s"):
        publisher.publish([message("impatient")], publishing(Settings(), timeout=0.1))

    assert time.monotonic() - began < 5
    transport.gate.set()
    callers.join()
    assert transport.batches == [["first"]]


def test_a_broker_that_is_away_is_asked_again(transport: GatedTransport, publisher: Publisher) -> None:
    transport.failures = [BrokerUnavailable("away"), BrokerUnavailable("still away")]

    (answer,) = publisher.publish([message("a")], HOW)

    assert answer.outcome is PublishOutcome.STORED
    assert len(transport.batches) == 3


def test_it_is_not_asked_again_if_nobody_wants_that(transport: GatedTransport, publisher: Publisher) -> None:
    transport.failures = [BrokerUnavailable("away")]

    with pytest.raises(BrokerUnavailable):
        publisher.publish([message("a")], publishing(Settings(), retry=False))
    assert len(transport.batches) == 1


def test_a_refusal_is_not_asked_about_again(transport: GatedTransport, publisher: Publisher) -> None:
    transport.failures = [BrokerRefused("never")]

    with pytest.raises(BrokerRefused):
        publisher.publish([message("a")], HOW)
    assert len(transport.batches) == 1


def test_a_broker_that_stays_away_is_given_up_in_time(transport: GatedTransport, publisher: Publisher) -> None:
    transport.failures = [BrokerUnavailable("away")] * 1000
    began = time.monotonic()

    with pytest.raises(BrokerUnavailable):
        publisher.publish([message("a")], publishing(Settings(), timeout=0.5))
    assert time.monotonic() - began < 5


def test_what_is_answered_with_not_now_is_asked_again_by_itself(
    transport: GatedTransport, publisher: Publisher
) -> None:
    transport.unable = {"b": 2}

    answers = publisher.publish([message("a"), message("b"), message("c", priority=99)], HOW)

    assert [each.outcome for each in answers] == [
        PublishOutcome.STORED,
        PublishOutcome.STORED,
        PublishOutcome.FAILED,
    ]
    assert isinstance(answers[2].error, BrokerRefused)
    assert transport.batches == [["a", "b", "c"], ["b"], ["b"]]


def test_what_stays_not_now_is_answered_so_in_time(transport: GatedTransport, publisher: Publisher) -> None:
    transport.unable = {"b": 1000}

    answers = publisher.publish([message("a"), message("b")], publishing(Settings(), timeout=0.5))

    assert answers[0].outcome is PublishOutcome.STORED
    assert answers[1] is NOT_NOW


def test_not_now_is_not_asked_again_if_nobody_wants_that(transport: GatedTransport, publisher: Publisher) -> None:
    transport.unable = {"a": 1}

    assert publisher.publish([message("a")], publishing(Settings(), retry=False)) == [NOT_NOW]
    assert len(transport.batches) == 1


def test_some_stored_and_then_a_broker_that_is_away_is_told_of_each(
    transport: GatedTransport, publisher: Publisher
) -> None:
    transport.unable = {"b": 1}
    transport.leaves_after = 1
    once_more = publishing(Settings(), retry_policy={"max_retries": 1, "interval_start": 0.0})

    stored, failed = publisher.publish([message("a"), message("b")], once_more)

    assert stored.outcome is PublishOutcome.STORED
    assert str(failed.error) == "away"


def test_the_deadline_of_a_call_goes_down_to_the_transport(transport: GatedTransport, publisher: Publisher) -> None:
    began = time.monotonic()

    publisher.publish([message("a")], publishing(Settings(), timeout=3.0))
    publisher.publish([message("b")], HOW, began + 7.0)

    first, second = transport.deadlines
    assert first is not None
    assert began + 3.0 <= first <= time.monotonic() + 3.0
    assert second == began + 7.0


def test_a_group_ends_with_its_first_and_takes_along_whose_deadlines_are_near(
    transport: GatedTransport, publisher: Publisher
) -> None:
    callers = Callers(publisher)
    short, long = publishing(Settings(), timeout=PATIENCE), publishing(Settings(), timeout=PATIENCE * 5)
    transport.gate.clear()
    callers.start(message("first"))
    eventually(lambda: transport.batches, what="the first is publishing")
    for count, (name, how) in enumerate((("a", short), ("b", short), ("patient", long)), start=1):
        callers.start(message(name), how)
        eventually(functools.partial(are_waiting, publisher, count), what=f"{name} waits")

    transport.gate.set()

    assert set(callers.join().values()) == {PublishOutcome.STORED}
    assert transport.batches == [["first"], ["a", "b"], ["patient"]]
    deadlines = [each for each in transport.deadlines if each is not None]
    assert deadlines[1] - deadlines[0] < PATIENCE
    assert deadlines[2] - deadlines[1] > PATIENCE


def test_a_short_deadline_of_another_caller_ends_nobody_elses_publish(
    transport: GatedTransport, publisher: Publisher
) -> None:
    callers = Callers(publisher)
    hold_up(transport, callers)
    callers.start(message("short"), publishing(Settings(), timeout=0.2))
    eventually(lambda: len(publisher._waiting) == 1, what="the short one waits")
    callers.start(message("patient"))
    eventually(lambda: isinstance(callers.answers.get("short"), BrokerUnavailable), what="the short one has given up")

    transport.gate.set()

    answers = callers.join()
    assert (answers["first"], answers["patient"]) == (PublishOutcome.STORED, PublishOutcome.STORED)
    assert ["short"] not in transport.batches


def test_what_was_held_when_the_process_forked_holds_nobody_up_in_the_child(
    transport: GatedTransport, publisher: Publisher
) -> None:
    callers = Callers(publisher)
    hold_up(transport, callers, message("a"))
    in_child = Publisher(lambda: transport)
    in_child._line, in_child._mutex, in_child._waiting = publisher._line, publisher._mutex, publisher._waiting

    in_child.forget()
    transport.gate.set()
    (answer,) = in_child.publish([message("child")], publishing(Settings(), timeout=5))

    assert answer.outcome is PublishOutcome.STORED
    callers.join()


def test_async_callers_go_out_together(transport: GatedTransport, publisher: Publisher) -> None:
    async def main() -> list[list[Published]]:
        return await asyncio.gather(*(publisher.publish_async([message(str(n))], HOW) for n in range(200)))

    answers = asyncio.run(main())

    assert {answer.outcome for each in answers for answer in each} == {PublishOutcome.STORED}
    assert len(transport.batches) < 100


def test_async_callers_are_told_the_error(transport: GatedTransport, publisher: Publisher) -> None:
    transport.failures = [BrokerRefused("never")]

    with pytest.raises(BrokerRefused):
        asyncio.run(publisher.publish_async([message("a")], HOW))


def test_an_async_caller_ends_at_its_own_deadline_while_another_is_stuck(
    transport: GatedTransport, publisher: Publisher
) -> None:
    async def main() -> None:
        transport.gate.clear()
        stuck = asyncio.ensure_future(publisher.publish_async([message("stuck")], HOW))
        while not transport.batches:
            await asyncio.sleep(0.005)
        with pytest.raises(BrokerUnavailable, match=r"nothing could be published within 0\.1 s"):
            await publisher.publish_async([message("short")], publishing(Settings(), timeout=0.1))
        assert not stuck.done()
        transport.gate.set()
        await stuck

    asyncio.run(main())
    publisher.close()
    assert transport.batches == [["stuck"]]


def test_what_an_async_caller_cancelled_before_it_began_is_not_published(
    transport: GatedTransport, publisher: Publisher
) -> None:
    async def main() -> None:
        transport.gate.clear()
        stuck = asyncio.ensure_future(publisher.publish_async([message("stuck")], HOW))
        while not transport.batches:
            await asyncio.sleep(0.005)
        cancelled = asyncio.ensure_future(publisher.publish_async([message("cancelled")], HOW))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        transport.gate.set()
        await stuck

    asyncio.run(main())
    publisher.close()
    assert transport.batches == [["stuck"]]


def test_an_async_callers_not_now_holds_up_nobody_else(transport: GatedTransport, publisher: Publisher) -> None:
    transport.unable = {"unable": 3}

    async def main() -> list[str]:
        ended: list[str] = []

        async def publish(name: str) -> None:
            (answer,) = await publisher.publish_async([message(name)], HOW)
            assert answer.outcome is PublishOutcome.STORED
            ended.append(name)

        unable = asyncio.ensure_future(publish("unable"))
        while not transport.batches:
            await asyncio.sleep(0.005)
        await publish("able")
        await unable
        return ended

    assert asyncio.run(main()) == ["able", "unable"]
    assert sum("unable" in batch for batch in transport.batches) == 4


def test_closing_publishes_what_was_given_before_and_leaves_no_thread(
    transport: GatedTransport, publisher: Publisher
) -> None:
    asyncio.run(publisher.publish_async([message("a")], HOW))

    publisher.close()

    assert not [thread for thread in threading.enumerate() if thread.name == "ekiden-async-publisher"]
    assert asyncio.run(publisher.publish_async([message("b")], HOW))[0].outcome is PublishOutcome.STORED


ANSWERS: list[tuple[Exception | None, Callable[[TransportError | None], bool]]] = [
    (None, lambda found: found is None),
    (BrokerRefused("no"), lambda found: isinstance(found, BrokerRefused)),
    (ValueError("odd"), lambda found: type(found) is TransportError and "odd" in str(found)),
]


@pytest.mark.parametrize(("error", "expected"), ANSWERS, ids=["none", "transport", "other"])
def test_the_first_refusal_is_one_that_may_be_raised(
    error: Exception | None, expected: Callable[[TransportError | None], bool]
) -> None:
    answer = Published(PublishOutcome.STORED if error is None else PublishOutcome.FAILED, error)

    assert expected(refusal([message("a"), message("b")], [Published(PublishOutcome.STORED), answer]))
