"""How many CPUs this process may use: its affinity, and the quotas of its control groups.

A container that is limited to one CPU of 64 sees all 64. The kernel's quota says what it gets: ``cpu.max`` in each of
the process's control groups (version 2), ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` (version 1). See the kernel's
documentation, "Control Group v2", section CPU, and "CFS Bandwidth Control".
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cpus(*, cgroups: Path = _CGROUPS, own_cgroups: Path = _OWN_CGROUPS) -> int:
    """The number of CPUs, at least 1; a quota of two and a half CPUs counts as three."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas(cgroups, own_cgroups))]))


def _quotas(cgroups: Path, own_cgroups: Path) -> Iterator[float]:
    """Each quota that holds for this process, in CPUs."""
    for line in _text(own_cgroups).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            for group in _with_parents(cgroups, path):
                quota, _, period = _text(group / "cpu.max").partition(" ")
                yield from _quota(quota, period)
        elif "cpu" in controllers.split(","):
            for mounted in (cgroups / controllers, cgroups / "cpu"):
                for group in _with_parents(mounted, path):
                    yield from _quota(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us"))


def _with_parents(root: Path, path: str) -> Iterator[Path]:
    """The group and those around it. In a container the root of what is mounted is its own group."""
    parts = [part for part in path.split("/") if part and part != ".."]  # ".." leads out of what the container sees
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _quota(quota: str, period: str) -> Iterator[float]:
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return  # "max", or no such file: there is no quota
    if cpus > 0:  # version 1 writes -1 for none
        yield cpus


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
