"""The errors, under the module name that Celery's users look for."""

from ekiden.errors import (
    BackendError,
    BackendRefused,
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    EkidenError,
    Ignore,
    MaxRetriesExceededError,
    MessageError,
    MisuseError,
    NotRegistered,
    Reject,
    ResultTimeout,
    Retry,
    SoftTimeLimitExceeded,
    TaskArgumentsError,
    TaskError,
    TaskExpired,
    TaskPredicate,
    TaskRejected,
    TaskRevoked,
    TimeLimitExceeded,
    TransportError,
    WorkerLostError,
)

CeleryError = EkidenError
TaskRevokedError = TaskRevoked
ImproperlyConfigured = ConfigurationError
OperationalError = BrokerUnavailable
TimeoutError = ResultTimeout  # noqa: A001 - celery.exceptions.TimeoutError is what a porter imports

__all__ = [
    "BackendError",
    "BackendRefused",
    "BrokerRefused",
    "BrokerUnavailable",
    "CeleryError",
    "ConfigurationError",
    "EkidenError",
    "Ignore",
    "ImproperlyConfigured",
    "MaxRetriesExceededError",
    "MessageError",
    "MisuseError",
    "NotRegistered",
    "OperationalError",
    "Reject",
    "ResultTimeout",
    "Retry",
    "SoftTimeLimitExceeded",
    "TaskArgumentsError",
    "TaskError",
    "TaskExpired",
    "TaskPredicate",
    "TaskRejected",
    "TaskRevoked",
    "TaskRevokedError",
    "TimeLimitExceeded",
    "TimeoutError",
    "TransportError",
    "WorkerLostError",
]


def __getattr__(name: str) -> object:
    from ekiden.celery_names import missing_name  # only for a name that is not here

    raise missing_name(__name__, name)
