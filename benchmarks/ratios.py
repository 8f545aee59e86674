"""The figures of a run, and the ratios that they give, each beside the one that is wanted."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

PEERS = ("celery", "dramatiq", "taskiq", "huey")


class Figures:
    """By contestant and measurement, one figure for each round."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[float]] = {}

    def add(self, who: str, found: dict[str, float]) -> None:
        """What one measurement has found."""
        for what, figure in found.items():
            self._found.setdefault((what, who), []).append(figure)

    def best(self, what: str, families: tuple[str, ...], choose: Callable[[list[float]], float] = max) -> float | None:
        """The best median among the ways of these families; None where nothing was measured."""
        medians = [
            statistics.median(values)
            for (measurement, who), values in self._found.items()
            if measurement == what and who.partition(" ")[0] in families
        ]
        return choose(medians) if medians else None

    def one(self, what: str, who: str) -> float | None:
        """The median of one contestant."""
        values = self._found.get((what, who))
        return statistics.median(values) if values else None

    def show(self) -> None:
        """Every figure: its median, the smallest and the largest."""
        for what, who in sorted(self._found):
            values = self._found[what, who]
            print(f"{what:34} {who:28} {statistics.median(values):10.4g}   ({min(values):.4g} to {max(values):.4g})")
        print()


@dataclass(frozen=True)
class Ratio:
    """``found`` computes it, or None where something was not measured. ``least``: it is wanted to be no smaller."""

    text: str
    found: Callable[[Figures], float | None]
    wanted: float
    least: bool = True


def ratios_of(figures: Figures, broker: str) -> None:
    """Print them."""
    print(f"{'':72} {'found':>8} {'wanted':>8}")
    for ratio in RATIOS[broker]:
        found = ratio.found(figures)
        if found is None:
            continue
        met = found >= ratio.wanted if ratio.least else found <= ratio.wanted
        sign = ">=" if ratio.least else "<="
        print(f"{ratio.text:72} {found:8.2f} {sign} {ratio.wanted:5.4g}  {'' if met else 'MISSED'}")


def _over(what: str, *families: str) -> Callable[[Figures], float | None]:
    """Ours over the best of these."""
    return lambda figures: _divided(figures.one(what, "ekiden"), figures.best(what, families))


def _of(over: tuple[str, str], under: tuple[str, str]) -> Callable[[Figures], float | None]:
    return lambda figures: _divided(figures.one(*over), figures.one(*under))


def _value(what: str, who: str = "ekiden") -> Callable[[Figures], float | None]:
    return lambda figures: figures.one(what, who)


def _beside_fastest_peer(what: str, who: str) -> Callable[[Figures], float | None]:
    return lambda figures: _divided(figures.one(what, who), figures.best(what, PEERS, min))


def _divided(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


_DRAIN, _STORED = "drain, per s", "drain with results, per s"
_P50, _P99 = "round trip p50, ms", "round trip p99, ms"
_START = "200/s: send to start p50, ms"
_SLEEPERS = "1000 x 50 ms, times the ideal"
_MEMORY = "idle worker process, RSS MiB"

_SENDING = (
    Ratio(
        "delay() / single publish by the raw client",
        _of(("delay(), per s", "sending"), ("single publish, raw, per s", "sending")),
        0.7,
    ),
    Ratio(
        "enqueue_many() / batches by the raw client",
        _of(("enqueue_many(), per s", "sending"), ("publish in batches, raw, per s", "sending")),
        0.4,
    ),
)
_COMMON = (
    Ratio("drain with results / drain without", _of((_STORED, "ekiden"), (_DRAIN, "ekiden")), 0.5),
    Ratio("1,000 x 50 ms, 100 threads, times the ideal", _value(_SLEEPERS, "ekiden threads"), 1.2, least=False),
    Ratio("1,000 x 50 ms, async, times the ideal", _value(_SLEEPERS, "ekiden async"), 1.2, least=False),
    Ratio("idle worker process, MiB resident", _value(_MEMORY), 45, least=False),
)
_THREADS = _of(("delay() in 16 threads, per s", "sending"), ("delay(), per s", "sending"))
REDIS = (
    Ratio("drain: ekiden / celery, its best pool", _over(_DRAIN, "celery"), 15),
    Ratio("drain: ekiden / the best of dramatiq, taskiq, huey", _over(_DRAIN, "dramatiq", "taskiq", "huey"), 5),
    Ratio("drain: ekiden / raw claim 100 + settle 100", _of((_DRAIN, "ekiden"), (_DRAIN, "raw")), 0.35),
    *_SENDING,
    Ratio("delay() in 16 threads / in one", _THREADS, 1.3),
    Ratio("round trip p50, ms", _value(_P50), 1, least=False),
    Ratio("round trip p99 / p50", _of((_P99, "ekiden"), (_P50, "ekiden")), 3, least=False),
    Ratio("200/s: send to start p50, ms", _value(_START), 1, least=False),
    *_COMMON,
)
RABBITMQ = (
    Ratio("drain: ekiden / celery, its best pool", _over(_DRAIN, "celery"), 4),
    Ratio("drain: ekiden / dramatiq", _over(_DRAIN, "dramatiq"), 3),
    Ratio("drain: ekiden / raw SelectConnection", _of((_DRAIN, "ekiden"), (_DRAIN, "raw")), 0.45),
    *_SENDING,
    Ratio("delay() in 16 threads / in one", _THREADS, 3),
    Ratio("200/s: send to start p50 / the fastest peer's", _beside_fastest_peer(_START, "ekiden rpc"), 1, least=False),
    Ratio("the same, with results in Redis", _beside_fastest_peer(_START, "ekiden"), 1, least=False),
    Ratio("drain with replies (rpc) / drain without", _of((_STORED, "ekiden rpc"), (_DRAIN, "ekiden")), 0.5),
    *_COMMON,
)
_IDLE = (
    Ratio("requests of an idle worker, per s", _value("idle worker, requests per s"), 2, least=False),
    Ratio("idle worker process, MiB resident", _value(_MEMORY), 45, least=False),
)
_WAKE_P50, _WAKE_P99 = "wake-up p50, ms", "wake-up p99, ms"
_CLAIMS = _of(("claim and settle, per s", "claims"), ("claim and settle, raw, per s", "claims"))
MONGODB = (
    Ratio("drain: ekiden / celery, its best pool; celery's messages are not safe", _over(_DRAIN, "celery"), 10),
    Ratio("claim 100 + settle 100: ekiden / raw pymongo", _CLAIMS, 0.5),
    Ratio("drain with results / drain without", _of((_STORED, "ekiden"), (_DRAIN, "ekiden")), 0.5),
    *_SENDING,
    Ratio("wake-up p50, ms", _value(_WAKE_P50), 20, least=False),
    Ratio("wake-up p99 / p50", _of((_WAKE_P99, "ekiden"), (_WAKE_P50, "ekiden")), 5, least=False),
    *_IDLE,
)
COUCHDB = (
    Ratio("drain: ekiden / raw claim 100 + settle 100", _of((_DRAIN, "ekiden"), (_DRAIN, "raw")), 0.5),
    Ratio("claim 100 + settle 100: ekiden / raw urllib3", _CLAIMS, 0.5),
    Ratio("drain with results / drain without", _of((_STORED, "ekiden"), (_DRAIN, "ekiden")), 0.5),
    *_SENDING,
    Ratio("wake-up p50, ms", _value(_WAKE_P50), 50, least=False),
    Ratio("wake-up p99 / p50", _of((_WAKE_P99, "ekiden"), (_WAKE_P50, "ekiden")), 5, least=False),
    *_IDLE,
)
RATIOS = {"redis": REDIS, "rabbitmq": RABBITMQ, "mongodb": MONGODB, "couchdb": COUCHDB}
