"""Other versions of Redis and RabbitMQ than this Debian has: those of another suite, unpacked into a directory.

    python3 tests/servers/versions.py SUITE        as root, on Debian, with mmdebstrap installed

Its last line is a directory of programs; the tests run these when TESTS_PROGRAMS names it:

    bookworm    RabbitMQ 3.10, Redis 7.0        trixie    RabbitMQ 4.0, Redis 8.0        sid    RabbitMQ 4.3, Valkey 9

The packages go, with all they need, below the directory in TESTS_SERVERS, else below .servers/ of this clone; the
machine itself gets none of them. Each program there is a script that runs the real one with that directory as its
root, in a mount namespace of its own: nothing stays mounted, and the script becomes the server, so that signals reach
the server by the script's process id.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

from install import DIRECTORY  # a script beside this one

SUITES = {"bookworm": "redis-server", "trixie": "redis-server", "sid": "valkey-server"}
"""By suite: the package that holds the server that speaks Redis's protocol."""

_NEEDED = "base-files,dash,coreutils,sed,grep,mawk,rabbitmq-server"
_PROGRAMS = {
    "rabbitmq-server": "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "rabbitmqctl": "/usr/lib/rabbitmq/bin/rabbitmqctl",
    "epmd": "/usr/bin/epmd",
}
_SHARED_DIRECTORIES = ("dev", "proc", "tmp")
_SCRIPT = """\
#!/bin/sh
# Run {program} of {root}, as this very process.
exec unshare --mount --propagation private sh -c '
    for directory in {shared}; do mount --rbind "/$directory" "{root}/$directory" || exit 1; done
    exec chroot "{root}" "$0" "$@"' {program} "$@"
"""
_ATTEMPTS = 4
_PAUSE_SECONDS = 10.0


def main(suite: str) -> int:
    """Unpack ``suite`` where that has not been done, and print where its programs are."""
    if suite not in SUITES:
        print(f"there is no suite {suite!r}; say one of {', '.join(SUITES)}", file=sys.stderr)
        return 2
    root = DIRECTORY / suite
    programs = DIRECTORY / f"{suite}-programs"
    for attempt in range(1, _ATTEMPTS + 1):
        if (programs / "epmd").exists():
            print(programs)
            return 0
        try:
            unpack(suite, root)
            write_scripts(suite, root, programs)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"could not unpack {suite} (attempt {attempt} of {_ATTEMPTS}): {error}", file=sys.stderr)
            time.sleep(attempt * _PAUSE_SECONDS)
    return 1


def unpack(suite: str, root: Path) -> None:
    """The files of the servers' packages, and of all that these need; no script of a package is run."""
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    packages = f"{_NEEDED},{SUITES[suite]}"
    command = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={packages}"]
    late = ["--aptopt=Acquire::Check-Valid-Until false"]  # a mirror may be behind
    subprocess.run([*command, *late, suite, str(root), f"deb {mirror()} {suite} main"], check=True, timeout=600)
    for name in ("hosts", "passwd", "group"):
        shutil.copy(Path("/etc") / name, root / "etc" / name)
    for directory in _SHARED_DIRECTORIES:
        (root / directory).mkdir(exist_ok=True)


def mirror() -> str:
    """Where this machine gets its Debian packages from."""
    form = "$(ORIGIN) $(LABEL) $(REPO_URI)"
    found = subprocess.run(["apt-get", "indextargets", "--format", form], check=True, capture_output=True, text=True)
    for line in found.stdout.splitlines():
        origin, label, address = line.rsplit(" ", 2)
        if (origin, label) == ("Debian", "Debian"):
            return address
    raise OSError("no source of Debian packages is known here: apt-get update")


def write_scripts(suite: str, root: Path, programs: Path) -> None:
    """Write a script for each program, under the name that the tests look for; the last one says that all are there."""
    shutil.rmtree(programs, ignore_errors=True)
    programs.mkdir()
    redis = {"redis-server": f"/usr/bin/{SUITES[suite]}"}
    for name, program in {**redis, **_PROGRAMS}.items():
        path = programs / name
        path.write_text(_SCRIPT.format(program=program, root=root, shared=" ".join(_SHARED_DIRECTORIES)))
        path.chmod(0o755)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
