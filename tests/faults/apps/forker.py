"""``python forker.py FORKS``: sends and waits in every way there is, forks meanwhile, and goes on, on both sides.

Each side sends numbers of its own; the exit status is 0 if every result arrived everywhere.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading

from tasks import app, gated, work

THOUSAND = 1000


def main(forks: int) -> int:
    asyncio.run(send_and_await(0))  # from now on the thread that publishes and the one that waits are there
    stop = threading.Event()
    sent: list[int] = []
    publishing = threading.Thread(target=publish_for_ever, args=(sent, stop))
    publishing.start()
    waits_for_the_gate = gated.delay(-1)
    got: list[int] = []
    waiting = threading.Thread(target=lambda: got.append(waits_for_the_gate.get(60)))
    waiting.start()
    children = [fork(number) for number in range(1, forks + 1)]
    stop.set()
    publishing.join()
    asyncio.run(send_and_await(THOUSAND - 1))
    statuses = [os.waitpid(child, 0)[1] for child in children]
    gated.delay(-2)
    waiting.join()
    print(len(sent), flush=True)
    return 0 if not any(statuses) and got == [-1] else 1


def fork(number: int) -> int:
    """Fork; the child sends and waits on its own, and ends without cleaning up what is its parent's."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        first = number * THOUSAND
        assert work.delay(first).get(30) == first
        asyncio.run(send_and_await(first + 1))
        many = work.enqueue_many((first + 10 + each,) for each in range(5))
        assert [result.get(30) for result in many] == [first + 10 + each for each in range(5)]
        status = 0
    finally:
        os._exit(status)


async def send_and_await(number: int) -> None:
    result = await work.adelay(number)
    assert await asyncio.wait_for(result, 30) == number


def publish_for_ever(sent: list[int], stop: threading.Event) -> None:
    while not stop.is_set():
        number = -100 - len(sent)
        work.delay(number)
        sent.append(number)


if __name__ == "__main__":
    with app:
        status = main(int(sys.argv[1]))
    sys.exit(status)
