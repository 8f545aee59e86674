"""The file is deleted, replaced or moved while processes have it open: they notice it, say so, and meet again."""

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ekiden.errors import BrokerUnavailable, TransportError
from ekiden.message import STORED, Ending, Message, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Backend, StoredResult
from ekiden.sqlite.bell import _directory_for
from ekiden.testing.conformance.fixtures import eventually
from ekiden.transport import Transport

NOTICED_WITHIN = 10.0


def delete_the_file(path: Path) -> None:
    path.unlink()


def delete_all_that_belongs_to_it(path: Path) -> None:
    for each in path.parent.glob("tasks.db*"):
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def move_the_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.mkdir()


def put_a_copy_in_its_place(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copyfile(path, copy)
    copy.rename(path)


def put_an_empty_file_in_its_place(path: Path) -> None:
    path.with_name("empty").touch()
    path.with_name("empty").rename(path)


def remove_the_wal(path: Path) -> None:
    Path(f"{path}-wal").unlink()


def remove_the_index(path: Path) -> None:
    Path(f"{path}-shm").unlink()


def remove_wal_and_index(path: Path) -> None:
    remove_the_wal(path)
    remove_the_index(path)


LOSING = [
    delete_the_file,
    delete_all_that_belongs_to_it,
    move_the_directory,
    put_a_copy_in_its_place,
    put_an_empty_file_in_its_place,
]
KEEPING = [remove_the_wal, remove_the_index, remove_wal_and_index]

every_harm = pytest.mark.parametrize("harm", LOSING + KEEPING)
Harm = Callable[[Path], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "tasks.db"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def sender(path: Path, opened: ExitStack) -> Transport:
    return opened.enter_context(open_transport(f"sqlite:///{path}"))


@pytest.fixture
def worker(path: Path, opened: ExitStack) -> Transport:
    return opened.enter_context(open_transport(f"sqlite:///{path}"))


@pytest.fixture
def backend(path: Path, opened: ExitStack) -> Backend:
    return opened.enter_context(open_backend(f"sqlite:///{path}"))


def publish(transport: Transport, queue: str = "queue") -> str:
    message = Message(new_id(), queue, b"")
    assert transport.publish([message]) == [STORED]
    return message.id


def assert_undamaged(path: Path) -> None:
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


@every_harm
@pytest.mark.slow
def test_sender_and_consumer_meet_again(
    path: Path, sender: Transport, worker: Transport, harm: Harm, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = worker.consumer(["queue"], lease=60, prefetch=10_000, name="worker")
    first = publish(sender)
    (delivery,) = consumer.receive(1, 5)
    assert delivery.message.id == first
    sender.browse("queue")

    harm(path)

    def meet() -> bool:
        sent = publish(sender)
        noticed = any("the file" in record.getMessage() for record in caplog.records)
        return sent in {delivery.message.id for delivery in consumer.receive(1000, 0.2)} and noticed

    eventually(meet, what="what is sent arrives", within=NOTICED_WITHIN)
    assert [record.levelname for record in caplog.records if "the file" in record.getMessage()] in (
        ["ERROR"],
        ["ERROR", "ERROR"],
    )
    assert_undamaged(path)


@every_harm
@pytest.mark.slow
def test_a_process_that_comes_later_meets_those_that_were_there(path: Path, worker: Transport, harm: Harm) -> None:
    consumer = worker.consumer(["queue"], lease=60, prefetch=10_000, name="worker")
    publish(worker)
    assert consumer.receive(1, 5)
    program = """
import sys
from tests.unit.test_sqlite_replaced_file import open_transport, publish
with open_transport(sys.argv[1]) as transport:
    print(publish(transport))
"""
    harm(path)

    def meet() -> bool:
        command = [sys.executable, "-c", program, f"sqlite:///{path}"]
        sent = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
        return sent in {delivery.message.id for delivery in consumer.receive(1000, 1.0)}

    eventually(meet, what="what is sent arrives", within=30)
    assert_undamaged(path)


@every_harm
def test_who_waits_for_a_result_is_told(path: Path, backend: Backend, opened: ExitStack, harm: Harm) -> None:
    storing = opened.enter_context(open_backend(f"sqlite:///{path}"))
    storing.put([StoredResult(new_id(), "SUCCESS", 0, b"")])
    result = StoredResult(new_id(), "SUCCESS", 0, b"1")
    told: list[StoredResult] = []
    thread = threading.Thread(target=lambda: told.extend(backend.wait([result.task_id], 60)))
    thread.start()
    backend.get([result.task_id])

    harm(path)

    give_up = time.monotonic() + NOTICED_WITHIN
    while thread.is_alive() and time.monotonic() < give_up:
        storing.put([result])
        thread.join(0.2)
    assert told == [result]


@every_harm
def test_who_listens_hears_again(path: Path, sender: Transport, worker: Transport, harm: Harm) -> None:
    listener = worker.listen("topic")
    for number in range(5):
        sender.broadcast("topic", [b"%d" % number])
    assert len(listener.receive(5)) > 0

    harm(path)

    def meet() -> bool:
        sender.broadcast("topic", [b"after"])
        return b"after" in listener.receive(0.2)

    eventually(meet, what="what is broadcast is heard", within=NOTICED_WITHIN)


@every_harm
def test_an_open_reply_queue_is_there_again(path: Path, sender: Transport, worker: Transport, harm: Harm) -> None:
    consumer = worker.consumer(["reply.me"], lease=60, prefetch=10_000, name="me")
    publish(sender, "reply.me")
    assert consumer.receive(1, 5)

    harm(path)

    def meet() -> bool:
        sent = publish(sender, "reply.me")
        return sent in {delivery.message.id for delivery in consumer.receive(1000, 0.2)}

    eventually(meet, what="a reply arrives", within=NOTICED_WITHIN)


@pytest.mark.parametrize("harm", KEEPING)
def test_what_is_only_in_the_wal_is_saved(
    path: Path, sender: Transport, backend: Backend, harm: Harm, caplog: pytest.LogCaptureFixture
) -> None:
    sender.depth("queue")
    result = StoredResult(new_id(), "SUCCESS", 0, b"1")
    backend.put([result])
    sent = {publish(sender) for _ in range(20)}

    harm(path)

    def noticed() -> bool:
        sender.browse("queue", limit=1)
        return any("Nothing is lost" in record.getMessage() for record in caplog.records)

    eventually(noticed, what="it is noticed", within=NOTICED_WITHIN)
    assert sent <= {seen.message.id for seen in sender.browse("queue")}
    assert backend.get([result.task_id]) == [result]
    assert_undamaged(path)


def test_a_directory_that_is_gone_is_unavailable_until_it_is_back(
    path: Path, sender: Transport, worker: Transport
) -> None:
    consumer = worker.consumer(["queue"], lease=60, prefetch=10_000, name="worker")
    publish(sender)
    assert consumer.receive(1, 5)
    away = path.parent.with_name("away")
    path.parent.rename(away)

    def refusal(act: Callable[[], object]) -> TransportError | None:
        try:
            act()
        except TransportError as error:
            return error
        return None

    for act in (lambda: publish(sender), lambda: consumer.receive(1, 0.1)):
        error = eventually(lambda act=act: refusal(act), what="it is noticed", within=NOTICED_WITHIN)
        assert isinstance(error, BrokerUnavailable)
        assert str(error).startswith(f"sqlite:///{path}: the file cannot be opened or made")

    away.rename(path.parent)

    assert publish(sender) in {delivery.message.id for delivery in consumer.receive(1000, 5)}


def test_a_link_that_leads_elsewhere_now_is_followed(path: Path, tmp_path: Path, opened: ExitStack) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    sender, worker = (opened.enter_context(open_transport(f"sqlite:///{link}/tasks.db")) for _ in range(2))
    consumer = worker.consumer(["queue"], lease=60, prefetch=10_000, name="worker")
    publish(sender)
    assert consumer.receive(1, 5)
    other = tmp_path / "other"
    other.symlink_to(tmp_path / "there")
    other.rename(link)

    def meet() -> bool:
        sent = publish(sender)
        found = {delivery.message.id for delivery in consumer.receive(1000, 0.2)}
        return sent in found and (tmp_path / "there" / "tasks.db").exists()

    eventually(meet, what="what is sent arrives there", within=NOTICED_WITHIN)


@pytest.mark.parametrize("harm", [delete_the_file, put_a_copy_in_its_place])
def test_what_was_in_hand_is_lost_or_settled_and_nothing_else(
    path: Path, sender: Transport, worker: Transport, harm: Harm
) -> None:
    consumer = worker.consumer(["queue"], lease=60, prefetch=10_000, name="worker")
    publish(sender)
    (delivery,) = consumer.receive(1, 5)
    harm(path)
    eventually(lambda: publish(sender) and worker.depth("queue").ready, what="it is noticed", within=NOTICED_WITHIN)

    (answer,) = consumer.settle([Ending(delivery)])

    assert answer.error is None


def test_removed_bells_are_hung_up_again(path: Path, sender: Transport, worker: Transport) -> None:
    consumer = worker.consumer(["queue"], lease=60, prefetch=10_000, name="worker")
    bells = Path(_directory_for(str(path)))
    assert consumer.receive(1, 0.1) == []
    assert list(bells.iterdir())
    shutil.rmtree(bells)

    consumer.receive(1, 1.0)

    assert list(bells.iterdir())
    publish(sender)
    assert consumer.receive(1, 5)
