"""docs/how-it-works.md tells what the code does."""

import re
import runpy
from typing import get_args

from ekiden import execution, outcomes, request, signature
from ekiden.message import Delivery, Ending, Message

from tests.story.pages import ROOT

PAGE = (ROOT / "docs" / "how-it-works.md").read_text("utf-8")
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def frames_of_the_page() -> dict[str, list[tuple[str, str]]]:
    block = re.search(r"<!-- generated: frames -->\s*```text\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    found: dict[str, list[tuple[str, str]]] = {}
    moment = ""
    for line in block[1].splitlines():
        if line.startswith(" "):
            file, name = line.split()
            found[moment].append((file, name))
        elif line:
            moment = line
            found[moment] = []
    return found


def test_the_frames_of_the_page_are_those_of_a_call() -> None:
    trace_a_call = runpy.run_path(str(ROOT / "docs" / "generate.py"))["trace_a_call"]

    assert frames_of_the_page() == trace_a_call()


def test_the_page_begins_and_ends_where_a_call_does() -> None:
    stacks = list(frames_of_the_page().values())

    assert stacks[0][0] == ("task.py", "Task.delay")
    assert [stack[-1][1].rpartition(".")[2] for stack in stacks] == [
        "publish",
        "receive",
        "submit",
        "add",
        "put",
        "settle",
        "wait",
    ]


def test_every_value_of_the_path_is_in_the_page() -> None:
    values = [signature.Signature, signature.Call, Message, Delivery, request.Request, execution.Verdict, Ending]

    assert [each.__name__ for each in values if f"`{each.__name__}`" not in PAGE] == []


def test_every_outcome_is_in_the_table_of_what_becomes_of_a_message() -> None:
    names = [outcome.__name__ for outcome in get_args(outcomes.Outcome)]

    assert [name for name in names if not re.search(rf"^\| `{name}`", RELIABILITY, re.MULTILINE)] == []
