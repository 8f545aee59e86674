"""A worker inside the process that sends the calls, for tests and small programs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import msgspec

from ekiden.app import Ekiden
from ekiden.errors import ConfigurationError, TransportClosed
from ekiden.locks import start_thread
from ekiden.modules import is_body_process
from ekiden.plan import WorkerOptions
from ekiden.worker import Worker


class InProcessWorker:
    """A worker in a thread of this process: ``with app.worker(): ...``. Made for tests and small programs."""

    def __init__(self, app: Ekiden, **options: object) -> None:
        self._app = app
        app.load_tasks()
        self.worker = Worker(app, _checked(options))
        self._thread = threading.Thread(target=self._run, name="ekiden-worker", daemon=True)
        self._error: BaseException | None = None

    def start(self) -> Self:
        """Start it, and return when it receives. Raises what kept it from starting."""
        if is_body_process():
            raise ConfigurationError(
                "a module that starts a worker when it is imported cannot be imported by a body process, which would "
                'start one, too: put app.worker() under if __name__ == "__main__".'
            )
        start_thread(self._thread)
        while not self.worker.ready.wait(0.05):
            if not self._thread.is_alive():
                break
        if self._error is not None:
            raise self._error
        return self

    def stop(self, *, at_once: bool = False) -> None:
        """Stop it, and return when it has stopped. Raises what made it fail, if something did.

        Closing the app ends its worker, too, and is no failure: a web application under test closes its app at its end.
        """
        self.worker.stop(at_once=at_once)
        self._thread.join()
        if self._error is not None and not isinstance(self._error, TransportClosed):
            raise self._error

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that starts or stops the worker
            self._error = error

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _checked(options: Mapping[str, object]) -> WorkerOptions:
    queues = options.get("queues")
    if isinstance(queues, str):
        options = {**options, "queues": (queues,)}
    try:
        given = msgspec.structs.asdict(WorkerOptions(**options))  # type: ignore[arg-type]  # checked by the next line
        return msgspec.convert(given, WorkerOptions)
    except (TypeError, msgspec.ValidationError) as error:
        raise ConfigurationError(
            f"app.worker(): {error}; it takes {', '.join(WorkerOptions.__struct_fields__)}."
        ) from None
