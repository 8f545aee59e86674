"""When the next try is: pure arithmetic on a task's policy."""

from __future__ import annotations

from ekiden.errors import WorkerLostError
from ekiden.options import Policy

_LARGEST_EXPONENT = 60


def tries_left(max_retries: int | None, retries: int) -> bool:
    """Whether a call that has been tried again ``retries`` times may be tried once more; None is without end."""
    return max_retries is None or retries < max_retries


def is_retried(policy: Policy, error: BaseException) -> bool:
    """Whether the task asked to be tried again after this kind of error."""
    return isinstance(error, policy.autoretry_for) and not isinstance(error, policy.dont_autoretry_for)


def asks_for_tries_after_death(policy: Policy, error: WorkerLostError, retries: int) -> bool:
    """Whether the task asked, by that very name, for one more try when the process of its body dies.

    ``autoretry_for=(Exception,)`` is about what the body raises: after a death the same try is handed out again.
    """
    return (
        WorkerLostError in policy.autoretry_for
        and is_retried(policy, error)
        and tries_left(policy.max_retries, retries)
    )


def retry_delay(policy: Policy, retries: int, chance: float) -> float:
    """Seconds until the try after the first ``retries`` retries.

    Without ``retry_backoff``: ``default_retry_delay``. With it: its seconds doubled for each retry, at most
    ``retry_backoff_max``; with ``retry_jitter`` a random part of that, ``chance`` being a random number in [0, 1).
    Full jitter, as in "Exponential Backoff And Jitter" (M. Brooker, 2015), spreads calls that failed together.
    """
    if not policy.retry_backoff:
        return policy.default_retry_delay
    longest = min(policy.retry_backoff_max, policy.retry_backoff * 2.0 ** min(retries, _LARGEST_EXPONENT))
    return longest * chance if policy.retry_jitter else longest
