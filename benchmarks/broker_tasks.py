"""What a task costs on a broker: ekiden, its peers and the raw client on one server, in one run.

    pip install -e '.[benchmarks]' -e transports/redis -e transports/rabbitmq ...
    python benchmarks/broker_tasks.py redis [--quick] [--rounds N] [--only MEASURE ...] [--who FAMILY ...] [--url URL]
    python benchmarks/broker_tasks.py rabbitmq [--queue-type quorum|classic] [--results-url URL] ...
    python benchmarks/broker_tasks.py mongodb|couchdb ...

Each round does every measurement once, one after another, so that what else the machine does meets all; a figure is
the median of the rounds. Then the ratios, each beside the wanted one. Servers on this machine only. README.md in this
directory says what is measured, and what the peers do not promise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import measures
from contestants import Contestant
from measures import DidNotFinish
from plans import PLANS, QUICK_PLANS, Plan
from ratios import Figures, ratios_of
from servers import Server, end_in_good_order, machine, server_for

Measurement = Callable[[], dict[str, float]]


def main() -> int:
    options = _options()
    end_in_good_order()
    figures = Figures()
    failures: list[str] = []
    server = server_for(options.broker, options.url, queue_type=options.queue_type, results_url=options.results_url)
    plan = (QUICK_PLANS if options.quick else PLANS)[options.broker]
    run = Run(server, plan, tuple(options.who))
    try:
        print(f"{server.described()}\n{machine()}; {options.rounds} rounds\n", flush=True)
        for number in range(options.rounds):
            for measure in options.only or plan.measures:
                for name, measurement in MEASURES[measure](run):
                    _tell(f"round {number + 1}: {measure}, {name}")
                    try:
                        figures.add(name, measurement())
                    except DidNotFinish as error:
                        failures.append(f"{measure}, {name}: {error}")
    finally:
        # What was found before an interruption is told, too.
        server.close()
        _tell("")
        figures.show()
        ratios_of(figures, options.broker)
        for failure in failures:
            print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


@dataclass(frozen=True)
class Run:
    """What is measured on which server, and whose families take part."""

    server: Server
    plan: Plan
    families: tuple[str, ...]

    def among(self, contestants: Iterable[Contestant]) -> list[Contestant]:
        """Those that take part."""
        return [each for each in contestants if each.family in self.families]


Round = Iterator[tuple[str, Measurement]]
"""Measurements, and whose each is."""


def _drain(run: Run) -> Round:
    yield "raw", lambda: measures.raw_drain(run.server, run.plan.amounts.ours)
    for each in run.among(run.plan.workers):
        yield each.name, partial(measures.drain, run.server, each, _count(run, each), results=False)


def _results(run: Run) -> Round:
    for each in run.among(run.plan.storing):
        yield each.name, partial(measures.drain, run.server, each, _count(run, each), results=True)


def _claims(run: Run) -> Round:
    if "ekiden" in run.families:
        yield "claims", lambda: measures.claims(run.server, rounds=5, count=run.plan.amounts.claims)


def _sending(run: Run) -> Round:
    if "ekiden" in run.families:
        yield "sending", lambda: measures.sending(run.server, rounds=5, count=run.plan.amounts.sends)


def _latencies(run: Run) -> Round:
    amounts = run.plan.amounts
    for each in run.among(run.plan.storing):
        yield (
            each.name,
            partial(
                measures.latencies,
                run.server,
                each,
                trips=amounts.trips,
                seconds=amounts.pace_seconds,
                idle_seconds=amounts.idle_seconds,
            ),
        )


def _sleepers(run: Run) -> Round:
    for each in run.among(run.plan.sleepers):
        yield each.name, partial(measures.sleepers, run.server, each, 1000)


def _waking(run: Run) -> Round:
    for each in run.among(run.plan.idlers):
        yield (
            each.name,
            partial(measures.waking, run.server, each, trips=run.plan.amounts.trips, wakes=run.plan.amounts.wakes),
        )


def _idling(run: Run) -> Round:
    for each in run.among(run.plan.idlers):
        yield each.name, partial(measures.idling, run.server, each, run.plan.amounts.idle_seconds)


MEASURES = {
    "drain": _drain,
    "results": _results,
    "claims": _claims,
    "sending": _sending,
    "latencies": _latencies,
    "sleepers": _sleepers,
    "waking": _waking,
    "idling": _idling,
}


def _count(run: Run, contestant: Contestant) -> int:
    return run.plan.amounts.ours if contestant.family == "ekiden" else run.plan.amounts.theirs


def _tell(what: str) -> None:
    """Say on a terminal what is going on."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("broker", choices=tuple(PLANS))
    parser.add_argument("--url", help="the server, on this machine; without a virtual host, a database, a prefix")
    parser.add_argument("--results-url", help="the Redis that stores results beside RabbitMQ")
    parser.add_argument("--queue-type", choices=("quorum", "classic"), default="quorum")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="fewer tasks, and one round")
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="else all that is measured on this broker")
    families = ("ekiden", "celery", "dramatiq", "taskiq", "huey")
    parser.add_argument("--who", nargs="+", choices=families, default=families)
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 1 if options.quick else 3
    return options


if __name__ == "__main__":
    sys.exit(main())
