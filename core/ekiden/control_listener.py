"""The thread of a worker that hears what apps and other workers tell it.

A worker whose name somebody chose first asks whether another one has that name: opening a consumer under the name of
a living worker would take away what that worker is running. Names that are made here are unique, and not asked about.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from ekiden.app import Ekiden
from ekiden.control import (
    CONTROL_TOPIC,
    ControlMessage,
    HeardRevocations,
    NameClaim,
    Revocation,
    read_control_message,
    revocations,
)
from ekiden.errors import (
    TRANSPORT_IS_GONE,
    BackendError,
    ConfigurationError,
    TransportClosed,
    TransportError,
)
from ekiden.job import Job, signal_revoked
from ekiden.locks import Flag
from ekiden.loggers import safe_logger
from ekiden.results import Backend
from ekiden.transport import Listener

logger = safe_logger("ekiden.worker")

_ANSWER_SECONDS = 2.0
"""How long a worker that claims a name waits for the one that has it to answer."""


class ControlListener:
    """The control thread: hears what apps tell workers, and answers workers that claim this one's name.

    Where a backend stores, lost broadcasts cost nothing but time: records decide. ``heard`` is what only broadcasts
    told. ``terminate(job)`` ends a job's body.
    """

    def __init__(
        self,
        app: Ekiden,
        backend: Backend | None,
        held: dict[int, Job],
        terminate: Callable[[Job], None],
        *,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._failed = failed
        self._app = app
        self._backend = backend
        self._held = held
        self._terminate_job = terminate
        self.heard = HeardRevocations()
        self._claim: NameClaim | None = None
        self._claims_now = False
        self._is_taken = False
        self._closed = False
        self._listener: Listener | None = None
        self._thread = threading.Thread(target=self._run, name="ekiden-control", daemon=True)

    def subscribe(self) -> None:
        """Hear what is broadcast from now on. Raises BrokerUnavailable."""
        self._listener = self._app.opened_transport().listen(CONTROL_TOPIC)

    def claim_name(self, name: str, instance: str, stopping: Flag) -> bool:
        """Take a name that somebody chose, for the supervisor ``instance``; call it after ``subscribe``.

        Waits for an objection. Returns False when the worker was ``stopping`` before the name was its own. Raises
        ConfigurationError when a living worker of another supervisor has that name, BrokerUnavailable when nobody can
        be asked.
        """
        assert self._listener is not None
        self._claim = NameClaim(name, instance, time.time())
        self._claims_now = True
        self._tell(ControlMessage(claimed=self._claim))
        give_up = time.monotonic() + _ANSWER_SECONDS
        while not stopping.is_set() and not self._is_taken and (left := give_up - time.monotonic()) > 0:
            self._receive(min(left, 0.1))
        if self._is_taken:
            raise ConfigurationError(
                f"A worker named {name!r} is running already. Choose another name for this one, or leave the name "
                "out: a worker without one gets a unique one."
            )
        if stopping.is_set():
            return False
        self._claims_now = False
        return True

    def start(self) -> None:
        """Listen in the thread."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether the thread listens, or has not begun to."""
        return self._thread.ident is None or self._thread.is_alive()

    def close(self) -> None:
        """Unsubscribe, and end the thread. May be called before ``start``."""
        self._closed = True
        if self._listener is not None:
            self._listener.close()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._listen()
        except BaseException as error:  # noqa: BLE001 - a bug of ours: the worker must end, not go on deaf
            self._failed(error)

    def _listen(self) -> None:
        pause = threading.Event()
        while not self._closed:
            try:
                self._receive(60.0)
            except TRANSPORT_IS_GONE:
                if not self._closed:
                    raise
            except (TransportError, BackendError) as error:
                if not self._closed:
                    logger.warning("what apps tell workers could not be heard: %s", error)
                    pause.wait(1.0)

    def _receive(self, seconds: float) -> None:
        assert self._listener is not None
        for payload in self._listener.receive(seconds):
            message = read_control_message(payload)
            if message is None:
                continue
            if message.revoked:
                self._terminate(self._told(message))
            if self._claim is not None:
                self._compare_names(self._claim, message)

    def _compare_names(self, own: NameClaim, message: ControlMessage) -> None:
        """Object to another supervisor's claim of our name; learn of an objection to ours."""
        other = message.claimed
        if message.taken == own:
            self._is_taken = True
        elif other is not None and other.name == own.name and other.instance != own.instance:
            if not self._claims_now or own.precedes(other):
                logger.warning("another worker was started under the name %s of this one: it is refused", own.name)
                self._tell(ControlMessage(taken=other))
            else:
                self._tell(ControlMessage(claimed=own))  # it may not have heard ours, and objects if it is first

    def _tell(self, message: ControlMessage) -> None:
        with suppress(TransportClosed):  # this worker has just stopped
            self._app.opened_transport().broadcast(CONTROL_TOPIC, [msgspec.json.encode(message)])

    def _told(self, message: ControlMessage) -> dict[str, Revocation]:
        if message.heard is not None:
            self.heard.add(message.revoked, message.heard)
            return dict.fromkeys(message.revoked, message.heard)
        return {} if self._backend is None else revocations(self._backend, message.revoked)

    def _terminate(self, revoked: dict[str, Revocation]) -> None:
        for job in list(self._held.values()):
            if job.call is not None and job.call.id in revoked and revoked[job.call.id].terminate:
                logger.info("%s is terminated: it was revoked", job)
                self._terminate_job(job)
                if job.work is not None:
                    signal_revoked(job.work, terminated=True)
