"""A real worker beside this program: the ``ekiden worker`` command in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

LOG_NAME = "worker.log"
PATIENCE_SECONDS = 20.0


class Worker:
    """Starts with the ``with`` block and is stopped at its end. Owned by the thread that made it.

    It runs in a process group of its own, so that Ctrl-C reaches this program only, which then stops it in order. Under
    its ``name`` it takes over at once what a dead worker of that name had in hand.
    """

    def __init__(self, directory: Path, *, target: str, name: str, environment: dict[str, str]) -> None:
        arguments = ["worker", target, "--queues", "fetch", "--processes", "1", "--threads", "4", "--name", name]
        self._command = [sys.executable, "-m", "ekiden", *arguments]
        self._environment = {**os.environ, **environment}
        self.log = directory / LOG_NAME

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Start it; after it died, start it again."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None when it still runs after so long."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """kill -9: the worker and all its processes are gone before they can do anything about it."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Let it finish what it has begun; kill it when that takes too long."""
        self._process.terminate()
        if self.wait(PATIENCE_SECONDS) is None:
            self.kill()

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-10:])
