"""What urllib3 reaches alone, with a queue of the same promises: the ceiling for the CouchDB transport.

    python benchmarks/raw_couchdb.py [--messages N] [--url URL]

It makes the requests that ekiden makes, over one connection: a publish is two ``_bulk_docs``, the first of notes that
refuse an id a second time, the second of the messages; a claim reads a range of ``_all_docs`` and writes what it found
back in a ``_bulk_docs`` with its revisions, a lease and a fresh token; settling deletes message and note in another. It
leaves out: headers, several queues, consumer names, what is delayed, leases that have ended, follow-ups, answers for
each message, rings, the measure of the server's clock, tombstones, the decoding of calls, deadlines, threads, running
anything, and every error.

    default:r:RANK:AGE:ID    a message       ~default:ID    its note, as ekiden has them
"""

from __future__ import annotations

import argparse
import base64
import os
import statistics
import time
from contextlib import closing
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec
import urllib3
from ekiden.message import new_id
from timing import rate_of

BATCH = 100
PRIORITY = 4
LEASE_SECONDS = 60
BODY = b'["bench.noop","0191f0c2a5d7f3c09f6e4a8b1d2c7e55",1763821000.123456,[12345],{},{"retries":0,"expires":null}]'

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class Raw:
    """One queue in the database ``name``, by urllib3."""

    def __init__(self, url: str, name: str) -> None:
        parts = urlsplit(url)
        self._headers = {"Content-Type": "application/json"}
        if parts.username:
            self._headers.update(urllib3.make_headers(basic_auth=f"{parts.username}:{parts.password or ''}"))
        self._pool = urllib3.HTTPConnectionPool(parts.hostname or "127.0.0.1", parts.port or 5984, maxsize=1)
        self._name = name
        self._ask("PUT", "?q=1", None)

    def publish_one_by_one(self, count: int) -> None:
        """Two requests each."""
        for _ in range(count):
            self._publish(1)

    def publish_in_batches(self, count: int) -> None:
        """The same for 100."""
        for start in range(0, count, BATCH):
            self._publish(min(BATCH, count - start))

    def _publish(self, count: int) -> None:
        age = int(time.time() * 1e6)
        ids = [new_id() for _ in range(count)]
        places = [f"default:r:{9 - PRIORITY}:{age + number:016d}:{id_}" for number, id_ in enumerate(ids)]
        notes = self._write([{"_id": f"~default:{id_}", "at": place} for id_, place in zip(ids, places, strict=True)])
        self._write(
            [
                {
                    "_id": place,
                    "format": 1,
                    "message": base64.b64encode(BODY).decode(),
                    "attempts": 0,
                    "until": 0,
                    "token": "",
                    "owner": "",
                    "note": note,
                }
                for place, note in zip(places, notes, strict=True)
            ]
        )

    def drain(self, count: int) -> float:
        """Claim 100, settle 100, until ``count`` are settled; how many a second."""
        began = time.perf_counter()
        rows = "/_all_docs?" + urlencode(
            {"startkey": '"default:r:"', "endkey": '"default:r;"', "limit": BATCH, "include_docs": "true"}
        )
        left = count
        while left > 0:
            documents = [row["doc"] for row in self._ask("GET", rows, None)["rows"]]
            token, until = os.urandom(12).hex(), int((time.time() + LEASE_SECONDS) * 1000)
            for document in documents:
                document.update(attempts=document["attempts"] + 1, until=until, token=token, owner="raw")
            revisions = self._write(documents)
            endings = [
                {"_id": document["_id"], "_rev": revision, "_deleted": True}
                for document, revision in zip(documents, revisions, strict=True)
            ]
            endings += [
                {"_id": f"~default:{document['_id'].rpartition(':')[2]}", "_rev": document["note"], "_deleted": True}
                for document in documents
            ]
            self._write(endings)
            left -= len(documents)
        return count / (time.perf_counter() - began)

    def _write(self, documents: list[dict[str, Any]]) -> list[str]:
        """Write them all, and return their revisions."""
        answers = {each["id"]: each.get("rev") for each in self._ask("POST", "/_bulk_docs", {"docs": documents})}
        revisions = [answers[document["_id"]] for document in documents]
        if None in revisions:
            raise SystemExit("a document was refused in the raw loop")
        return revisions

    def _ask(self, method: str, path: str, body: object) -> Any:
        content = None if body is None else _encode(body)
        answer = self._pool.request(method, f"/{self._name}{path}", body=content, headers=self._headers, retries=False)
        if answer.status not in {200, 201}:
            raise SystemExit(f"{method} {path} was answered {answer.status} {answer.data!r} in the raw loop")
        return _decode(answer.data)

    def close(self) -> None:
        """Delete its database."""
        self._ask("DELETE", "", None)
        self._pool.close()


def main() -> None:
    from document_servers import CouchDBServer

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=400)
    parser.add_argument("--url", help="a server on this machine; else one is started")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {}
    with closing(CouchDBServer(options.url)) as server:
        print(server.described())
        told = server.environment(results=False)
        raw = Raw(told["BENCH_URL"], f"{told['BENCH_NAME']}-raw")
        for _ in range(5):
            one_by_one = options.messages // 4
            rates.setdefault("publish, one at a time", []).append(rate_of(raw.publish_one_by_one, one_by_one))
            raw.drain(one_by_one)
            rates.setdefault("publish, 100 at a time", []).append(rate_of(raw.publish_in_batches, options.messages))
            rates.setdefault("claim 100 and settle 100", []).append(raw.drain(options.messages))
        raw.close()
    for what, values in rates.items():
        print(f"{what:32} {statistics.median(values):10.0f} per s   ({min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
