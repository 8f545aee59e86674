"""Places of one broker or store, such as prefixes of one server: whatever the names, what is in one is in no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from ekiden.message import STORED, Message, new_id
from ekiden.results import Backend, Start, StoredResult
from ekiden.states import SUCCESS
from ekiden.testing.conformance.fixtures import DAY, BackendFixtures, TransportFixtures, bodies, settle
from ekiden.transport import Transport

JOINTS = ("", "-", ".", ":", "/", "//", "}", "%", "\N{EN DASH}")
"""What may stand between the name of a place and that of a thing in it."""

PlaceOf = Callable[[str], str]


class PlaceFixtures:
    """A plugin author overrides ``place_of``; and ``endings``, where the names of places may have other characters."""

    endings: tuple[str, ...] = ("", "b", "-b", "-messages", "-results")
    """The places are called the same but for these."""

    @pytest.fixture
    def place_of(self) -> PlaceOf:
        """Returns the URL of a place that is named, by lower-case letters, digits and ``-``: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'place_of'.")

    @pytest.fixture
    def urls(self, place_of: PlaceOf) -> list[str]:
        """The places: each one's name begins with that of the first."""
        name = f"p{new_id()}"
        return [place_of(name + ending) for ending in self.endings]

    @pytest.fixture
    def names(self) -> list[str]:
        """Names that are the same text as others, when they stand behind the names of places."""
        own = new_id()
        return [own, *dict.fromkeys(f"{ending}{joint}{own}" for ending in self.endings for joint in JOINTS if ending)]


class PlacesConformance(PlaceFixtures, TransportFixtures):
    """Transports at two places of one broker never meet."""

    @pytest.fixture
    def places(self, urls: list[str]) -> Iterator[list[Transport]]:
        """A transport at each of them."""
        with ExitStack() as opened:
            yield [opened.enter_context(self.open_transport(url)) for url in urls]

    def test_messages_of_two_places_never_meet(self, places: list[Transport], names: list[str]) -> None:
        consumers = [self.consume(place, *names, name="the same") for place in places]
        for number, place in enumerate(places):
            sent = [Message(f"{name}-id", name, b"%d" % number) for name in names]
            assert place.publish(sent) == [STORED] * len(sent)

        assert places[0].purge(names[0]) <= 1
        for number, (place, consumer) in enumerate(zip(places, consumers, strict=True)):
            if number:
                deliveries = self.collect(consumer, len(names))
                assert set(bodies(deliveries)) == {b"%d" % number}
                assert sorted(each.message.queue for each in deliveries) == sorted(names)
                settle(consumer, deliveries)
            for name in names if number else names[:1]:
                assert place.depth(name).ready == 0

    def test_broadcasts_of_two_places_never_meet(self, places: list[Transport], names: list[str]) -> None:
        listeners = [place.listen(name) for place in places for name in names[:10]]
        for number, place in enumerate(places):
            for name in names[:10]:
                place.broadcast(name, [b"%d %s" % (number, name.encode())])

        for number, listener in enumerate(listeners):
            where, which = divmod(number, 10)
            assert listener.receive(5.0) == [b"%d %s" % (where, names[which].encode())]
        assert [listener.receive(0.01) for listener in listeners[:5]] == [[]] * 5


class BackendPlacesConformance(PlaceFixtures, BackendFixtures):
    """Backends at two places of one store never meet."""

    @pytest.fixture
    def places(self, urls: list[str]) -> Iterator[list[Backend]]:
        """A backend at each of them."""
        with ExitStack() as opened:
            yield [opened.enter_context(self.open_backend(url)) for url in urls]

    def test_results_of_two_places_never_meet(self, places: list[Backend], names: list[str]) -> None:
        for number, place in enumerate(places):
            stored = [StoredResult(name, SUCCESS, 0, b"%d" % number, DAY) for name in names]
            assert place.put(stored) == [True] * len(stored)
            assert [each.outcome.name for each in place.begin([Start(f"{name}-s", 0, "m") for name in names])] == [
                "GO"
            ] * len(names)
        places[0].forget(names)

        assert places[0].get(names) == [None] * len(names)
        for number, place in enumerate(places[1:], 1):
            assert {each and each.body for each in place.get(names)} == {b"%d" % number}

    def test_records_and_joins_of_two_places_never_meet(self, places: list[Backend], names: list[str]) -> None:
        for number, place in enumerate(places):
            for name in names[:6]:
                place.write(name, b"%d" % number)
                assert not place.join(name, f"{number}", b"", size=len(places), expires=DAY).complete

        for number, place in enumerate(places):
            assert {(record.key, record.value) for record in place.scan("")} == {
                (name, b"%d" % number) for name in names[:6]
            }
