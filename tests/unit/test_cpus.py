"""How many processes a worker starts by itself: as many as the CPUs that the kernel gives it."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from ekiden.cpus import available_cpus

HERE = len(os.sched_getaffinity(0))


def found(directory: Path, own: str, files: Mapping[str, str]) -> int:
    (directory / "own").write_text(own)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return available_cpus(cgroups=directory, own_cgroups=directory / "own")


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, HERE),
        ("0::/\n", {}, HERE),
        ("0::/\n", {"cpu.max": "garbage"}, HERE),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "20000 100000", "cpu.max": "max 100000"}, 1),
        ("0::/../elsewhere\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": f"{HERE + 7}00000 100000"}, HERE),
        ("4:cpu,cpuacct:/\n1:memory:/\n", {"cpu/cpu.cfs_quota_us": "80000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "1000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/docker/x\n", {"cpu/cpu.cfs_quota_us": "90000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, HERE),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "0"}, HERE),
        ("", {}, HERE),
    ],
)
def test_the_affinity_and_every_quota_count(tmp_path: Path, own: str, files: Mapping[str, str], cpus: int) -> None:
    assert found(tmp_path, own, files) == cpus


def test_a_part_of_a_cpu_counts_as_one(tmp_path: Path) -> None:
    quota = f"{(HERE - 1) * 100000 + 1} 100000"

    assert found(tmp_path, "0::/\n", {"cpu.max": quota}) == HERE
