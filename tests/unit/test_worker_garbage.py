"""Whatever is in a queue, the worker survives it, and each message ends in ``<queue>.dead``."""

import base64
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.codec import decode_call
from ekiden.message import Message, new_id
from ekiden.testing.plugin import StartWorker, throw_away_url

from tests.working import PATIENCE, dead_letters, eventually, is_empty

ENTRIES: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "corpus" / "garbage.json").read_text())


@pytest.fixture(params=["memory", pytest.param("sqlite", marks=pytest.mark.slow)])
def ekiden_broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return throw_away_url(f"{request.param}://", tmp_path)


@pytest.fixture
def app(ekiden_app: Ekiden) -> Ekiden:
    ekiden_app.conf.unknown_task_grace = 0
    ekiden_app.conf.worker_grace = 3

    @ekiden_app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    return ekiden_app


def message_of(entry: dict[str, Any], message_id: str | None = None) -> Message:
    """The message that an entry of the corpus describes."""
    part, times = entry.get("repeat", ["", 0])
    message_id = message_id or new_id()

    def filled(text: str) -> str:
        return text.replace("REPEAT", part * times).replace('"ID"', json.dumps(message_id))

    headers = {
        name: filled(value) if isinstance(value, str) else value for name, value in entry.get("headers", {}).items()
    }
    return Message(message_id, "default", filled(entry["body"]).encode(entry.get("encoding", "utf-8")), headers)


def assert_all_dead_and_the_worker_well(app: Ekiden, messages: list[Message]) -> None:
    eventually(lambda: is_empty(app), what="the queue is empty")
    dead = {each.headers["ekiden-dead-queue"]: each for each in dead_letters(app)}
    bodies = sorted(each.body for each in dead_letters(app))
    assert bodies == sorted(each.body for each in messages)
    assert set(dead) <= {"default"}
    assert app.tasks["add"].delay(1, 2).get(PATIENCE) == 3


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["name"] for entry in ENTRIES])
def test_each_kind_of_garbage_alone(app: Ekiden, ekiden_worker: StartWorker, entry: dict[str, Any]) -> None:
    message = message_of(entry)
    app.transport.publish([message])

    ekiden_worker(threads=1)

    eventually(lambda: is_empty(app), what="the queue is empty")
    (dead,) = dead_letters(app)
    assert dead.body == message.body
    assert dead.headers["ekiden-dead-queue"] == "default"
    assert dead.headers["ekiden-dead-attempts"] == 1
    assert dead.headers["ekiden-dead-reason"]
    assert len(str(dead.headers["ekiden-dead-error"])) <= 1000
    own = {name: value for name, value in message.headers.items() if not name.startswith("ekiden-")}
    assert own.items() <= dict(dead.headers).items()
    assert app.tasks["add"].delay(1, 2).get(PATIENCE) == 3


def test_all_of_it_at_once(app: Ekiden, ekiden_worker: StartWorker) -> None:
    messages = [message_of(entry) for entry in ENTRIES]
    app.transport.publish(messages)

    ekiden_worker()

    assert_all_dead_and_the_worker_well(app, messages)


def test_garbage_whose_ids_are_garbage_too(app: Ekiden, ekiden_worker: StartWorker) -> None:
    ids = ["x", "-", "ffffffffffffffff", "0" * 12, "-1_0x000000000", "größe", "a/b c", "i" * 1000, "'; --"]
    messages = [message_of(entry, message_id) for message_id in ids for entry in ENTRIES[:2]][::2]
    messages += [Message(f"{message_id}2", "default", b'{"v":7}') for message_id in ids]
    app.transport.publish(messages)

    ekiden_worker()

    assert_all_dead_and_the_worker_well(app, messages)


# The fuzzer: good messages, made bad at random. What is left of them may still be good.

MUTATIONS: list[Callable[[random.Random, bytes], bytes]] = [
    lambda rng, body: body[: rng.randrange(len(body))],
    lambda rng, body: body[: (at := rng.randrange(len(body)))] + bytes([rng.randrange(256)]) + body[at + 1 :],
    lambda rng, body: body[: (at := rng.randrange(len(body)))] + rng.randbytes(3) + body[at:],
    lambda rng, body: body.replace(rng.choice([b"1", b"2", b'"', b"{", b"]", b":", b"a"]), rng.choice(TOKENS), 1),
    lambda rng, body: with_a_changed_field(rng, body),  # noqa: PLW0108 - it is defined below
    lambda rng, body: rng.randbytes(rng.randrange(1, 100)),
]
TOKENS = [b"null", b"-1", b"1e999", b"[]", b"{}", b'"x"', b"true", b"", b"99999999999999999999", b"\xff", b"\\u0000"]
FIELDS = [
    "v",
    "task",
    "id",
    "sent",
    "args",
    "kwargs",
    "retries",
    "eta",
    "expires",
    "root",
    "parent",
    "on_success",
    "on_error",
    "ignore_result",
    "time_limit",
    "soft_time_limit",
    "fenced",
]
ODD: list[Any] = [
    None,
    -1,
    0,
    1,
    2**63,
    2**70,
    -0.5,
    1e300,
    1e-300,
    "",
    "x",
    "\x00",
    [],
    {},
    [[]],
    [{}],
    {"a": []},
    True,
]


def with_a_changed_field(rng: random.Random, body: bytes) -> bytes:
    try:
        fields = json.loads(body)
        fields[rng.choice(FIELDS)] = rng.choice(ODD)
        if rng.random() < 0.3:
            fields["on_success"] = [
                {"task": "add", rng.choice(["queue", "priority", "countdown", "headers"]): rng.choice(ODD)}
            ]
    except (ValueError, TypeError):
        return body
    return json.dumps(fields).encode()


def mutated(rng: random.Random) -> bytes:
    call = {"v": 1, "task": "add", "id": new_id(), "sent": time.time(), "args": [1, 2]}
    call |= rng.choice([{}, {"on_error": [{"task": "add"}]}, {"retries": 1, "fenced": True}, {"kwargs": {}}])
    body = json.dumps(call).encode()
    for _ in range(rng.randrange(1, 4)):
        body = rng.choice(MUTATIONS)(rng, body) or b" "
    return body


def fuzz(app: Ekiden, seed: int, count: int) -> None:
    rng = random.Random(seed)
    messages = [Message(new_id(), "default", mutated(rng)) for _ in range(count)]
    app.transport.publish(messages)

    def is_left() -> list[Any]:
        """What has not been settled, save what may wait: follow-ups that are due in a far future."""
        left = app.transport.browse("default", limit=10_000)
        return [seen for seen in left if not (seen.message.due or 0) > time.time() + 100]

    eventually(lambda: not is_left(), what=f"seed {seed}: everything is settled", within=30)
    dead = {each.body for each in dead_letters(app)}
    for message in messages:
        if message.body not in dead:
            _assert_was_a_call(app, seed, message)
    assert app.tasks["add"].delay(1, 2).get(PATIENCE) == 3


def _assert_was_a_call(app: Ekiden, seed: int, message: Message) -> None:
    """What did not die was still a call, and has ended, or was delayed, or lost to another of the same id."""
    call = decode_call(message.body, {})
    assert call.task == "add", f"seed {seed}: {base64.b64encode(message.body)!r}"
    unknown = call.ignore_result or call.fenced
    assert unknown or app.AsyncResult(call.id).state in {"SUCCESS", "EXPIRED"}, f"seed {seed}: {message.body!r}"


def test_a_fuzzed_queue(app: Ekiden, ekiden_worker: StartWorker) -> None:
    ekiden_worker()

    for seed in range(4):
        fuzz(app, seed, 300)


@pytest.mark.slow
def test_a_queue_fuzzed_for_long(app: Ekiden, ekiden_worker: StartWorker) -> None:
    ekiden_worker()

    for seed in range(100, 130):
        fuzz(app, seed, 500)
