"""What becomes of a message: the table in ``ekiden.execution``, walked row by row, and what the fence adds to it."""

import itertools
from typing import Any, get_args

import msgspec
import pytest
from ekiden import execution
from ekiden.codec import FailureRecord, decode_call, decode_outcome, encode_call
from ekiden.execution import Context, Verdict, dead_letter, redriven, stored_outcome, verdict
from ekiden.message import Delivery, Message, derived_id
from ekiden.options import Policy, Sending, TaskOptions, policy
from ekiden.outcomes import (
    AlreadyEnded,
    Expired,
    Failed,
    Ignored,
    Outcome,
    Postponed,
    Rejected,
    Retried,
    Revoked,
    SecondCopy,
    Succeeded,
    Unprocessable,
)
from ekiden.replies import REPLY_TO_HEADER
from ekiden.settings import Settings
from ekiden.signature import Call, Step

NOW = 1_800_000_000.0
FAILURE = FailureRecord("builtins.ValueError", "no such user", ("no such user",), "Traceback ...")
POLICY = policy(Settings(), TaskOptions())

CALL = Call(
    task="shop.add",
    id="00000000000000000000000000000001",
    sent=NOW - 60,
    args=[1, 2],
    kwargs={"z": 3},
    on_success=(Step("shop.then", ("more",)), Step("shop.audit", immutable=True)),
    on_error=(Step("shop.sorry"),),
)
MESSAGE = Message(CALL.id, "orders", b"{}", {"trace": "abc"}, 7)
DELIVERY = Delivery(MESSAGE, tag=1, attempt=2)


def route(task: str, queue: str | None, priority: int | None) -> Sending:
    return Sending(queue or f"queue-of-{task}", 4 if priority is None else priority, "", "")


CONTEXT = Context(NOW, "worker-1", route, 3600.0)


def judged(outcome: Outcome, call: Call | None = CALL, policy: Policy | None = POLICY, **context: Any) -> Verdict:
    return verdict(DELIVERY, call, policy, outcome, msgspec.structs.replace(CONTEXT, **context))


def judged_for(reply_to: Any, outcome: Outcome, call: Call | None = CALL, **context: Any) -> Verdict:
    """The verdict on a message whose sender waits for replies."""
    message = msgspec.structs.replace(MESSAGE, headers={"trace": "abc", REPLY_TO_HEADER: reply_to})
    policy = None if call is None else POLICY
    return verdict(Delivery(message, 1, 2), call, policy, outcome, msgspec.structs.replace(CONTEXT, **context))


def kinds(found: Verdict) -> list[str]:
    """What is published, in the words of the table."""
    return [_kind(message) for message in found.publish]


def _kind(message: Message) -> str:
    if message.queue == "orders.dead":
        return "a copy to .dead"
    call = decode_call(message.body, {})
    if call.task == CALL.task:
        return "the same call, one more try, due later"
    return "what follows on error" if call.task == "shop.sorry" else "what follows on success"


# The table.

EXAMPLES: dict[str, Outcome] = {
    "Succeeded": Succeeded(msgspec.Raw(b"3")),
    "Retried": Retried(NOW + 30, FAILURE),
    "Failed": Failed(FAILURE),
    "Ignored": Ignored(),
    "Rejected": Rejected("not mine", requeue=False),
    "Rejected, requeue": Rejected("later", requeue=True),
    "Expired": Expired(),
    "Revoked": Revoked(),
    "Unprocessable": Unprocessable(FAILURE),
    "Postponed": Postponed(12.5, "its rate limit"),
    "SecondCopy": SecondCopy(),
    "AlreadyEnded": AlreadyEnded("SUCCESS", b'{"v":1,"value":3}'),
}


def table() -> list[tuple[str, str, str, str]]:
    """The rows of the docstring: outcome, stored, published, delivery."""
    lines = (execution.__doc__ or "").splitlines()
    head = next(line for line in lines if line.split() == ["outcome", "stored", "published", "delivery"])
    starts = [head.index(word) for word in head.split()]
    rows = []
    for line in lines[lines.index(head) + 1 :]:
        if not line.strip():
            break
        edges = [*starts, len(line)]
        cells = [line[start:end].strip() for start, end in itertools.pairwise(edges)]
        rows.append((cells[0], cells[1], cells[2], cells[3]))
    return rows


ROWS = table()


@pytest.mark.parametrize(("outcome", "stored", "published", "delivery"), ROWS, ids=[row[0] for row in ROWS])
def test_each_row_of_the_table(outcome: str, stored: str, published: str, delivery: str) -> None:
    found = judged(EXAMPLES[outcome])

    assert (found.result.state if found.result else "-") == stored.removesuffix(" *")
    if published == "what follows from the stored outcome":
        assert kinds(found) == ["what follows on success"] * 2
    else:
        assert sorted(set(kinds(found))) == sorted(each for each in published.split("; ") if each != "-")
    if delivery == "settled":
        assert found.release is None
    else:
        assert found.release is not None
        assert found.release > 0


def test_each_kind_of_outcome_has_a_row_and_each_row_an_example() -> None:
    assert {kind.__name__ for kind in get_args(Outcome)} == {row[0].partition(",")[0] for row in ROWS}
    assert {row[0] for row in ROWS} == set(EXAMPLES)


@pytest.mark.parametrize("outcome", EXAMPLES.values(), ids=EXAMPLES)
def test_an_outcome_of_a_body_process_is_the_same_after_its_journey(outcome: Outcome) -> None:
    travelled = msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome)

    assert judged(travelled) == judged(outcome)


@pytest.mark.parametrize("outcome", EXAMPLES.values(), ids=EXAMPLES)
def test_a_verdict_is_a_function_of_its_arguments(outcome: Outcome) -> None:
    assert judged(outcome) == judged(outcome)


# Success.


def test_what_follows_a_success_is_called_with_its_value_first() -> None:
    then, audit = judged(Succeeded(msgspec.Raw(b'{"total":3}'))).publish

    assert decode_call(then.body, {}).args == [{"total": 3}, "more"]
    assert not decode_call(audit.body, {}).args
    assert (then.queue, then.priority) == ("queue-of-shop.then", 4)


def test_what_follows_knows_where_it_comes_from_and_is_fenced() -> None:
    call = msgspec.structs.replace(CALL, root="the-root")

    follow_ups = [decode_call(message.body, {}) for message in judged(Succeeded(), call).publish]

    assert {(each.root, each.parent, each.fenced) for each in follow_ups} == {("the-root", CALL.id, True)}
    assert [each.id for each in follow_ups] == [derived_id(CALL.id, "success 0"), derived_id(CALL.id, "success 1")]


def test_the_follow_up_of_a_root_has_that_root() -> None:
    follow_up = decode_call(judged(Succeeded()).publish[0].body, {})

    assert follow_up.root == CALL.id


def test_a_step_keeps_its_own_options() -> None:
    step = Step(
        "shop.then",
        kwargs={"a": 1},
        task_id="mine",
        queue="mail",
        priority=9,
        countdown=5.0,
        expires=60.0,
        headers={"lang": "de"},
        ignore_result=True,
        on_success=(Step("shop.last"),),
        on_error=(Step("shop.sorry"),),
    )

    (message,) = judged(Succeeded(), msgspec.structs.replace(CALL, on_success=(step,))).publish

    call = decode_call(message.body, {})
    assert (message.id, message.queue, message.priority, message.due) == ("mine", "mail", 9, NOW + 5)
    assert (dict(message.headers), call.id, call.eta, call.expires) == ({"lang": "de"}, "mine", NOW + 5, NOW + 60)
    assert (call.kwargs, call.ignore_result) == ({"a": 1}, True)
    assert [each.task for each in (*call.on_success, *call.on_error)] == ["shop.last", "shop.sorry"]


def test_a_result_tells_all_that_is_known_of_its_task() -> None:
    outcome = Succeeded(msgspec.Raw(b"3"), children=("child",), runtime=0.5)
    call = msgspec.structs.replace(CALL, retries=2, root="root", parent="parent")

    result = judged(outcome, call).result

    assert result is not None
    record = decode_outcome(result.body)
    assert (result.task_id, result.state, result.step, result.expires) == (CALL.id, "SUCCESS", 2, 3600.0)
    assert (record.task, record.worker, record.queue, record.retries) == (CALL.task, "worker-1", "orders", 2)
    assert (record.done, record.runtime, record.root, record.parent) == (NOW, 0.5, "root", "parent")
    assert record.children == ("child", derived_id(CALL.id, "success 0"), derived_id(CALL.id, "success 1"))


# Which results are kept.


@pytest.mark.parametrize(
    ("by_task", "by_call", "fenced", "stores", "kept"),
    [
        (False, None, False, True, True),
        (True, None, False, True, False),
        (True, False, False, True, True),
        (False, True, False, True, False),
        (True, True, True, True, True),  # so that a second copy of it finds that it has ended
        (False, False, True, False, False),
    ],
)
def test_a_result_is_kept_unless_it_is_to_be_ignored(
    by_task: bool, by_call: bool | None, fenced: bool, stores: bool, kept: bool
) -> None:
    call = msgspec.structs.replace(CALL, ignore_result=by_call, fenced=fenced)
    task_policy = policy(Settings(), TaskOptions(ignore_result=by_task))

    for outcome in (Succeeded(), Failed(FAILURE), Retried(NOW, FAILURE), Expired(), Revoked()):
        found = judged(outcome, call, task_policy, stores_results=stores)

        assert (found.result is not None) == kept


def test_an_ignored_success_still_publishes_what_follows() -> None:
    assert (
        kinds(judged(Succeeded(), policy=policy(Settings(), TaskOptions(ignore_result=True))))
        == ["what follows on success"] * 2
    )


def test_an_ignored_success_that_nothing_follows_is_settled_and_that_is_all() -> None:
    call = msgspec.structs.replace(CALL, on_success=())

    assert judged(Succeeded(), call, policy(Settings(), TaskOptions(ignore_result=True))) == Verdict()


# Replies.


@pytest.mark.parametrize(
    "outcome", ["Succeeded", "Retried", "Failed", "Expired", "Revoked", "Unprocessable", "Rejected"]
)
def test_what_would_be_stored_is_replied_to_who_waits(outcome: str) -> None:
    stored = judged(EXAMPLES[outcome])
    assert (stored.reply, stored.reply_to) == (None, None)

    only_replied = judged_for("reply.x", EXAMPLES[outcome], stores_results=False)
    both = judged_for("reply.x", EXAMPLES[outcome])

    assert (only_replied.result, only_replied.reply, only_replied.reply_to) == (None, stored.result, "reply.x")
    assert (both.result, both.reply, both.reply_to) == (stored.result, stored.result, "reply.x")
    assert kinds(only_replied) == kinds(stored)


@pytest.mark.parametrize("outcome", ["Ignored", "Rejected, requeue", "Postponed", "SecondCopy"])
def test_what_ends_nothing_is_not_replied(outcome: str) -> None:
    found = judged_for("reply.x", EXAMPLES[outcome], stores_results=False)

    assert (found.reply, found.publish) == (None, ())


def test_a_reply_is_repeated_with_what_follows() -> None:
    found = judged_for("reply.x", EXAMPLES["AlreadyEnded"])

    assert found.reply is not None
    assert (found.reply.state, bytes(decode_outcome(found.reply.body).value)) == ("SUCCESS", b"3")
    assert found.result is None


@pytest.mark.parametrize("reply_to", ["orders", "", None, 5])
def test_only_reply_queues_are_replied_to(reply_to: Any) -> None:
    found = judged_for(reply_to, Succeeded(), stores_results=False)

    assert (found.reply, found.reply_to) == (None, None)


@pytest.mark.parametrize("fenced", [True, False])
def test_a_result_to_be_ignored_is_not_replied_even_if_it_is_kept_for_the_fence(fenced: bool) -> None:
    call = msgspec.structs.replace(CALL, ignore_result=True, fenced=fenced)

    found = judged_for("reply.x", Succeeded(), call)

    assert found.reply is None
    assert (found.result is not None) == fenced


def test_what_cannot_be_read_is_not_replied() -> None:
    assert judged_for("reply.x", Unprocessable(FAILURE), call=None, stores_results=False).reply is None


@pytest.mark.parametrize("outcome", ["Succeeded", "Retried", "Failed"])
def test_what_follows_answers_to_the_same_caller(outcome: str) -> None:
    found = judged_for("reply.x", EXAMPLES[outcome], stores_results=False)

    dead = [message for message in found.publish if message.queue == "orders.dead"]
    assert {message.headers.get(REPLY_TO_HEADER) for message in found.publish if message not in dead} == {"reply.x"}
    assert not any(REPLY_TO_HEADER in message.headers for message in dead)


# One more try.


def test_the_next_try_is_the_same_call_due_later() -> None:
    (again,) = judged(Retried(NOW + 30, FAILURE)).publish

    call = decode_call(again.body, {})
    assert (again.queue, again.priority, again.due, again.headers) == ("orders", 7, NOW + 30, {"trace": "abc"})
    assert (call.id, call.args, call.kwargs, call.retries) == (CALL.id, [1, 2], {"z": 3}, 1)
    assert (call.on_success, call.on_error, call.fenced) == (CALL.on_success, CALL.on_error, True)


def test_the_next_try_can_have_other_arguments() -> None:
    (again,) = judged(Retried(NOW, args=[9], kwargs={})).publish

    call = decode_call(again.body, {})
    assert (call.args, call.kwargs) == ([9], {})


def test_the_next_try_was_sent_when_the_first_one_was_and_knows_the_last_error() -> None:
    call = msgspec.structs.replace(CALL, expires=NOW + 90)

    again = decode_call(judged(Retried(NOW + 30, FAILURE), call).publish[0].body, {})
    without = decode_call(judged(Retried(NOW + 30), again).publish[0].body, {})

    assert (again.sent, again.eta, again.expires) == (CALL.sent, NOW + 30, NOW + 90)
    assert again.last_error == "ValueError: no such user"
    assert without.last_error is None


@pytest.mark.parametrize("outcome", [Expired(), Revoked(), Revoked(terminated=True)], ids=str)
def test_what_ends_without_its_next_try_tells_what_the_last_one_raised(outcome: Outcome) -> None:
    call = msgspec.structs.replace(CALL, retries=2, last_error="ValueError: no such user")

    result = judged(outcome, call).result

    assert result is not None
    failure = decode_outcome(result.body).failure
    assert failure is not None
    assert failure.message.endswith("; try 2 of it had failed: ValueError: no such user")


def test_a_next_try_that_is_due_already_waits_for_nothing() -> None:
    assert judged(Retried(NOW - 1)).publish[0].due is None


def test_no_two_tries_share_a_message_id() -> None:
    delivery, seen = DELIVERY, [MESSAGE.id]
    for _ in range(20):
        (again,) = verdict(delivery, CALL, POLICY, Retried(NOW), CONTEXT).publish
        delivery = Delivery(again, 1, 1)
        seen.append(again.id)

    assert len(set(seen)) == len(seen)


def test_a_retry_stores_when_and_with_what_the_next_try_is() -> None:
    result = judged(Retried(NOW + 30, FAILURE, args=[9])).result

    assert result is not None
    assert stored_outcome(result.state, result.body) == Retried(NOW + 30, FAILURE, [9], None)


# Failure and dead letters.


def test_what_follows_an_error_is_called_with_the_task_id_first() -> None:
    sorry, _dead = judged(Failed(FAILURE)).publish

    assert decode_call(sorry.body, {}).args == [CALL.id]


def test_a_task_may_want_no_dead_letters_of_its_failures() -> None:
    assert kinds(judged(Failed(FAILURE), policy=policy(Settings(), TaskOptions(dead_letter=False)))) == [
        "what follows on error"
    ]


@pytest.mark.parametrize("outcome", ["Unprocessable", "Rejected"])
def test_what_could_not_be_processed_is_kept_even_so(outcome: str) -> None:
    assert "a copy to .dead" in kinds(
        judged(EXAMPLES[outcome], policy=policy(Settings(), TaskOptions(dead_letter=False)))
    )


@pytest.mark.parametrize("outcome", EXAMPLES.values(), ids=EXAMPLES)
def test_nothing_that_could_not_be_read_stores_a_result(outcome: Outcome) -> None:
    if isinstance(outcome, Succeeded | Retried | AlreadyEnded):
        return  # of a call that was read

    assert judged(outcome, call=None, policy=None).result is None


def test_what_could_not_be_read_is_kept() -> None:
    assert kinds(judged(Unprocessable(FAILURE), call=None, policy=None)) == ["a copy to .dead"]


def test_a_dead_letter_tells_why_and_keeps_the_body_as_it_was() -> None:
    message = msgspec.structs.replace(MESSAGE, body=b"\xff garbage", due=NOW - 5)

    dead = dead_letter(Delivery(message, 1, 3), FAILURE, NOW)

    assert (dead.id, dead.queue, dead.body, dead.priority) == (
        derived_id(message.id, "dead"),
        "orders.dead",
        b"\xff garbage",
        7,
    )
    assert dead.due is None
    assert dict(dead.headers) == {
        "trace": "abc",
        "ekiden-dead-queue": "orders",
        "ekiden-dead-reason": "ValueError",
        "ekiden-dead-error": "no such user",
        "ekiden-dead-attempts": 3,
        "ekiden-dead-at": NOW,
    }


def test_the_error_in_a_dead_letters_header_is_not_endless() -> None:
    dead = dead_letter(DELIVERY, FailureRecord("X", "long" * 10_000), NOW)

    assert len(str(dead.headers["ekiden-dead-error"])) <= 1000


def test_a_message_that_dies_again_and_again_never_collides_with_itself() -> None:
    message, seen = MESSAGE, [MESSAGE.id]
    for _ in range(20):
        dead = dead_letter(Delivery(message, 1, 1), FAILURE, NOW)
        message = redriven(dead, "orders")
        seen += [dead.id, message.id]

    assert len(set(seen)) == len(seen)
    assert dict(message.headers) == {"trace": "abc"}
    assert (message.queue, message.body, message.priority) == ("orders", MESSAGE.body, MESSAGE.priority)


def test_a_dead_letter_that_is_sent_back_has_all_its_tries_again() -> None:
    call = msgspec.structs.replace(CALL, retries=3, eta=NOW, fenced=True)
    dead = dead_letter(Delivery(msgspec.structs.replace(MESSAGE, body=encode_call(call)), 1, 1), FAILURE, NOW)

    again = redriven(dead, "orders")

    assert decode_call(again.body, {}) == decode_call(encode_call(CALL), {})
    assert again.due is None


@pytest.mark.parametrize(("expires", "expected"), [(None, None), (NOW - 30, 30.0), (NOW + 40, 100.0), (NOW - 90, None)])
def test_a_dead_letter_that_is_sent_back_lives_as_long_as_it_had_to_live(
    expires: float | None, expected: float | None
) -> None:
    call = msgspec.structs.replace(CALL, expires=expires, retries=3, last_error="OSError")
    dead = dead_letter(Delivery(msgspec.structs.replace(MESSAGE, body=encode_call(call)), 1, 1), FAILURE, NOW)

    again = decode_call(redriven(dead, "orders", now=NOW).body, {})

    assert again.sent == NOW
    assert again.expires == (None if expected is None else NOW + expected)
    assert (again.retries, again.last_error) == (0, None)


def test_garbage_that_is_sent_back_says_since_when_it_waits() -> None:
    dead = dead_letter(Delivery(MESSAGE, 1, 1), FAILURE, NOW)

    again = redriven(dead, "orders", now=NOW)

    assert (again.body, again.due) == (MESSAGE.body, NOW)


# The fence: what ENDED and SECOND_COPY mean.

STORED = {
    "SUCCESS": Succeeded(msgspec.Raw(b"3")),
    "FAILURE": Failed(FAILURE),
    "RETRY": Retried(NOW + 30, FAILURE, [9]),
    "EXPIRED": Expired(),
    "REVOKED": Revoked(),
}


@pytest.mark.parametrize("state", STORED)
def test_a_step_that_ended_before_publishes_the_same_again_and_stores_nothing(state: str) -> None:
    first = judged(STORED[state])
    assert first.result is not None

    again = judged(AlreadyEnded(first.result.state, first.result.body))

    assert [message.id for message in again.publish] == [message.id for message in first.publish]
    assert (again.result, again.release) == (None, None)
    assert kinds(again) == kinds(first)


@pytest.mark.parametrize("state", ["STARTED", "PROGRESS", "COMPILING", "PENDING"])
def test_a_state_that_is_no_ending_has_no_consequences(state: str) -> None:
    assert judged(AlreadyEnded(state, b"")) == Verdict()


def test_a_second_copy_stores_and_publishes_nothing() -> None:
    assert judged(SecondCopy()) == Verdict()
