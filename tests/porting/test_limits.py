"""What ends a task from outside, or holds it back."""

import pytest
from ekiden.exceptions import TaskRevokedError, TimeLimitExceeded

from tests.porting.conftest import Start
from tests.porting.programs import limits
from tests.porting.programs.limits import app


def test_a_soft_time_limit_can_be_caught(work: Start) -> None:
    work(app)

    assert limits.tidy_up_when_late.delay().get(timeout=10) == "tidied up"


@pytest.mark.slow
def test_a_hard_time_limit_ends_the_body(work: Start) -> None:
    work(app)

    result = limits.never_ends.delay()

    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=20)


def test_what_is_revoked_does_not_start(work: Start, use: Start) -> None:
    use(app)
    result = limits.quick.delay()
    others = [limits.quick.delay() for _ in range(2)]

    app.control.revoke(result.id)
    app.control.revoke([other.id for other in others])
    work(app)

    for each in (result, *others):
        with pytest.raises(TaskRevokedError):
            each.get(timeout=10)
        assert each.state == "REVOKED"


def test_what_is_revoked_ends_when_it_is_to_be_terminated(work: Start) -> None:
    work(app)
    limits.started.clear()
    result = limits.wait_for_ever.delay()
    assert limits.started.wait(10)

    result.revoke(terminate=True)

    with pytest.raises(TaskRevokedError, match="terminated"):
        result.get(timeout=10)


def test_a_rate_limit_holds_starts_back(work: Start) -> None:
    work(app)

    results = [limits.politely.delay() for _ in range(4)]

    times = sorted(result.get(timeout=20) for result in results)
    assert times[-1] - times[0] >= 3 / 5 - 0.15
