"""Revoking: what is stored, what is broadcast, what is refused."""

from collections.abc import Iterator

import msgspec
import pytest
from ekiden import Ekiden
from ekiden.control import CONTROL_TOPIC, REVOKED_PREFIX, ControlMessage, read_control_message, revocations
from ekiden.errors import MisuseError
from ekiden.transport import Listener


@pytest.fixture
def listener(ekiden_app: Ekiden) -> Iterator[Listener]:
    with ekiden_app.transport.listen(CONTROL_TOPIC) as listener:
        yield listener


def test_a_revocation_is_a_record_and_tells_nobody(ekiden_app: Ekiden, listener: Listener) -> None:
    ekiden_app.control.revoke(["a", "b"])

    found = revocations(ekiden_app.backend, ["a", "b", "c"])
    assert {task_id: each.terminate for task_id, each in found.items()} == {"a": False, "b": False}
    assert listener.receive(0.05) == []


def test_terminating_tells_every_worker_to_look(ekiden_app: Ekiden, listener: Listener) -> None:
    ekiden_app.AsyncResult("a").revoke(terminate=True)

    (payload,) = listener.receive(5)
    assert read_control_message(payload) == ControlMessage(("a",))
    assert revocations(ekiden_app.backend, ["a"])["a"].terminate


@pytest.mark.parametrize("ids", [[""], [5], [None], ["a", ""]])
def test_what_is_no_task_id_is_refused(ekiden_app: Ekiden, ids: list[str]) -> None:
    with pytest.raises(MisuseError, match="takes task ids"):
        ekiden_app.control.revoke(ids)


@pytest.mark.parametrize("payload", [b"", b"garbage", b"[]", b'{"revoked":5}', b"\xff"])
def test_a_broadcast_that_is_not_understood_is_passed_over(payload: bytes) -> None:
    assert read_control_message(payload) is None


def test_a_worker_survives_every_broadcast_and_record(ekiden_app: Ekiden) -> None:
    @ekiden_app.task
    def add(x: int) -> int:
        return x

    with ekiden_app.worker(threads=1):
        for payload in (b"", b"garbage", b'{"revoked":["x"]}', b'{"new field":1}', b"\xff"):
            ekiden_app.transport.broadcast(CONTROL_TOPIC, [payload])
        result = add.apply_async((1,), task_id="with-an-odd-record", countdown=0.05)
        ekiden_app.backend.write(
            REVOKED_PREFIX + "with-an-odd-record", msgspec.json.encode({"at": 1.0, "terminate": False, "new": [1]})
        )
        assert add.delay(2).get(10) == 2
        assert result.get(10, propagate=False) is not None
