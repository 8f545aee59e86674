"""What is measured on each broker, on whom, and how much of it: a run takes minutes, a quick one about a minute."""

from __future__ import annotations

from dataclasses import dataclass, replace

import contestants
from contestants import Contestant


@dataclass(frozen=True)
class Amounts:
    """How much is measured: tasks that ekiden and a peer drain, single sends, claims in turns with the raw client.

    A round trip is made ``trips`` times, 200 sends a second go on for ``pace_seconds``, an idle worker is woken
    ``wakes`` times and watched for ``idle_seconds``.
    """

    ours: int
    theirs: int
    sends: int
    claims: int = 0
    trips: int = 500
    pace_seconds: float = 5
    wakes: int = 0
    idle_seconds: float = 10


@dataclass(frozen=True)
class Plan:
    """One broker's. ``measures`` are names of ``broker_tasks.MEASURES``.

    ``storing`` take part where results are stored, ``sleepers`` where tasks sleep, ``idlers`` where workers are idle.
    """

    amounts: Amounts
    measures: tuple[str, ...]
    workers: tuple[Contestant, ...]
    storing: tuple[Contestant, ...]
    sleepers: tuple[Contestant, ...] = ()
    idlers: tuple[Contestant, ...] = ()


_UNDER_LOAD = ("drain", "results", "sending", "latencies", "sleepers")
_ONE_BY_ONE = ("drain", "results", "claims", "sending", "waking", "idling")
_ONLY_EKIDEN = (contestants.ekiden(),)

# What stands in for the last two looks at every message that there is for each claim: backlogs are small, and the same
# for all.
PLANS = {
    "redis": Plan(
        Amounts(ours=20_000, theirs=3000, sends=2000),
        _UNDER_LOAD,
        contestants.ON_REDIS,
        storing=contestants.ON_REDIS,
        sleepers=contestants.SLEEPERS_ON_REDIS,
    ),
    "rabbitmq": Plan(
        Amounts(ours=20_000, theirs=3000, sends=400),
        _UNDER_LOAD,
        contestants.ON_RABBITMQ,
        # Also ekiden's own way to pass results on where there is no store.
        storing=(contestants.ekiden("rpc", BENCH_EKIDEN_RESULTS_URL=None), *contestants.ON_RABBITMQ),
        sleepers=contestants.SLEEPERS_ON_RABBITMQ,
    ),
    "mongodb": Plan(
        Amounts(ours=1000, theirs=1000, sends=100, claims=500, trips=200, wakes=100, idle_seconds=30),
        _ONE_BY_ONE,
        contestants.ON_MONGODB,
        storing=_ONLY_EKIDEN,
        idlers=contestants.IDLERS_ON_MONGODB,
    ),
    "couchdb": Plan(
        Amounts(ours=1000, theirs=1000, sends=100, claims=500, trips=200, wakes=100, idle_seconds=30),
        _ONE_BY_ONE,
        _ONLY_EKIDEN,
        storing=_ONLY_EKIDEN,
        idlers=_ONLY_EKIDEN,
    ),
}

_QUICKLY = Amounts(ours=10_000, theirs=1500, sends=1000, trips=200, pace_seconds=2, idle_seconds=3)
_VERY_FEW = Amounts(ours=600, theirs=600, sends=40, claims=300, trips=50, wakes=30, idle_seconds=10)
QUICK_PLANS = {
    "redis": replace(PLANS["redis"], amounts=_QUICKLY),
    "rabbitmq": replace(PLANS["rabbitmq"], amounts=replace(_QUICKLY, sends=200)),
    "mongodb": replace(
        PLANS["mongodb"],
        amounts=_VERY_FEW,
        workers=(contestants.ekiden(), contestants.celery("solo", 1)),  # the quickest of its pools there
        idlers=_ONLY_EKIDEN,
    ),
    "couchdb": replace(PLANS["couchdb"], amounts=_VERY_FEW),
}
