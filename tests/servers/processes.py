"""A server in a process of the tests' own: started, stopped, killed, frozen, and never left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "127.0.0.1"
START_SECONDS = 120.0
"""By then a server answers, also on a machine that has much else to do."""

STOP_SECONDS = 60.0

# Below what the kernel gives to outgoing connections, so that none of these takes a port between two starts; without
# MongoDB's standard port, where others would take a test's own server for one that they may share.
_PORTS = sorted({*range(15_000, 30_000)} - {27_017})
# A Redis node's cluster bus listens so far above its port.
_PORT_AND_BUS = 10_000


class CannotStart(Exception):
    """A server did not come up; the message ends with what it wrote."""


def free_port() -> int:
    """A port of this host that nobody listens on, nor on the one 10,000 above it."""
    while True:
        port = random.choice(_PORTS)
        if _is_free(port) and _is_free(port + _PORT_AND_BUS):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


PROGRAMS_VARIABLE = "TESTS_PROGRAMS"


def is_chosen(program: str | None) -> bool:
    """Whether this program lies in the directory in TESTS_PROGRAMS: tests are to run it, not what runs here already."""
    return program is not None and Path(program).parent == Path(os.environ.get(PROGRAMS_VARIABLE) or os.devnull)


def find_program(*names: str, also_in: Sequence[str] = ()) -> str | None:
    """The path of the first of these programs that is installed.

    The directory in TESTS_PROGRAMS is searched first: the programs there are another version than the installed one.
    Administrators' directories are searched last.
    """
    chosen = [os.environ[PROGRAMS_VARIABLE]] if PROGRAMS_VARIABLE in os.environ else []
    assert all(map(os.path.isdir, chosen)), f"{PROGRAMS_VARIABLE} names {chosen[0]}, which is no directory"
    search_path = os.pathsep.join([*chosen, *also_in, os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return next((found for name in names if (found := shutil.which(name, path=search_path))), None)


class ServerProcess:
    """One process that serves, in ``directory``, started by ``command`` and ready when ``is_ready`` says so.

    All signals go by its process id. Whoever makes one calls ``kill`` at the end: a fixture, or ``closing``.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        *,
        is_ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = list(command)
        self.directory = directory
        self.environment = {**os.environ, **(environment or {})}
        self._is_ready = is_ready
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def is_up(self) -> bool:
        """Whether it was started, and has not been ended since."""
        return self._process is not None

    def launch(self) -> None:
        """Start it, without waiting until it answers."""
        assert self._process is None, f"{self.name} runs"
        with self._output_path().open("ab") as output:
            self._process = self._spawn(output)

    def start(self) -> None:
        """Start it and wait until it answers."""
        self.launch()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until it answers. Raises CannotStart when it ends instead, or takes too long."""
        give_up = time.monotonic() + START_SECONDS
        while not self._is_ready():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.kill()
                raise CannotStart(f"{self.name} does not answer; it wrote:\n{self.written()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop it as an operator does, and wait for its end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """``kill -9``, also when it is frozen or has ended; wait until it is gone."""
        self._end(signal.SIGKILL)

    def restart(self, *, by_kill: bool = False) -> None:
        """End it, by SIGTERM or by ``kill -9``, and start it again with the same files on the same ports."""
        if by_kill:
            self.kill()
        else:
            self.stop()
        self.start()

    def freeze(self) -> None:
        """It does nothing any more, and its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        os.kill(self.pid, signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It does nothing inside the ``with`` block."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def written(self) -> str:
        """The last of what it wrote to its output."""
        path = self._output_path()
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def _spawn(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*_ended_with_us(), *self.command],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the tests must not end it before they have
        )

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"{self.name} did not end within {STOP_SECONDS:g} s:\n{self.written()}") from None
        finally:
            self._process = None

    def _output_path(self) -> Path:
        return self.directory / f"{self.name}.out"


def _ended_with_us() -> list[str]:
    """What a command is started by so that the kernel kills its process when ours is killed before any fixture ends.

    It looks at the thread that starts the process, and only the main one lives as long as all of us.
    """
    program = find_program("setpriv")
    if program is None or threading.current_thread() is not threading.main_thread():
        return []
    return [program, "--pdeathsig", "KILL", "--"]


def answers(host: str, port: int) -> bool:
    """Whether somebody accepts connections there."""
    with suppress(OSError), socket.create_connection((host, port), timeout=2.0):
        return True
    return False
