"""Results, under the module name that Celery's users look for."""

from ekiden.results import AsyncResult, EagerResult

__all__ = ["AsyncResult", "EagerResult"]
