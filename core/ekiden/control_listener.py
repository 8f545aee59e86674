"""The thread of a worker that hears what apps tell workers."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ekiden.app import Ekiden
from ekiden.control import (
    CONTROL_TOPIC,
    ControlMessage,
    HeardRevocations,
    Revocation,
    read_control_message,
    revocations,
)
from ekiden.errors import (
    BackendError,
    TransportError,
)
from ekiden.job import Job, signal_revoked
from ekiden.loggers import safe_logger
from ekiden.results import Backend
from ekiden.runner import Runner
from ekiden.transport import Listener

logger = safe_logger("ekiden.worker")


class ControlListener:
    """The control thread: hears what apps tell workers.

    Where a backend stores, lost broadcasts cost nothing but time: records decide. ``heard`` is what only broadcasts
    told.
    """

    def __init__(
        self,
        app: Ekiden,
        backend: Backend | None,
        held: dict[int, Job],
        runner: Runner,
        *,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._failed = failed
        self._app = app
        self._backend = backend
        self._held = held
        self._runner = runner
        self.heard = HeardRevocations()
        self._closed = False
        self._listener: Listener | None = None
        self._thread = threading.Thread(target=self._run, name="ekiden-control", daemon=True)

    def start(self) -> None:
        """Subscribe, and listen in the thread."""
        self._listener = self._app.opened_transport().listen(CONTROL_TOPIC)
        self._thread.start()

    def close(self) -> None:
        """Unsubscribe, and end the thread."""
        self._closed = True
        if self._listener is not None:
            self._listener.close()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._listen()
        except BaseException as error:  # noqa: BLE001 - a bug of ours: the worker must end, not go on deaf
            self._failed(error)

    def _listen(self) -> None:
        assert self._listener is not None
        pause = threading.Event()
        while not self._closed:
            try:
                for payload in self._listener.receive(60.0):
                    message = read_control_message(payload)
                    if message is not None and message.revoked:
                        self._terminate(self._told(message))
            except (TransportError, BackendError) as error:
                if not self._closed:
                    logger.warning("what apps tell workers could not be heard: %s", error)
                    pause.wait(1.0)

    def _told(self, message: ControlMessage) -> dict[str, Revocation]:
        if message.heard is not None:
            self.heard.add(message.revoked, message.heard)
            return dict.fromkeys(message.revoked, message.heard)
        return {} if self._backend is None else revocations(self._backend, message.revoked)

    def _terminate(self, revoked: dict[str, Revocation]) -> None:
        for job in list(self._held.values()):
            if job.call is not None and job.call.id in revoked and revoked[job.call.id].terminate:
                logger.info("%s is terminated: it was revoked", job)
                self._runner.terminate(job)
                if job.work is not None:
                    signal_revoked(job.work, terminated=True)
