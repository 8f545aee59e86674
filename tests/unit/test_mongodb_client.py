"""What one URL leads to goes on after its connections were closed, whoever was in the middle of something."""

from __future__ import annotations

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.urls import parse_url
from ekiden_mongodb.client import Client


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
