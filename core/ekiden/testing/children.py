"""What the conformance kit runs in processes of its own, so that it can kill, stop and fork them.

    python -m ekiden.testing.children URL PROGRAM '{"argument": ...}'

Each program writes one JSON object per line to its standard output, and reads commands, one per line, from its
standard input. It is kept apart from the tests so that a child starts fast: it does not import pytest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from ekiden.message import Delivery, Ending, Message
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Start
from ekiden.transport import Transport

POISON = b"poison"


def work(
    url: str,
    *,
    queue: str,
    name: str,
    lease: float,
    limit: int,
    seconds_per_batch: float = 0.0,
    die_at_poison: bool = False,
    clock_runs_ahead: float = 0.0,
) -> None:
    """Receive, tell, settle, for ever. Is killed, or kills itself at a message whose body is ``POISON``."""
    if clock_runs_ahead:
        right_time = time.time
        time.time = lambda: right_time() + clock_runs_ahead
    with open_transport(url) as transport:
        consumer = transport.consumer([queue], lease=lease, prefetch=limit, name=name)
        tell(ready=True)
        while True:
            deliveries = consumer.receive(limit, 1.0)
            if not deliveries:
                continue
            tell(received=[describe(delivery) for delivery in deliveries])
            if die_at_poison and any(delivery.message.body == POISON for delivery in deliveries):
                os.kill(os.getpid(), signal.SIGKILL)
            if seconds_per_batch:
                time.sleep(seconds_per_batch)
            answers = consumer.settle([Ending(delivery) for delivery in deliveries])
            tell(settled=[answer.outcome.value for answer in answers])


def hold(url: str, *, queue: str, name: str, lease: float) -> None:
    """Receive one message and do with it what each line of the input says: ``settle``, ``extend`` or ``release``."""
    with open_transport(url) as transport:
        consumer = transport.consumer([queue], lease=lease, prefetch=1, name=name)
        tell(ready=True)
        deliveries: list[Delivery] = []
        while not deliveries:
            deliveries = consumer.receive(1, 1.0)
        tell(received=[describe(delivery) for delivery in deliveries])
        follow_up = Message(deliveries[0].message.id + "-next", f"{queue}-next", b"")
        for line in sys.stdin:
            match line.strip():
                case "settle":
                    answers = consumer.settle([Ending(deliveries[0], (follow_up,))])
                case "extend":
                    answers = consumer.extend(deliveries)
                case "release":
                    consumer.release(deliveries)
                    answers = []
                case command:
                    raise ValueError(command)
            tell(done=[answer.outcome.value for answer in answers])


def fork(url: str, *, queue: str) -> None:
    """Publish, fork, and publish and receive on both sides."""
    with open_transport(url) as transport:
        transport.publish([Message(f"{queue}-before", queue, b"before")])
        consumer = transport.consumer([queue], lease=60.0, prefetch=1, name=f"{queue}-parent")
        (before,) = consumer.receive(1, 10.0)
        child = os.fork()
        if not child:
            publish_and_receive(url, queue)
            transport.forget()
            send_and_take(transport, queue, "child")
            os._exit(0)  # without closing what is the parent's
        _, status = os.waitpid(child, 0)
        settled = consumer.settle([Ending(before)])
        send_and_take(transport, queue, "parent")
        tell(child_status=status, settled=[answer.outcome.value for answer in settled])


def publish_and_receive(url: str, queue: str) -> None:
    """In a forked child: the same broker, opened anew beside the one that the parent has."""
    with open_transport(url) as transport:
        send_and_take(transport, queue, "child-anew")


def send_and_take(transport: Transport, queue: str, who: str) -> None:
    """Publish one message to a queue of one's own, receive it and settle it."""
    own = f"{queue}-{who}"
    transport.publish([Message(own, own, who.encode())])
    with transport.consumer([own], lease=60.0, prefetch=1, name=own) as consumer:
        (delivery,) = consumer.receive(1, 10.0)
        (answer,) = consumer.settle([Ending(delivery)])
    transport.publish([Message(f"{own}-done", queue, f"{who}: {answer.outcome.value}".encode())])


def fork_backend(url: str, *, task_id: str) -> None:
    """Use a backend, fork, and use it on both sides."""
    with open_backend(url) as backend:
        backend.write(f"{task_id}-before", b"")
        child = os.fork()
        if not child:
            backend.forget_connections()
            version = backend.write(f"{task_id}-child", b"")
            os._exit(0 if version == 1 else 1)
        _, status = os.waitpid(child, 0)
        backend.write(f"{task_id}-parent", b"")
        tell(child_status=status, records=len(backend.scan(task_id)))


def begin(url: str, *, task_ids: list[str], message_id: str) -> None:
    """Begin each task out of ``message_id`` when the first line of the input comes, and tell what was answered."""
    with open_backend(url) as backend:
        tell(ready=True)
        sys.stdin.readline()
        outcomes = [backend.begin([Start(task_id, 0, message_id, 60.0)])[0].outcome for task_id in task_ids]
        tell(outcomes=[outcome.value for outcome in outcomes])


def increment(url: str, *, key: str, times: int) -> None:
    """Add one to a record, ``times`` times, in competition with others."""
    with open_backend(url) as backend:
        tell(ready=True)
        sys.stdin.readline()
        for _ in range(times):
            while True:
                (record,) = backend.read([key])
                value, version = (int(record.value), record.version) if record else (0, 0)
                if backend.write(key, b"%d" % (value + 1), expected_version=version) is not None:
                    break
        tell(done=True)


def wait(url: str, *, task_id: str) -> None:
    """Wait for a result, and tell when (by the clock that all processes of this machine share) it was there."""
    with open_backend(url) as backend:
        tell(ready=True)
        while not (found := backend.wait([task_id], 10.0)):
            pass
        tell(body=found[0].body.decode(), at=time.monotonic())


def describe(delivery: Delivery) -> dict[str, Any]:
    """A delivery as JSON has it."""
    message = delivery.message
    return {"id": message.id, "body": message.body.decode("latin-1"), "attempt": delivery.attempt, "at": time.time()}


def tell(**what: object) -> None:
    """Write one line, which the test reads."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


PROGRAMS: dict[str, Callable[..., None]] = {
    program.__name__: program for program in (work, hold, fork, fork_backend, begin, increment, wait)
}

if __name__ == "__main__":
    _, broker_url, program_name, arguments = sys.argv
    PROGRAMS[program_name](broker_url, **json.loads(arguments))
