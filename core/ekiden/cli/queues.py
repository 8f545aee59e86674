"""``ekiden queues`` and ``ekiden purge``."""

from __future__ import annotations

import sys

import click

from ekiden.app import Ekiden
from ekiden.cli.celery_words import REFUSED_BY_PURGE, refused_options
from ekiden.cli.output import confirm, json_option, open_app, plural, print_json, print_table, say
from ekiden.cli.target import AppCommand, QueueName, app_argument
from ekiden.message import DEAD_SUFFIX


@click.command(cls=AppCommand)
@app_argument
@json_option
def queues(target: str, as_json: bool) -> None:
    """How many messages are in the app's queues, and in the dead letters of each.

    \b
    ekiden queues shop:app

    ready: may start now. delayed: not yet due, or to be tried again later. leased: a worker has it in hand.
    A question mark is what this broker cannot count.
    """
    with open_app(target) as app:
        rows = [depth_row(app, name) for queue in app.queues() for name in (queue, queue + DEAD_SUFFIX)]
    if as_json:
        print_json(rows)
    else:
        print_table(rows)


def depth_row(app: Ekiden, queue: str) -> dict[str, object]:
    """What a queue holds."""
    depth = app.transport.depth(queue)
    return {"queue": queue, "ready": depth.ready, "delayed": depth.delayed, "leased": depth.leased}


@click.command(cls=AppCommand)
@app_argument
@click.argument("names", metavar="[QUEUE]...", nargs=-1, type=QueueName())
@click.option("-Q", "--queues", type=QueueName(), help="The same, as a list: a,b.")
@click.option("-f", "--force", "--yes", "yes", is_flag=True, help="Do not ask.")
@refused_options(REFUSED_BY_PURGE)
def purge(target: str, names: tuple[str, ...], queues: str | None, yes: bool) -> None:
    """Delete the messages of queues that no worker has in hand; of all the app's queues where none is named.

    \b
    ekiden purge shop:app emails
    ekiden purge shop:app --yes                           all queues, in a script
    """
    listed = tuple(name.strip() for name in queues.split(",")) if queues else ()
    with open_app(target) as app:
        for queue in names + listed or app.queues():
            delete_messages(app, queue, yes=yes)


def delete_messages(app: Ekiden, queue: str, *, yes: bool) -> None:
    """Purge, after asking on a terminal; without one ``--yes`` is the answer."""
    depth = app.transport.depth(queue)
    takes_delayed = app.transport.description.purges_delayed
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError(f"this deletes what is in {queue}; say --yes, because nobody can be asked here.")
        counted = (depth.ready or 0) + ((depth.delayed or 0) if takes_delayed else 0)
        confirm(f"Delete {plural(counted, 'message')} of {queue}?")
    deleted = app.transport.purge(queue)
    held = f"; {depth.leased} that workers have in hand stay" if depth.leased else ""
    may_leave_some = not takes_delayed and not queue.endswith(DEAD_SUFFIX)  # dead letters are never delayed
    delayed = "; delayed ones, if there are any, stay: this broker cannot delete them" if may_leave_some else ""
    say(f"{plural(deleted, 'message')} of {queue} deleted{held}{delayed}.")
