"""What the tasks of the fault tests did, written down where no crash can take it back: a line per event in a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

LEDGER = "FAULTS_LEDGER"
"""The environment variable that says which file."""


def note(what: str, **more: object) -> None:
    """Append one line in one write: it is there whole, even if this process is killed in the next moment."""
    line = json.dumps({"what": what, "pid": os.getpid(), "at": time.monotonic(), **more}).encode() + b"\n"
    descriptor = os.open(os.environ[LEDGER], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def wait_for(gate: str, *, within: float = 60.0) -> None:
    """Wait until the test opens a gate."""
    give_up = time.monotonic() + within
    while not is_open(gate):
        if time.monotonic() > give_up:
            raise TimeoutError(f"the gate {gate} was not opened")
        time.sleep(0.01)


def is_open(gate: str) -> bool:
    """Whether the test has made the file of this name beside the ledger."""
    return Path(os.environ[LEDGER]).with_name(gate).exists()
