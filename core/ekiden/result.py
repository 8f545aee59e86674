"""Results, under the module name that Celery's users look for."""

from ekiden.results import AsyncResult, EagerResult

__all__ = ["AsyncResult", "EagerResult"]


def __getattr__(name: str) -> object:
    from ekiden.celery_names import missing_name  # only for a name that is not here

    raise missing_name(__name__, name)
