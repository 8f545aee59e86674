"""What the supervisor does besides replacing: it refuses, says that it is alive, reaps, and costs nothing when idle."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ekiden.testing.conformance.pace import assert_quick

from tests.faults.ground import Ground, command_line, eventually, on_one_broker, wait_until_gone

NEW_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@on_one_broker
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("broken:app", "broken on purpose"),
        ("not_there:app", "there is no module 'not_there'"),
        ("tasks:nothing", "has no 'nothing'"),
        ("tasks:note", "not an Ekiden app"),
        ("in_memory:app", "lives inside one process"),
    ],
)
def test_an_app_that_cannot_work_is_refused_in_one_sentence_and_not_tried_again(
    ground: Ground, target: str, reason: str
) -> None:
    worker = ground.start(target, processes=3, ready=False)

    assert worker.wait() == 78
    worker.kill()  # its log is read to the end
    assert len(worker.log) == 1, worker.log
    assert reason in worker.log[0]


def test_a_body_process_that_cannot_import_the_app_fails_its_task_and_says_why(ground: Ground) -> None:
    (ground.directory / "only_once.py").write_text(
        "import os, sys\nfrom tasks import app as tasks\nfrom ekiden import Ekiden\napp = Ekiden('once')\n"
        "@app.task(name='apart', pool='process')\ndef apart(): pass\n"
        "if 'body_process' in ' '.join(sys.orig_argv): raise RuntimeError('not here')\n"
    )
    path = os.pathsep.join([str(ground.directory), os.environ.get("PYTHONPATH", "")])
    ground.start("only_once:app", environment={"PYTHONPATH": path})

    result = ground.app.send_task("apart")

    eventually(result.ready, what="the task ends")
    assert result.state == "FAILURE"
    assert "not here" in str(result.result)
    assert len(eventually(ground.dead, what="its dead letter")) == 1


@on_one_broker
@pytest.mark.slow
def test_the_liveness_file_is_touched_while_all_processes_work(ground: Ground) -> None:
    alive = ground.directory / "alive"
    worker = ground.start(processes=2, liveness_file=alive)

    eventually(alive.exists, what="the file is there")
    before = alive.stat().st_mtime_ns
    eventually(lambda: alive.stat().st_mtime_ns > before, what="it is touched again")

    assert worker.stop() == 0


@on_one_broker
@pytest.mark.slow
@pytest.mark.timeout(90)
def test_the_liveness_file_is_not_touched_when_a_process_hangs(ground: Ground) -> None:
    alive = ground.directory / "alive"
    worker = ground.start(processes=2, liveness_file=alive)
    eventually(alive.exists, what="the file is there")

    os.kill(worker.worker_pids()[0], signal.SIGSTOP)

    eventually(lambda: time.time() - alive.stat().st_mtime > 5, what="it is not touched any more", within=45)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare makes the namespace in which it is process 1")
def test_it_works_as_process_1_and_reaps_orphans(ground: Ground) -> None:
    if subprocess.run([*NEW_PID_NAMESPACE, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make process namespaces")
    outer = ground.start(under=NEW_PID_NAMESPACE)
    (first,) = [process for process in psutil.Process(outer.pid).children() if "ekiden" in command_line(process)]

    assert ground.app.send_task("work", (1,)).get(20) == 1
    orphan = ground.app.send_task("leave_an_orphan").get(20)

    assert orphan > 1
    eventually(lambda: not zombies_below(first), what="the orphan is reaped")
    first.send_signal(signal.SIGTERM)
    wait_until_gone(first.pid)
    assert len(outer.said("has stopped")) == 1


@pytest.mark.slow
def test_an_idle_worker_costs_next_to_nothing(ground: Ground) -> None:
    worker = ground.start()
    (pid,) = worker.worker_pids()
    everybody = [psutil.Process(worker.pid), psutil.Process(pid)]
    seconds = 5.0
    before, began = [cpu_seconds(process) for process in everybody], time.monotonic()

    eventually(lambda: time.monotonic() > began + seconds, what="some time is over")

    used = [cpu_seconds(process) - had for process, had in zip(everybody, before, strict=True)]
    share = sum(used) / (time.monotonic() - began)
    memory = everybody[1].memory_info().rss / 1024 / 1024
    print(f"idle: {share:.2%} of a core, {memory:.1f} MiB for the worker process")
    assert_quick(share, 0.01)
    assert memory < 40


def test_a_worker_starts_its_first_task_soon(ground: Ground) -> None:
    result = ground.app.send_task("work", (1,))
    began = time.monotonic()

    ground.start(ready=False)

    (entry,) = ground.ledger.wait("work")
    print(f"{entry['at'] - began:.2f} s from the command to the first task")
    assert result.get(5) == 1


@on_one_broker
@pytest.mark.slow
def test_a_crash_loop_is_slowed_down_and_ends_when_the_cause_does(ground: Ground) -> None:
    gate = ground.directory / "healthy"
    (ground.directory / "crashing.py").write_text(
        f"import os\nfrom tasks import app\nif not os.path.exists({str(gate)!r}): os._exit(3)\n"
    )
    path = os.pathsep.join([str(ground.directory), os.environ.get("PYTHONPATH", "")])
    worker = ground.start("crashing:app", ready=False, environment={"PYTHONPATH": path})

    deaths = worker.wait_until_it_says("it exited with 3", 4)
    gate.touch()

    pauses = [float(re.search(r"replaced in ([\d.]+) s", line)[1]) for line in deaths]
    assert pauses == [0.1, 0.2, 0.4, 0.8]
    worker.wait_until_ready()
    assert ground.app.send_task("work", (1,)).get(20) == 1


@on_one_broker
@pytest.mark.parametrize("by_signal", [True, False], ids=["SIGTERM", "os._exit(0)"])
def test_a_process_that_ends_although_nobody_stopped_the_worker_is_replaced(ground: Ground, by_signal: bool) -> None:
    (ground.directory / "leaving.py").write_text(
        "import os\nfrom tasks import app\n@app.task(name='leave')\ndef leave():\n    os._exit(0)\n"
    )
    path = os.pathsep.join([str(ground.directory), os.environ.get("PYTHONPATH", "")])
    worker = ground.start("leaving:app", environment={"PYTHONPATH": path})
    if by_signal:
        os.kill(worker.worker_pids()[0], signal.SIGTERM)
    else:
        ground.app.send_task("leave")

    worker.wait_until_it_says("ended by itself", 1)

    assert ground.app.send_task("work", (1,)).get(20) == 1
    assert worker.stop() == 0


def zombies_below(process: psutil.Process) -> list[psutil.Process]:
    return [each for each in process.children(recursive=True) if is_zombie(each)]


def is_zombie(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@on_one_broker
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import nothing_like_it", "nothing_like_it"),
    ],
)
def test_a_module_that_ends_the_program_is_refused_and_not_tried_again(ground: Ground, line: str, reason: str) -> None:
    (ground.directory / "leaving_at_import.py").write_text(f"{line}\n")
    path = os.pathsep.join([str(ground.directory), os.environ.get("PYTHONPATH", "")])
    worker = ground.start("leaving_at_import:app", processes=2, ready=False, environment={"PYTHONPATH": path})

    assert worker.wait() == 78
    worker.kill()  # its log is read to the end
    assert len(worker.log) == 1, worker.log
    assert "leaving_at_import" in worker.log[0]
    assert reason in worker.log[0]


@on_one_broker
@pytest.mark.parametrize("harm", ["no directory", "a link", "a pipe"])
def test_a_bad_place_for_the_liveness_file_costs_a_line_of_the_log(ground: Ground, harm: str) -> None:
    alive, others = ground.directory / "run" / "alive", ground.directory / "another's"
    others.touch()
    os.utime(others, (1, 1))
    if harm != "no directory":
        alive.parent.mkdir()
    if harm == "a link":
        alive.symlink_to(others)
    elif harm == "a pipe":
        os.mkfifo(alive)
    worker = ground.start(liveness_file=alive)

    worker.wait_until_it_says("liveness file cannot be touched")
    assert ground.app.send_task("work", (1,)).get(10) == 1
    assert others.stat().st_mtime == 1
    if harm == "no directory":
        alive.parent.mkdir()
    else:
        alive.unlink()

    worker.wait_until_it_says("liveness file is touched again")
    assert alive.is_file()
    assert len(worker.said("cannot be touched")) == 1
    assert worker.stop() == 0


@on_one_broker
def test_a_process_whose_settling_hangs_stops_counting_as_alive(ground: Ground) -> None:
    alive = ground.directory / "alive"
    worker = ground.start("hangs:app", liveness_file=alive)
    eventually(alive.exists, what="the file is there")

    ground.app.send_task("work", (1,))

    worker.wait_until_it_says("does not count as alive for its liveness file: the thread that stores results")
    ground.open()
    worker.wait_until_it_says("counts as alive again")
    ground.wait_until_empty()


PIDS = Path("/sys/fs/cgroup/pids")


@pytest.fixture
def few_processes() -> Iterator[Path]:
    """A control group that can limit how many processes and threads there are: fork fails in it with EAGAIN."""
    group = PIDS / f"ekiden-{os.getpid()}"
    try:
        if not (PIDS / "cgroup.procs").exists():
            raise FileNotFoundError(PIDS)
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs a control group for pids (version 1): {error}")
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text(), what="the control group is empty")
    group.rmdir()


@on_one_broker
def test_a_process_that_cannot_be_forked_is_waited_for_and_the_others_work(few_processes: Path, ground: Ground) -> None:
    worker = ground.start(processes=2)
    first, second = worker.worker_pids()
    (few_processes / "cgroup.procs").write_text(str(worker.pid))
    (few_processes / "pids.max").write_text("1")

    os.kill(first, signal.SIGKILL)
    worker.wait_until_it_says("a worker process cannot be started: .*temporarily unavailable.*; tried again in", 3)
    assert ground.app.send_task("work", (1,)).get(10) == 1
    assert worker.worker_pids() == [second]
    (few_processes / "pids.max").write_text("max")

    worker.wait_until_ready(3)
    assert second in worker.worker_pids()
    assert len(worker.worker_pids()) == 2
    assert len(worker.said("died")) == 1
    assert worker.stop() == 0


@on_one_broker
def test_a_process_that_was_forked_when_no_thread_can_be_is_replaced_too(few_processes: Path, ground: Ground) -> None:
    worker = ground.start(processes=2)
    first, second = worker.worker_pids()
    (few_processes / "cgroup.procs").write_text(str(worker.pid))
    # The supervisor has one thread of its own, and one for each process; a process is there, its thread is not.
    (few_processes / "pids.max").write_text("3")

    os.kill(first, signal.SIGKILL)
    worker.wait_until_it_says("worker process .* died")
    replaced = eventually(lambda: [pid for pid in worker.worker_pids() if pid not in {first, second}], what="another")
    (few_processes / "pids.max").write_text("max")
    os.kill(replaced[0], signal.SIGKILL)

    worker.wait_until_it_says("worker process .* died", 2)
    eventually(lambda: len(worker.worker_pids()) == 2, what="it is replaced")
    assert second in worker.worker_pids()
    assert worker.stop() == 0


@on_one_broker
@pytest.mark.parametrize("left", ["a thread", "an exit handler", "a child", "everything"])
def test_a_process_that_ends_on_an_error_ends_in_time_whatever_is_left(ground: Ground, left: str) -> None:
    worker = ground.start("leftovers:app")
    (pid,) = worker.worker_pids()
    children = ground.app.send_task("leave", (left,)).get(10)

    ground.app.send_task("fail_the_worker")

    worker.wait_until_it_says(f"worker process {pid} died", within=12)
    wait_until_gone(pid, within=1)
    for child in children:
        wait_until_gone(child, within=5)
    assert ground.app.send_task("work", (1,)).get(20) == 1
    assert worker.worker_pids() != [pid]
    assert worker.stop() == 0
