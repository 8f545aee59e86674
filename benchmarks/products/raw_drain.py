"""Fills a queue with the raw client and empties it again; prints how many a second."""

from __future__ import annotations

import json
import sys

import raw


def main() -> None:
    count = int(sys.argv[1])
    queue = raw.opened()
    try:
        queue.publish_in_batches(count)
        print(json.dumps(queue.drain(count)), flush=True)
    finally:
        queue.close()


if __name__ == "__main__":
    main()
