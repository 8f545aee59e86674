"""Two workers never take each other for dead: names are unique, and a chosen name that is in use is refused."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
from ekiden.plan import EXIT_UNUSABLE

from tests.faults.ground import Ground

CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""In a container the supervisor is process 1, and replicas may have one host name."""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare makes the namespace in which it is process 1")
def test_two_containers_of_one_host_name_do_not_take_each_others_work(ground: Ground) -> None:
    first = ground.start(under=CONTAINER)
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")

    ground.start(under=CONTAINER)
    ground.app.send_task("work", (2,))
    ground.ledger.wait("work")
    ground.open()
    ground.wait_until_empty()

    assert ground.ledger.done() == {1: 1, 2: 1}
    assert len(ground.ledger.entries("begun")) == 1
    assert not first.said("was lost")


def test_a_name_that_a_living_worker_has_is_refused(ground: Ground) -> None:
    first = ground.start(name="web", processes=2)
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")

    second = ground.start(name="web", processes=2, ready=False)

    assert second.wait() == EXIT_UNUSABLE
    assert len(second.said(r"^Error: A worker named 'web:1' is running already\. Choose another name")) == 1
    assert not second.said("Traceback")
    first.wait_until_it_says("another worker was started under the name web:1")
    ground.open()
    ground.wait_until_empty()
    assert ground.ledger.done() == {1: 1}
    assert len(ground.ledger.entries("begun")) == 1


def test_a_chosen_name_takes_over_what_its_dead_worker_held(ground: Ground) -> None:
    first = ground.start(name="web", lease=600.0)
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")

    first.signal_everyone(signal.SIGKILL)
    ground.start(name="web", lease=600.0)

    assert ground.ledger.wait("begun", 2)[1]["attempt"] == 2
    ground.open()
    ground.wait_until_empty()


def test_a_process_that_is_replaced_keeps_the_chosen_name(ground: Ground) -> None:
    worker = ground.start(name="web", lease=600.0)
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")

    os.kill(worker.worker_pids()[0], signal.SIGKILL)

    assert ground.ledger.wait("begun", 2)[1]["attempt"] == 2
    ground.open()
    ground.wait_until_empty()
    assert len(worker.said("web:1 is ready")) == 2
