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
    SilentBrokerConformance     fixture ``silent``: a broker that does not answer
    BrokerRestartConformance    fixture ``restart_broker``: a broker that is stopped and started again
    LostWakeUpConformance       fixture ``silent_publisher``: a message that nobody was woken for
    BackendConformance          every backend that stores
    BackendProcessConformance   where several processes can open the store

Tests of more than some seconds carry the mark ``slow``.
"""

from ekiden.testing.conformance.backends import BackendConformance
from ekiden.testing.conformance.leases import Endings, LeaseExpiryConformance
from ekiden.testing.conformance.looking import Looking
from ekiden.testing.conformance.messages import Messages
from ekiden.testing.conformance.processes import BackendProcessConformance, BrokerClockConformance, ProcessConformance
from ekiden.testing.conformance.receiving import Delays, Receiving
from ekiden.testing.conformance.threads import Threads
from ekiden.testing.conformance.topics import Topics
from ekiden.testing.conformance.trouble import (
    BrokerRestartConformance,
    FullBrokerConformance,
    LostWakeUpConformance,
    SilentBrokerConformance,
)

__all__ = [
    "BackendConformance",
    "BackendProcessConformance",
    "BrokerClockConformance",
    "BrokerRestartConformance",
    "FullBrokerConformance",
    "LeaseExpiryConformance",
    "LostWakeUpConformance",
    "ProcessConformance",
    "SilentBrokerConformance",
    "TransportConformance",
]


class TransportConformance(Messages, Receiving, Delays, Endings, Looking, Topics, Threads):
    """What every transport promises."""
