"""The ``ekiden`` command. Every mistake is one sentence on standard error and a non-zero exit status."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ekiden import __version__
from ekiden.cli import celery_words
from ekiden.cli.target import AppTarget
from ekiden.errors import EkidenError
from ekiden.safe_text import indented_below, text_of
from ekiden.urls import without_password

_MODULES = {
    "call": "calls",
    "completion": "completion",
    "dead": "dead",
    "demo": "demo",
    "doctor": "diagnosis",
    "explain": "diagnosis",
    "port": "port",
    "purge": "queues",
    "queues": "queues",
    "result": "calls",
    "revoke": "calls",
    "transports": "diagnosis",
    "worker": "worker",
}
"""Each command, and the module that has it under its name."""


_TYPED = "ekiden.cli.typed"
_IS_LIKE_A_URL = re.compile(r"[A-Za-z][\w+.-]*:(?![A-Za-z_][\w.]*\Z)")
"""``MODULE:APP`` is none."""


class Commands(click.Group):
    """Says what ekiden refuses in one sentence. Anything else is a bug, and keeps its traceback.

    A command's module is imported when the command is asked for: ``ekiden worker`` needs no other one.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in _MODULES:
            return super().get_command(ctx, cmd_name)
        found: click.Command = getattr(importlib.import_module(f"ekiden.cli.{_MODULES[cmd_name]}"), cmd_name)
        return found

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read what stands before the command's name; errors show no URL's password, wherever a URL was typed."""
        ctx.meta[_TYPED] = list(args)
        with _without_passwords(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with _without_passwords(ctx):
            try:
                return super().invoke(ctx)
            except EkidenError as error:
                raise click.ClickException(indented_below(text_of(error))) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is named first; of one that only Celery has, say what to use."""
        if args[0] in celery_words.COMMANDS and not ctx.resilient_parsing:
            raise click.UsageError(f"{args[0]}: {celery_words.COMMANDS[args[0]]}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="ekiden")
@click.option("-A", "--app", type=AppTarget(), metavar="MODULE:APP", help="The app; or name it behind the command.")
@celery_words.refused_options(celery_words.REFUSED_EVERYWHERE)
@celery_words.accepted_options(*celery_words.ACCEPTED_EVERYWHERE, are_flags=True)
def ekiden(app: str | None) -> None:  # AppCommand reads ``app``
    """Tasks and messages over any broker, chosen by URL.

    MODULE:APP names your app as Python imports it from here: app in shop.py is shop:app, or just shop.

    \b
    ekiden worker shop:app                                run its tasks
    ekiden call shop:app add --args '[1, 2]' --wait 10    call one of them
    ekiden explain shop:app add                           what happens to such a call, step by step
    ekiden doctor shop:app                                what is wrong, if something is
    """


@contextmanager
def _without_passwords(ctx: click.Context) -> Iterator[None]:
    """In an error's message each URL of the command line as it may be shown."""
    try:
        yield
    except click.ClickException as error:
        for typed in ctx.meta[_TYPED]:
            for value in (typed, typed.partition("=")[2]) if typed.startswith("-") else (typed,):
                if _IS_LIKE_A_URL.match(value):
                    for quoted in (value, repr(value)[1:-1], text_of(value)):
                        shown = error.message.replace(quoted, without_password(value))
                        error.message = shown  # type: ignore[misc]  # click makes a new error of every kind otherwise
        raise
