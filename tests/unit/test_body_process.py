"""A process that runs one body at a time: what comes over its pipe, and how both ends notice the end of the other."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
from ekiden.body_frames import Answer, Ask, AskPublish, Begin, Run, write_frame
from ekiden.body_process import BodyProcess, answer_ask
from ekiden.body_relay import Channel, RelayBackend, RelayTransport
from ekiden.codec import encode_call
from ekiden.errors import BrokerUnavailable, MisuseError, WorkerLostError
from ekiden.job import Job
from ekiden.message import Delivery, Message, Published, PublishOutcome, new_id
from ekiden.outcomes import Failed, Succeeded
from ekiden.plan import EXIT_FAILED, exit_text
from ekiden.runner import BodyProcesses
from ekiden.signature import Call
from ekiden.urls import parse_url

from tests.apps import bodies
from tests.working import PATIENCE, eventually

TARGET = "tests.apps.bodies:app"


@pytest.fixture
def process() -> Iterator[BodyProcess]:
    process = BodyProcess(TARGET)
    process.wait_until_ready()
    yield process
    process.kill()
    process.close()


def frame(task: str, *args: Any, soft_time_limit: float | None = None) -> Run:
    call = Call(task, new_id(), time.time(), args=args)
    return Run(Message(call.id, "default", encode_call(call)), 1, "worker", soft_time_limit)


def a_job() -> Job:
    return Job(Delivery(Message(new_id(), "default", b""), None, 1), taken=time.monotonic())


def refuse(_ask: Ask) -> Answer:
    raise AssertionError("this body asks for nothing")


def test_it_runs_one_body_after_the_other(process: BodyProcess) -> None:
    outcomes = [process.run(frame("tests.apps.bodies.add", n, 1), refuse) for n in range(3)]

    assert [bytes(outcome.value) for outcome in outcomes if isinstance(outcome, Succeeded)] == [b"1", b"2", b"3"]


def test_what_a_body_sends_is_published_by_its_worker(process: BodyProcess) -> None:
    asked: list[Ask] = []

    def answer(ask: Ask) -> Answer:
        asked.append(ask)
        return answer_ask(ask, lambda messages, _: bodies.app.transport.publish(messages), bodies.app)

    outcome = process.run(frame("tests.apps.bodies.send_one"), answer)
    (sent,) = bodies.app.transport.browse("default")
    bodies.app.transport.purge("default")
    bodies.app.close()

    assert [type(each) for each in asked] == [AskPublish]
    assert isinstance(outcome, Succeeded)
    assert outcome.children == (sent.message.id,)


def test_what_the_broker_could_not_do_now_is_tried_again_by_the_body(process: BodyProcess) -> None:
    not_now = [Published(PublishOutcome.FAILED, BrokerUnavailable("not now"))] * 2
    seconds: list[float | None] = []

    def publish(messages: Sequence[Message], within: float | None) -> list[Published]:
        seconds.append(within)
        return [not_now.pop()] if not_now else bodies.app.transport.publish(messages)

    outcome = process.run(frame("tests.apps.bodies.send_one"), lambda ask: answer_ask(ask, publish, bodies.app))
    (sent,) = bodies.app.transport.browse("default")
    bodies.app.transport.purge("default")
    bodies.app.close()

    assert isinstance(outcome, Succeeded)
    assert outcome.children == (sent.message.id,)
    assert len(seconds) == 3
    assert seconds == sorted((each or 0.0 for each in seconds), reverse=True)  # what is left until one deadline


def test_a_bodys_publish_ends_by_its_deadline_while_another_thread_asks() -> None:
    incoming, outgoing = os.pipe(), os.pipe()
    channel = Channel(os.fdopen(incoming[0], "rb"), os.fdopen(outgoing[1], "wb"), ended=lambda: None)
    backend = RelayBackend(parse_url("memory://"), channel, stores=True)
    transport = RelayTransport(parse_url("memory://"), channel)
    threading.Thread(target=backend.wait, args=(["a"], 60.0), daemon=True).start()  # nobody ever answers
    eventually(channel._asking.locked, what="it asks")

    for call in (
        lambda by: transport.publish([Message("a", "queue", b"")], deadline=by),
        lambda by: backend.forget(["a"], deadline=by),
        lambda by: backend.expect(["a"], lambda: transport, deadline=by),
    ):
        with pytest.raises(BrokerUnavailable, match="until the call had to end"):
            call(time.monotonic() + 0.05)


@pytest.mark.slow
def test_a_soft_limit_is_of_one_body_only(process: BodyProcess) -> None:
    for seconds in (0.049, 0.0495, 0.05, 0.0505, 0.051):
        process.run(frame("tests.apps.bodies.at_the_end", seconds, soft_time_limit=0.05), refuse)
        following = process.run(frame("tests.apps.bodies.at_the_end", 0.1), refuse)

        assert isinstance(following, Succeeded), following


def test_a_limit_of_centuries_is_no_trouble(process: BodyProcess) -> None:
    outcome = process.run(frame("tests.apps.bodies.add", 1, 1, soft_time_limit=1e300), refuse)

    assert isinstance(outcome, Succeeded)


def test_it_ends_when_its_pipe_closes(process: BodyProcess) -> None:
    process._to.close()

    eventually(lambda: process._process.poll() is not None, what="it has ended")


def test_it_ends_in_one_line_when_its_body_has_closed_the_pipe() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ekiden.body_process", TARGET],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    write_frame(process.stdin, Begin(TARGET, sys.path, logging.WARNING, "text"))
    write_frame(process.stdin, frame("tests.apps.bodies.close_all"))

    code = process.wait(PATIENCE)
    _, told = process.communicate()

    assert code == EXIT_FAILED
    assert len(told.splitlines()) == 1
    assert b"the pipe to its worker is closed" in told


@pytest.mark.parametrize("how", ["killed", "spoilt"])
@pytest.mark.slow
def test_a_process_that_went_bad_while_it_was_idle_harms_no_call(how: str) -> None:
    processes = BodyProcesses("tests.apps.hostile:app")
    first = processes.take(a_job())
    if how == "killed":
        os.kill(first.pid, 9)
    else:
        first.run(frame("spoil.later", 0.1), refuse)
    processes.give_back(first)
    eventually(lambda: not first.is_usable(), what="it has gone bad")

    second = processes.take(a_job())

    assert second.pid != first.pid
    assert isinstance(second.run(frame("in.process", 5), refuse), Succeeded)
    processes.give_back(second)
    assert processes.take(a_job()) is second
    processes.give_back(second)
    processes.close()


@pytest.mark.parametrize("header", [object(), "caf\udce9", float])
@pytest.mark.slow
def test_what_cannot_be_sent_to_it_is_said_so(process: BodyProcess, header: Any) -> None:
    unsendable = msgspec.structs.replace(
        frame("tests.apps.bodies.add", 1, 1), message=Message("x", "default", b"", {"odd": header})
    )

    with pytest.raises(MisuseError, match="body process"):
        process.run(unsendable, refuse)


def test_a_message_that_it_cannot_read_has_failed(process: BodyProcess) -> None:
    headers: Any = {"odd": {"a": 1}}
    unreadable = msgspec.structs.replace(
        frame("tests.apps.bodies.add", 1, 1), message=Message("x", "default", b"", headers)
    )

    outcome = process.run(unreadable, refuse)

    assert isinstance(outcome, Failed)
    assert "cannot read what the worker sent" in outcome.failure.message
    assert isinstance(process.run(frame("tests.apps.bodies.add", 1, 1), refuse), Succeeded)


def test_a_call_of_a_task_that_it_does_not_know_has_failed(process: BodyProcess) -> None:
    outcome = process.run(frame("no.such.task"), refuse)

    assert isinstance(outcome, Failed)
    assert outcome.failure.type == "ekiden.errors.NotRegistered"
    assert isinstance(process.run(frame("tests.apps.bodies.add", 1, 1), refuse), Succeeded)


def test_what_it_asks_for_and_cannot_be_done_is_told_to_its_body() -> None:
    class Strange:
        """No message, and nothing that can be asked about."""

    def fail(*_: Any) -> list[Published]:
        raise TypeError("nothing of the kind")

    answer = answer_ask(AskPublish([Strange()]), fail, bodies.app)  # type: ignore[list-item]

    assert answer.error_kind == "EkidenError"
    assert answer.error == "TypeError: nothing of the kind"


def test_its_death_is_told_with_its_cause(process: BodyProcess) -> None:
    os.kill(process.pid, 9)

    with pytest.raises(WorkerLostError, match="it was ended by SIGKILL"):
        process.run(frame("tests.apps.bodies.add", 1, 1), refuse)


@pytest.mark.parametrize(("target", "reason"), [("no_such_module:app", "no module"), ("tests.apps.bodies:x", "no 'x'")])
def test_an_app_that_cannot_be_imported_there_is_told(target: str, reason: str) -> None:
    process = BodyProcess(target)

    with pytest.raises(WorkerLostError, match=reason):
        process.wait_until_ready()
    process.close()
    assert process._process.wait(PATIENCE) is not None


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "it exited with 0"), (3, "it exited with 3"), (-11, "it was ended by SIGSEGV"), (-99, "signal 99")],
)
def test_an_exit_status_is_told_in_words(code: int, text: str) -> None:
    assert text in exit_text(code)
