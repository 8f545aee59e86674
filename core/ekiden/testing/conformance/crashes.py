"""A bug on a thread of the transport's or the backend's own: it is told, once, and nobody waits for a dead thread."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor

from ekiden.errors import BackendError, TransportCrashed, TransportError
from ekiden.message import Delivery, Ending, Message, PublishOutcome, SettleOutcome, new_id
from ekiden.results import Backend, StoredResult
from ekiden.testing.conformance.fixtures import (
    PATIENCE,
    BackendFixtures,
    TransportFixtures,
    a_message,
    a_result,
    bodies,
    eventually,
    let_it_wait,
)
from ekiden.transport import Consumer, Transport


class Crash(Exception):
    """What no code expects."""


def crash(own_threads: str) -> None:
    """Raise ``Crash`` in each thread whose name begins so, as soon as it runs; wake one that sleeps."""
    for thread in threading.enumerate():
        if thread.name.startswith(own_threads):
            assert thread.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Crash))


class Crashes(TransportFixtures):
    """What a transport owes to those who use it when its own code has failed on a thread of its own."""

    own_threads = "ekiden-"
    """How the names of the threads begin in which the transport's own code runs. Override it where it is otherwise."""

    def test_a_crash_on_its_own_thread_is_told_and_not_for_ever(self, url: str, queue: str) -> None:
        name = new_id()
        with self.open_transport(url) as transport, ThreadPoolExecutor() as threads:
            consumer = self.consume(transport, queue, name=name)
            transport.publish([a_message(queue, b"before")])
            held = self.collect_one(consumer)
            receiving = threads.submit(_receive_until_something_happens, consumer)
            let_it_wait()

            crash(self.own_threads)
            after = a_message(queue, b"after")
            eventually(lambda: _is_stored(transport, after), what="publishing works again")

            received = receiving.result(PATIENCE)
            (settled,) = consumer.settle([Ending(held)])
            if isinstance(received, TransportCrashed):
                assert settled.outcome is not SettleOutcome.SETTLED
                self.assert_of_no_use(consumer, held)
                expected = {b"after", b"before"}
            else:
                assert settled.outcome is SettleOutcome.SETTLED
                consumer.close()
                expected = {b"after"}
            successor = self.consume(transport, queue, name=name)
            found: set[bytes] = set()
            while found != expected:  # a broker that cannot name duplicates may have one of them twice
                found.update(bodies(self.collect(successor, 1)))
            assert transport.stalled() is None

    def test_a_crash_on_its_own_thread_ends_no_listening_unheard(self, url: str, queue: str) -> None:
        with self.open_transport(url) as transport:
            listener = transport.listen(queue)
            transport.broadcast(queue, [b"before"])
            assert listener.receive(PATIENCE) == [b"before"]

            crash(self.own_threads)
            eventually(lambda: _is_broadcast(transport, queue), what="broadcasting works again")

            try:
                while (heard := listener.receive(PATIENCE)) == []:
                    continue
            except TransportCrashed:
                listener.close()
                with transport.listen(queue) as successor:
                    transport.broadcast(queue, [b"after"])
                    heard = successor.receive(PATIENCE)
            assert set(heard) == {b"after"}

    def assert_of_no_use(self, consumer: Consumer, held: Delivery) -> None:
        """Whatever this consumer is asked, it says that it has crashed; it can be closed."""
        for _ in range(2):
            assert isinstance(_receive_until_something_happens(consumer), TransportCrashed)
            (settled,) = consumer.settle([Ending(held)])
            (extended,) = consumer.extend([held])
            assert settled.outcome is extended.outcome is SettleOutcome.FAILED
            assert isinstance(settled.error, TransportCrashed)
            assert isinstance(extended.error, TransportCrashed)
        consumer.close()


class BackendCrashes(BackendFixtures):
    """What a backend owes to those who wait when its own code has failed on a thread of its own."""

    own_threads = "ekiden-"
    """How the names of the threads begin in which the backend's own code runs. Override it where it is otherwise."""

    def test_a_crash_on_its_own_thread_keeps_nobody_waiting(self, url: str) -> None:
        first, second = new_id(), new_id()
        with self.open_backend(url) as backend, ThreadPoolExecutor() as threads:
            waiting = threads.submit(_wait_until_something_happens, backend, first)
            let_it_wait(0.5)

            crash(self.own_threads)
            backend.put([a_result(task_id=new_id()), a_result(task_id=first)])

            told = waiting.result(PATIENCE)
            assert isinstance(told, BackendError) or [each.task_id for each in told] == [first]
            later = threads.submit(_wait_until_something_happens, backend, second)
            let_it_wait(0.5)
            backend.put([a_result(task_id=second)])
            found = later.result(PATIENCE)
            assert not isinstance(found, BackendError)
            assert [each.task_id for each in found] == [second]


def _receive_until_something_happens(consumer: Consumer) -> list[Delivery] | TransportCrashed:
    """What it receives; or that it has crashed. What may be over some time is waited for as long as tests wait."""
    while True:
        try:
            received = consumer.receive(10, PATIENCE)
        except TransportCrashed as error:
            return error
        if received:
            return received


def _wait_until_something_happens(backend: Backend, task_id: str) -> list[StoredResult] | BackendError:
    try:
        return backend.wait([task_id], PATIENCE * 3)
    except BackendError as error:
        return error


def _is_stored(transport: Transport, message: Message) -> bool:
    try:
        (answer,) = transport.publish([message])
    except TransportError:
        return False
    return answer.outcome is not PublishOutcome.FAILED


def _is_broadcast(transport: Transport, topic: str) -> bool:
    try:
        transport.broadcast(topic, [b"after"])
    except TransportError:
        return False
    return True
