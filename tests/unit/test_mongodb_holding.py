"""What a consumer knows of what it holds without asking."""

from __future__ import annotations

import time

from ekiden_mongodb.holding import Hold, Holdings


def later() -> float:
    return time.monotonic() + 60.0


def earlier() -> float:
    return time.monotonic() - 1.0


def test_what_was_claimed_is_surely_held_until_its_lease_ends() -> None:
    holdings = Holdings()
    holdings.add(["a"], "claim", later())
    holdings.add(["b"], "claim", earlier())

    assert holdings.of("a", "claim") is Hold.SURE
    assert holdings.of("b", "claim") is Hold.UNSURE
    assert holdings.of("c", "claim") is Hold.UNSURE
    assert len(holdings) == 2


def test_what_was_claimed_again_is_lost_for_the_earlier_claim() -> None:
    holdings = Holdings()
    holdings.add(["a"], "first", earlier())
    holdings.add(["a"], "second", later())

    holdings.drop("a", "first")
    holdings.extend("a", "first", 0.0)
    holdings.doubt("a", "first")

    assert holdings.of("a", "first") is Hold.LOST
    assert holdings.of("a", "second") is Hold.SURE


def test_an_extension_makes_sure() -> None:
    holdings = Holdings()
    holdings.add(["a"], "claim", earlier())

    holdings.extend("a", "claim", later())
    holdings.extend("b", "claim", later())

    assert holdings.of("a", "claim") is Hold.SURE
    assert holdings.of("b", "claim") is Hold.UNSURE


def test_who_was_not_answered_is_not_sure_but_holds_it_still() -> None:
    holdings = Holdings()
    holdings.add(["a"], "claim", later())

    holdings.doubt("a", "claim")

    assert holdings.of("a", "claim") is Hold.UNSURE
    assert len(holdings) == 1
    holdings.drop("a", "claim")
    assert len(holdings) == 0
    holdings.add(["a"], "another", later())
    assert holdings.of("a", "another") is Hold.SURE


def test_what_has_ended_makes_room() -> None:
    holdings = Holdings()
    soon = later()
    holdings.add(["a", "b"], "first", earlier())
    holdings.add(["c"], "second", soon)
    holdings.add(["d"], "third", soon + 1)

    holdings.drop_expired()

    assert len(holdings) == 2
    assert holdings.first_end() == soon
    assert holdings.by_token() == {"second": ["c"], "third": ["d"]}
