"""Sends to huey's consumer, with one thread and with eight, and prints the better rate."""

import subprocess
import sys
import time
from pathlib import Path

from huey_tasks import directory, noop


def drain(count: int, threads: int) -> float:
    for _ in range(count):
        noop(count)
    consumer = Path(sys.executable).with_name("huey_consumer")
    worker = subprocess.Popen(
        [sys.executable, str(consumer), "huey_tasks.huey", "-w", str(threads), "-k", "thread", "-q"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path = Path(directory, "rate")
    give_up = time.monotonic() + 120
    while not path.exists() or not path.read_text():
        if time.monotonic() > give_up:
            raise SystemExit("huey's consumer did not finish")
        time.sleep(0.01)
    worker.terminate()
    worker.wait(60)
    found = float(path.read_text())
    path.unlink()
    return found


def main() -> None:
    count = int(sys.argv[1])
    print("drain", max(drain(count, 1), drain(count, 8)))


if __name__ == "__main__":
    main()
