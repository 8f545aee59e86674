"""A call under an id that was used before is a new call."""

import itertools
import uuid

from ekiden import Ekiden


def test_a_call_under_a_reused_id_has_its_own_result() -> None:
    app = Ekiden("reused", broker=f"memory://{uuid.uuid4().hex}")

    @app.task
    def double(number: int) -> int:
        return 2 * number

    with app, app.worker():
        first = double.apply_async((1,), task_id="mine").get(10)
        second = double.apply_async((2,), task_id="mine").get(10)

    assert (first, second) == (2, 4)


def test_a_call_under_a_reused_id_is_tried_again() -> None:
    app = Ekiden("reused", broker=f"memory://{uuid.uuid4().hex}")
    runs = itertools.count()

    @app.task(autoretry_for=(OSError,), default_retry_delay=0.01)
    def fails_second_time() -> int:
        run = next(runs)
        if run == 1:
            raise OSError("once")
        return run

    with app, app.worker():
        first = fails_second_time.apply_async(task_id="mine").get(10)
        second = fails_second_time.apply_async(task_id="mine").get(10)

    assert (first, second) == (0, 2)
