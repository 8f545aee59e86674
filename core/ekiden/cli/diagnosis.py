"""``ekiden transports``, ``ekiden explain`` and ``ekiden doctor``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click
import msgspec

from ekiden import plugins
from ekiden.app import load_app
from ekiden.cli.output import Styled, json_option, print_fields, print_json, say, say_lines, task_named
from ekiden.cli.target import AppCommand, app_argument, task_argument
from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL

if TYPE_CHECKING:
    from ekiden.explain import Explanation


@click.command()
@json_option
def transports(as_json: bool) -> None:
    """The brokers that ekiden can talk to here, and what each promises.

    \b
    ekiden transports

    Every installed transport is listed, whoever wrote it. Times are in seconds.
    """
    found = described_transports()
    if as_json:
        print_json(found)
        return
    for number, transport in enumerate(found):
        if number > 0:
            say()
        say(Styled(f"{transport['scheme']}://", bold=True, fg="green"))
        print_fields({name: value for name, value in transport.items() if name != "scheme"})


@click.command(cls=AppCommand)
@app_argument
@task_argument
@json_option
def explain(target: str, task: str, as_json: bool) -> None:
    """What will happen to a call of TASK, step by step, with the file and line that does each step.

    \b
    ekiden explain shop:app add

    A call is made and followed, of a task that does nothing but is configured like yours, on a broker in memory. Your
    function is not called, and your broker not asked.
    """
    from ekiden.explain import explain as explained  # the worker and all that belongs to it

    app = load_app(target)
    with app:
        explanation = explained(app, task_named(app, task))
    if as_json:
        print_json(explanation)
    else:
        _tell(explanation)


def _tell(explanation: Explanation) -> None:
    say(Styled(f"A call of {explanation.task}", bold=True))
    say()
    said_otherwise = [fact for fact in explanation.facts if fact.said_by != "the settings"]
    width = max(len(fact.name) for fact in said_otherwise)
    for fact in said_otherwise:
        say(f"  {fact.name:{width}}  {fact.value}  ", Styled(f"({fact.said_by})", dim=True))
    rest = [f"{fact.name}={fact.value}" for fact in explanation.facts if fact.said_by == "the settings"]
    say_lines(click.wrap_text(f"By the settings: {', '.join(rest)}", 100, "\n  ", "    "))
    where = ""
    for step in explanation.steps:
        if step.where != where:
            where = step.where
            say()
            say(Styled(where.upper(), bold=True, fg="green"))
        indent = "  " * step.depth
        place = Styled(f"{_relative(step.file)}:{step.line}", dim=True)
        say(f"{step.number:3} {indent}", Styled(step.name, bold=True), "  ", place)
        if step.does:
            say_lines(click.wrap_text(step.does, 100, f"      {indent}", f"      {indent}"))


def _relative(file: str) -> str:
    path = os.path.relpath(file)
    return file if path.startswith(os.pardir) else path


def described_transports() -> list[dict[str, Any]]:
    """What each installed transport says of itself, by scheme; of one that cannot be loaded, why."""
    return [{"scheme": scheme, **_described(scheme)} for scheme in plugins.installed(plugins.TRANSPORTS)]


def _described(scheme: str) -> dict[str, Any]:
    try:
        kind = plugins.transport_class(BrokerURL(f"{scheme}://", scheme))
    except ConfigurationError as error:
        return {"error": str(error)}
    fields = msgspec.structs.asdict(kind.description)
    options = fields.pop("options")
    known = () if options is None else msgspec.structs.fields(options)
    fields["options"] = {each.name: None if each.default is msgspec.NODEFAULT else each.default for each in known}
    return {**fields, "implemented_by": f"{kind.__module__}.{kind.__qualname__}"}


_COLOURS = {"ok": "green", "warning": "yellow", "wrong": "red"}


@click.command(cls=AppCommand)
@app_argument
@json_option
def doctor(target: str, as_json: bool) -> None:
    """Whether the app can work: its broker, its results, its configuration, its queues.

    \b
    ekiden doctor shop:app

    One line for each thing looked at, with what to do where it is not as it should be. The exit status is 1 if
    something is wrong.
    """
    from ekiden.doctor import examine  # the worker and all that belongs to it

    with load_app(target) as app:
        findings = []
        for finding in examine(app):
            findings.append(finding)
            if not as_json:
                level = Styled(f"{finding.level:7}", fg=_COLOURS[finding.level], bold=True)
                advice = f"; {finding.advice}" if finding.advice else ""
                say(level, f"  {finding.check}: {finding.text.rstrip('.')}{advice}")
    if as_json:
        print_json(findings)
    if any(finding.level == "wrong" for finding in findings):
        sys.exit(1)
