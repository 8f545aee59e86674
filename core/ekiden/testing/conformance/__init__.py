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

    TransportConformance             every transport
    LeaseExpiryConformance           transports whose leases end by the clock
    BackendConformance               every backend that stores
"""

from ekiden.testing.conformance.backends import BackendConformance
from ekiden.testing.conformance.leases import Endings, LeaseExpiryConformance
from ekiden.testing.conformance.looking import Looking
from ekiden.testing.conformance.messages import Messages
from ekiden.testing.conformance.receiving import Delays, Receiving
from ekiden.testing.conformance.topics import Topics

__all__ = ["BackendConformance", "LeaseExpiryConformance", "TransportConformance"]


class TransportConformance(Messages, Receiving, Delays, Endings, Looking, Topics):
    """What every transport promises."""
