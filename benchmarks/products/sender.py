"""Sends with one product, as told by its arguments, and prints what it found as one line of JSON.

    sender.py PRODUCT fill SEND COUNT          before a worker starts
    sender.py PRODUCT trips COUNT              milliseconds of each round trip
    sender.py PRODUCT pace FIRST COUNT RATE    the moments before each of COUNT sends, evenly spaced

PRODUCT is a module of this directory; SEND one of its functions.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any


def main() -> None:
    product = importlib.import_module(sys.argv[1])
    action, arguments = sys.argv[2], sys.argv[3:]
    found: Any = {"fill": fill, "trips": trips, "pace": pace}[action](product, *arguments)
    print(json.dumps(found), flush=True)


def fill(product: Any, send: str, count: str) -> None:
    product.fill(getattr(product, send), int(count))


def trips(product: Any, count: str) -> list[float]:
    for _ in range(20):
        product.round_trip()
    found = []
    for _ in range(int(count)):
        began = time.perf_counter()
        product.round_trip()
        found.append((time.perf_counter() - began) * 1e3)
    return found


def pace(product: Any, first: str, count: str, rate: str) -> list[float]:
    sent = []
    begin = time.monotonic() + 0.2
    for number in range(int(count)):
        pause = begin + number / float(rate) - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        sent.append(time.monotonic())
        product.send(int(first) + number)
    return sent


if __name__ == "__main__":
    main()
