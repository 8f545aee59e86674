"""The conformance kit: what a transport or a backend must keep, as tests that a plugin subclasses.

    import pytest
    from ekiden.testing.conformance import LeaseExpiryConformance, TransportConformance

    class TestMyTransport(TransportConformance, LeaseExpiryConformance):
        @pytest.fixture
        def url(self) -> str:
            return "mybroker://localhost:1234/tests"

``url`` names a broker that is empty, or one whose other users do not meet the tests: their queues have random names.
All times come from the transport's ``description``, and it is held to what it describes: an answer that it says it
cannot give must not be given. Nothing in here skips: what does not apply to a broker is a class that its plugin does
not inherit from.

    TransportConformance        every transport
    LeaseExpiryConformance      where a lease ends by the clock, also while its consumer lives
    ProcessConformance          where several processes can open the broker: kills, stops, forks
    BrokerClockConformance      the same, where all time is the broker's: workers' clocks may be wrong
    FullBrokerConformance       a broker too small for what it is sent
    GarbageConformance          fixture ``spoil``: a stored message cannot be read any more
    PlantedGarbageConformance   fixture ``plant``: what is no message lies among the messages
    SilentBrokerConformance     fixture ``silent``: a broker that does not answer
    DeadlineConformance         the part of it for a broker of which only publishing can be held up: one that is locked
    LostReplyConformance        a broker reached by TCP: it did what it was asked, and its answer was lost
    SlowWireConformance         a broker reached by TCP: a slow wire, and one that is cut again and again
    SecondAddressConformance    a broker reached by TCP, at a host whose first address refuses connections
    SilentAddressConformance    the same, where the first address may also be silent
    BrokerRestartConformance    fixture ``restart_broker``: a broker that is stopped and started again
    LostWakeUpConformance       fixture ``silent_publisher``: a message that nobody was woken for
    PlacesConformance           fixture ``place_of``: several places (prefixes, files, ...) of one broker
    BackendConformance          every backend that stores
    BackendProcessConformance   where several processes can open the store
    BackendGarbageConformance   fixture ``spoil``: what is stored cannot be read any more
    PlantedBackendGarbageConformance   the same, where joins are stored too, and nothing was before
    BackendLimitConformance     fixture ``too_large``: a value that the store never takes
    FullBackendConformance      a store too small for what is put into it
    BackendPlacesConformance    fixture ``place_of``: several places of one store
    SilentBackendConformance    fixture ``silent``: a store that does not answer
    BackendWireConformance      a proxy in front of the store loses replies, cuts connections, and is slow
    BackendRestartConformance   fixture ``restart_store``: a store that is stopped and started again

Tests of more than some seconds carry the mark ``slow``.
"""

from ekiden.testing.conformance.addresses import SecondAddressConformance, SilentAddressConformance
from ekiden.testing.conformance.backend_refusals import BackendLimitConformance, Refusals
from ekiden.testing.conformance.backend_trouble import (
    BackendRestartConformance,
    BackendWireConformance,
    FullBackendConformance,
    SilentBackendConformance,
)
from ekiden.testing.conformance.backends import Results
from ekiden.testing.conformance.crashes import BackendCrashes, Crashes
from ekiden.testing.conformance.fence import Fence
from ekiden.testing.conformance.garbage import BackendGarbageConformance, GarbageConformance
from ekiden.testing.conformance.interruptions import Interruptions
from ekiden.testing.conformance.joins import Joins
from ekiden.testing.conformance.leases import Endings, LeaseExpiryConformance
from ekiden.testing.conformance.looking import Looking
from ekiden.testing.conformance.messages import Messages
from ekiden.testing.conformance.places import BackendPlacesConformance, PlacesConformance
from ekiden.testing.conformance.planted_garbage import (
    PlantedBackendGarbageConformance,
    PlantedGarbageConformance,
)
from ekiden.testing.conformance.processes import BackendProcessConformance, BrokerClockConformance, ProcessConformance
from ekiden.testing.conformance.receiving import Delays, Receiving
from ekiden.testing.conformance.records import Records
from ekiden.testing.conformance.threads import Threads
from ekiden.testing.conformance.topics import Topics
from ekiden.testing.conformance.trouble import (
    BrokerRestartConformance,
    DeadlineConformance,
    FullBrokerConformance,
    LostReplyConformance,
    LostWakeUpConformance,
    SilentBrokerConformance,
    SlowWireConformance,
)
from ekiden.testing.conformance.waiting import Waiting

__all__ = [
    "BackendConformance",
    "BackendGarbageConformance",
    "BackendLimitConformance",
    "BackendPlacesConformance",
    "BackendProcessConformance",
    "BackendRestartConformance",
    "BackendWireConformance",
    "BrokerClockConformance",
    "BrokerRestartConformance",
    "DeadlineConformance",
    "FullBackendConformance",
    "FullBrokerConformance",
    "GarbageConformance",
    "LeaseExpiryConformance",
    "LostReplyConformance",
    "LostWakeUpConformance",
    "PlacesConformance",
    "PlantedBackendGarbageConformance",
    "PlantedGarbageConformance",
    "ProcessConformance",
    "SecondAddressConformance",
    "SilentAddressConformance",
    "SilentBackendConformance",
    "SilentBrokerConformance",
    "SlowWireConformance",
    "TransportConformance",
]


class TransportConformance(Messages, Receiving, Delays, Endings, Looking, Topics, Threads, Interruptions, Crashes):
    """What every transport promises."""


class BackendConformance(Results, Waiting, Fence, Joins, Records, Refusals, BackendCrashes):
    """What every backend that stores promises."""
