"""What one URL leads to goes on after its connections were closed, whoever was in the middle of something."""

from __future__ import annotations

import time
from functools import partial

import pymongo._csot
import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.message import STORED
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, eventually
from ekiden.testing.interruptions import Signals
from ekiden.urls import parse_url
from ekiden_mongodb.client import Client

CSOT = pymongo._csot.__file__


def test_a_handle_that_was_being_made_while_the_connections_were_closed_is_used_once(mongodb_place: str) -> None:
    client = Client(parse_url(mongodb_place), unavailable=BrokerUnavailable, refused=BrokerRefused)
    made = client.collection("some")
    client.close()
    client._handles["some", False] = made  # what the thread does that was making it

    with pytest.raises(BrokerUnavailable, match="closed here meanwhile"), client.asking():
        client.collection("some").find_one()

    with client.asking():
        assert client.collection("some").find_one() is None
    client.close()


@pytest.mark.slow
def test_the_deadline_of_an_interrupted_call_ends_with_the_call(mongodb_place: str) -> None:
    """pymongo keeps it in a context variable, and is interrupted where it sets it or takes it back."""
    seconds = 1.0
    signals = Signals()
    with open_transport(f"{mongodb_place}&timeout={seconds:g}") as transport, signals.handled():
        transport.publish([a_message("queue")])
        number, began = 0, time.monotonic()
        while signals.interrupt(partial(transport.publish, [a_message("queue")]), number := number + 1, within=CSOT):
            continue
        assert number > 10

        eventually(lambda: time.monotonic() > began + 2 * seconds, what="all those deadlines are over")

        assert transport.publish([a_message("queue")]) == [STORED]
