"""Looks whether an app can work: the broker, the backend, the configuration, what lies in the queues."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal
from uuid import uuid4

import msgspec

from ekiden import plugins
from ekiden.app import Ekiden
from ekiden.codec import decode_call
from ekiden.errors import BackendError, ConfigurationError, EkidenError, MessageError, TransportError
from ekiden.message import DEAD_SUFFIX, REPLY_PREFIX, Ending, Message, SettleOutcome, new_id
from ekiden.plan import WorkerOptions
from ekiden.sqlite.location import path_in
from ekiden.worker import Worker

_PATIENCE_SECONDS = 5.0
_LONGEST_LEASE_SECONDS = 900.0
_LOOKED_AT = 200


class Finding(msgspec.Struct, frozen=True):
    """What one check found, and what to do about it where something is not as it should be."""

    level: Literal["ok", "warning", "wrong"]
    check: str
    text: str
    advice: str = ""


def examine(app: Ekiden) -> Iterator[Finding]:
    """Every finding, as it is made. What the broker is asked leaves nothing behind; no task is called or changed.

    A server that is broker and result store is warned about once.
    """
    told: set[str] = set()
    for finding in _findings(app):
        if finding.level == "warning" and finding.text in told:
            continue
        told.add(finding.text)
        yield finding


def _findings(app: Ekiden) -> Iterator[Finding]:
    yield from _tasks(app)
    yield from _configuration(app)
    reached = True
    for finding in _broker(app):
        yield finding
        if finding.level == "wrong":
            reached = False
            break
    yield from _files(app)
    yield from _backend(app)
    if reached:
        yield from _advised("broker", lambda: app.transport.warnings(app.queues()))
        yield from _advised("worker", lambda: _worker_warnings(app))
        yield from _unlimited(app)
        for queue in app.queues():
            yield from _queue(app, queue)


# The app.


def _tasks(app: Ekiden) -> Iterator[Finding]:
    if not app.tasks:
        advice = "name their modules in the setting include, or call app.autodiscover_tasks()"
        yield Finding("warning", "tasks", "the app has no tasks", advice)
        return
    try:
        worker = Worker(app, WorkerOptions())
    except ConfigurationError as error:
        yield Finding("wrong", "worker", str(error), "no worker can start before this is changed")
        return
    yield Finding("ok", "tasks", f"{len(app.tasks)}, in the queues {', '.join(app.queues())}")
    for name in sorted(app.tasks):
        queue = app.route(name, None, None).queue
        if queue not in worker.queues:
            text = f"{name} goes to {queue}, which the setting worker_queues leaves out"
            yield Finding("warning", "queues", text, f"add it there, or run a worker with --queues {queue}")
        yield from _limits(app, name)
        for text in app.tasks[name].parameters.unreadable():
            yield Finding(
                "warning", "annotations", f"{name}: {text}", "annotate it with a type that JSON can be read as"
            )


def _limits(app: Ekiden, name: str) -> Iterator[Finding]:
    policy = app.policy(app.tasks[name])
    hard, soft, grace = policy.time_limit, policy.soft_time_limit, app.conf.worker_grace
    if hard is not None and soft is not None and soft >= hard:
        text = f"{name}: its soft_time_limit of {soft:g} s comes no earlier than its time_limit of {hard:g} s"
        yield Finding("warning", "limits", text, "make the soft one shorter")
    if hard is not None and hard > grace:
        text = (
            f"{name} may run {hard:g} s, but a worker that stops waits {grace:g} s, and it is then begun anew elsewhere"
        )
        yield Finding("warning", "limits", text, f"stop workers with --grace {hard:g}, or shorten the limit")
    if policy.max_retries is None and policy.autoretry_for:
        yield Finding("warning", "retries", f"{name} is tried again without end", "give it max_retries")


def _worker_warnings(app: Ekiden) -> list[str]:
    try:
        return Worker(app, WorkerOptions()).warnings() if app.tasks else []
    except ConfigurationError:
        return []  # that no worker can start has been said


def _unlimited(app: Ekiden) -> Iterator[Finding]:
    """Which tasks may run on when the broker has given their messages to somebody else."""
    held = app.transport.longest_hold
    names = sorted(name for name, task in app.tasks.items() if app.policy(task).time_limit is None)
    if held is not None and names:
        text = f"the broker takes back what a worker holds for more than {held:g} s, and these have no time_limit: "
        advice = f"give those that may run so long one below {held:g} s, or cut them into shorter ones"
        yield Finding("warning", "limits", text + ", ".join(names), advice)


def _configuration(app: Ekiden) -> Iterator[Finding]:
    if app.conf.lease > _LONGEST_LEASE_SECONDS:
        text = f"the lease is {app.conf.lease:g} s: what a killed worker had in hand comes back no sooner"
        yield Finding("warning", "lease", text, "shorten it: it is renewed while a task runs, however long that takes")
    if app.conf.result_expires is None:
        yield Finding("warning", "results", "results are kept for ever", "set result_expires")


# The broker and the backend.


def _broker(app: Ekiden) -> Iterator[Finding]:
    url = app.broker_url()
    description = plugins.transport_class(url).description
    try:
        plugins.check_shared(url, app.backend_url())
    except ConfigurationError as error:
        yield Finding("warning", "broker", str(error))
    shortest = description.shortest_lease
    if app.conf.lease < shortest:
        text = f"the lease is {app.conf.lease:g} s, and {url.scheme}:// keeps none below {shortest:g} s"
        yield Finding("wrong", "lease", text, "make it longer")
    yield _timed("broker", f"{url} answers", lambda: app.transport.depth(app.conf.task_default_queue))
    yield _timed("broker", "a message is stored, received and settled", lambda: _round_trip(app))
    yield _timed("broker", "a broadcast is heard", lambda: _broadcast(app))
    yield Finding("ok", "durability", description.durability)


def _round_trip(app: Ekiden) -> None:
    """On a queue of its own, which vanishes afterwards."""
    queue = f"{REPLY_PREFIX}doctor-{uuid4().hex}"
    transport = app.transport
    with transport.consumer([queue], lease=max(app.conf.lease, 1.0), prefetch=1, name=queue) as consumer:
        (answer,) = transport.publish([Message(new_id(), queue, b"{}")])
        if answer.error is not None:
            raise answer.error
        deliveries = consumer.receive(1, _PATIENCE_SECONDS)
        if not deliveries:
            raise TransportError(f"what was published did not arrive within {_PATIENCE_SECONDS:g} s")
        (settled,) = consumer.settle([Ending(deliveries[0])])
        if settled.outcome is not SettleOutcome.SETTLED:
            raise TransportError(f"it was received and could not be settled: {settled.error or settled.outcome.value}")


def _broadcast(app: Ekiden) -> None:
    topic = f"ekiden.doctor-{uuid4().hex}"
    with app.transport.listen(topic) as listener:
        app.transport.broadcast(topic, [b"{}"])
        if not listener.receive(_PATIENCE_SECONDS):
            raise TransportError(f"what was broadcast was not heard within {_PATIENCE_SECONDS:g} s")


def _backend(app: Ekiden) -> Iterator[Finding]:
    if not app.stores_results():
        text = f"{app.backend_url()} sends them to the process that sent the call; no other one can ask for them"
        yield Finding("ok", "results", text)
        return
    yield _timed("results", f"{app.backend_url()} stores, finds and deletes", lambda: _record(app))
    yield from _advised("results", app.backend.warnings)


def _advised(check: str, ask: Callable[[], list[str]]) -> Iterator[Finding]:
    """What the broker or the store should be set up like, as its plugin sees it."""
    try:
        warnings = ask()
    except EkidenError as error:
        yield Finding("wrong", check, str(error), "see that it runs, and that its URL is right")
        return
    for text in warnings:
        yield Finding("warning", check, text)


def _record(app: Ekiden) -> None:
    key = f"doctor/{uuid4().hex}"
    app.backend.write(key, b"{}", expires=60.0)
    (record,) = app.backend.read([key])
    app.backend.write(key, None)
    if record is None:
        raise BackendError("what was written a moment ago is not there")


def _timed(check: str, text: str, act: Callable[[], Any]) -> Finding:
    started = time.perf_counter()
    try:
        act()
    except EkidenError as error:
        return Finding("wrong", check, str(error), "see that it runs, and that its URL is right")
    return Finding("ok", check, f"{text} ({(time.perf_counter() - started) * 1000:.1f} ms)")


def _files(app: Ekiden) -> Iterator[Finding]:
    """Whether files that hold messages or results are for this user only."""
    for parsed in {url.text: url for url in (app.broker_url(), app.backend_url())}.values():
        if parsed.scheme != "sqlite":
            continue
        try:
            path = path_in(parsed)
            mode = os.stat(path).st_mode
        except (ConfigurationError, OSError):
            continue  # that it cannot be opened has been said
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            does = "change" if mode & stat.S_IWOTH else "read"
            text = f"every user of this machine can {does} {path}, and the messages in it"
            yield Finding("warning", "file", text, f"chmod 600 {path}*")


# The queues.


def _queue(app: Ekiden, queue: str) -> Iterator[Finding]:
    try:
        depth, dead = app.transport.depth(queue), app.transport.depth(queue + DEAD_SUFFIX)
        # Where looking at a message counts as handing it out, doctor would bring it nearer to the dead letters.
        seen = () if app.transport.description.browsing_counts else app.transport.browse(queue, limit=_LOOKED_AT)
    except TransportError as error:
        yield Finding("wrong", "queue", f"{queue}: {error}")
        return
    if depth.ready and depth.leased == 0:
        text = f"{queue}: {depth.ready} ready to run, and no worker has any in hand"
        yield Finding("warning", "queue", text, "start a worker, or see why it does not take them")
    if dead.ready:
        text = f"{queue}: {dead.ready} dead letters"
        yield Finding(
            "warning", "dead letters", text, "`ekiden dead list` tells why; `ekiden dead retry` sends them back"
        )
    unknown: set[str] = set()
    for each in seen:
        try:
            name = decode_call(each.message.body, each.message.headers).task
        except MessageError as error:
            yield Finding(
                "warning", "queue", f"{queue}: message {each.message.id}: {error}", "a worker will set it aside"
            )
            continue
        if app.find_task(name) is None:
            unknown.add(name)
    if unknown:
        text = f"{queue}: calls wait of tasks that this app does not have: {', '.join(sorted(unknown))}"
        yield Finding("warning", "queue", text, "import their modules (the setting include), or purge the queue")
