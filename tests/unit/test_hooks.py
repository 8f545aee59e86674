"""Signals: who is called, in what order, and what happens when a receiver fails."""

import logging
from typing import Any

import pytest
from ekiden import hooks, signals
from ekiden.hooks import Signal


@pytest.fixture
def signal() -> Signal:
    return Signal("test", "Something happened.", ("what",))


def listener(heard: list[Any], name: str) -> Any:
    def receive(sender: Any, **fields: Any) -> None:
        heard.append((name, sender, fields))

    return receive


def test_receivers_are_called_in_the_order_of_connecting(signal: Signal) -> None:
    heard: list[Any] = []
    for name in ("first", "second"):
        signal.connect(listener(heard, name))

    signal.send("sender", what=1)

    assert heard == [("first", "sender", {"what": 1}), ("second", "sender", {"what": 1})]


def test_a_receiver_can_hear_one_sender_only(signal: Signal) -> None:
    heard: list[Any] = []
    signal.connect(listener(heard, "picky"), sender="a")

    for sender in ("a", "b", "a"):
        signal.send(sender, what=1)

    assert [sender for _, sender, _ in heard] == ["a", "a"]


def test_connecting_is_a_decorator_with_and_without_parentheses(signal: Signal) -> None:
    heard: list[str] = []

    @signal.connect
    def bare(sender: Any, **_: Any) -> None:
        heard.append("bare")

    @signal.connect(sender="a")
    def called(sender: Any, **_: Any) -> None:
        heard.append("called")

    signal.send("a", what=1)

    assert heard == ["bare", "called"]
    assert callable(bare)


def test_connecting_twice_is_connecting_once(signal: Signal) -> None:
    heard: list[Any] = []
    receiver = listener(heard, "x")

    signal.connect(receiver)
    signal.connect(receiver)
    signal.send("s", what=1)

    assert len(heard) == 1


def test_disconnecting_ends_it(signal: Signal) -> None:
    heard: list[Any] = []
    receiver = listener(heard, "x")
    signal.connect(receiver)

    found = [signal.disconnect(receiver), signal.disconnect(receiver)]
    signal.send("s", what=1)

    assert (found, heard) == ([True, False], [])


def test_a_receiver_may_disconnect_itself(signal: Signal) -> None:
    heard: list[str] = []

    def once(sender: Any, **_: Any) -> None:
        heard.append("once")
        signal.disconnect(once)

    signal.connect(once)
    signal.connect(listener(heard, "other"))
    signal.send("s", what=1)
    signal.send("s", what=1)

    assert heard.count("once") == 1
    assert len(heard) == 3


def test_a_receiver_that_fails_is_logged_and_the_next_is_called(
    signal: Signal, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[Any] = []

    def failing(sender: Any, **_: Any) -> None:
        raise RuntimeError("fell over")

    signal.connect(failing)
    signal.connect(listener(heard, "next"))
    with caplog.at_level(logging.ERROR):
        signal.send("s", what=1)

    assert len(heard) == 1
    assert "signal test: the receiver" in caplog.text
    assert "fell over" in caplog.text


def test_every_signal_has_a_name_a_meaning_and_is_exported() -> None:
    assert {signal.name for signal in hooks.ALL} == set(signals.__all__) - {"Signal"}
    assert all(signal.meaning.endswith(".") for signal in hooks.ALL)
    assert repr(hooks.task_success) == "<Signal task_success(result, task_id)>"
