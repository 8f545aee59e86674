"""Whatever JSON can carry comes back as it was, and whatever bytes arrive are a call or a MessageError."""

import json
from typing import Any

import msgspec
import pytest
from ekiden.codec import Parameters, decode_call, decode_value, encode_call, encode_value
from ekiden.errors import MessageError
from ekiden.signature import Call, Step
from ekiden.times import LATEST_TIME
from hypothesis import example, given, settings
from hypothesis import strategies as st

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
ids = text.filter(lambda task_id: task_id and "\0" not in task_id)  # others are refused where they are sent
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | numbers | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=20,
)
times = st.floats(0, LATEST_TIME) | st.none()
steps = st.recursive(
    st.builds(Step, task=text, args=st.tuples(values), kwargs=st.dictionaries(text, values, max_size=2)),
    lambda inner: st.builds(Step, task=text, on_success=st.tuples(inner), on_error=st.tuples(inner, inner)),
    max_leaves=4,
)
calls = st.builds(
    Call,
    task=text,
    id=ids,
    sent=st.floats(0, LATEST_TIME),
    args=st.lists(values, max_size=4),
    kwargs=st.dictionaries(text, values, max_size=4),
    retries=st.integers(0, 2**31 - 1),
    eta=times,
    expires=times,
    root=ids | st.none(),
    parent=ids | st.none(),
    on_success=st.lists(steps, max_size=2).map(tuple),
    on_error=st.lists(steps, max_size=2).map(tuple),
    ignore_result=st.booleans() | st.none(),
    time_limit=st.floats(0.001, 1e6) | st.none(),
    soft_time_limit=st.floats(0.001, 1e6) | st.none(),
    fenced=st.booleans(),
)


@given(values)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert decode_value(encode_value(value)) == value


@pytest.mark.slow
@settings(max_examples=40)
@given(calls)
def test_a_call_comes_back_as_it_was(call: Call) -> None:
    body = encode_call(call)
    again = decode_call(body, {})

    assert msgspec.to_builtins(again) == msgspec.to_builtins(call)
    assert encode_call(again) == body


@pytest.mark.slow
@settings(max_examples=40)
@given(calls)
def test_any_other_json_library_reads_a_call(call: Call) -> None:
    found = json.loads(encode_call(call))

    assert (found["v"], found["task"], found.get("args", [])) == (1, call.task, call.args)


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b'{"v":1,"task":"a","id":"b","sent":1,"args":[' + b"9" * 10_000 + b"]}")
@example(b'{"v":1,"task":"a","id":"\xff","sent":1}')
def test_any_bytes_are_a_call_or_a_message_error(body: bytes) -> None:
    try:
        found = decode_call(body, {})
    except MessageError:
        return
    assert isinstance(found, Call)


@given(values, st.sampled_from(["args", "kwargs", "id", "sent", "retries", "eta", "on_success", "time_limit", "v"]))
@pytest.mark.slow
def test_a_call_with_a_wrong_field_is_a_call_or_a_message_error(value: Any, field: str) -> None:
    fields = {"v": 1, "task": "a", "id": "b", "sent": 1.0, field: value}

    test_any_bytes_are_a_call_or_a_message_error.hypothesis.inner_test(json.dumps(fields).encode())  # type: ignore[attr-defined]


@given(st.lists(values, max_size=5), st.dictionaries(text, values, max_size=3))
@pytest.mark.slow
def test_what_fits_a_function_is_what_python_says_fits(args: list[Any], kwargs: dict[str, Any]) -> None:
    def function(first, second=None, *rest, named=None): ...  # type: ignore[no-untyped-def]

    try:
        function(*args, **kwargs)
        fits = True
    except TypeError:
        fits = False

    assert (Parameters(function, skip_first=False).misfit(args, kwargs) is None) == fits
