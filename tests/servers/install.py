"""Installs the servers that tests use where there is no MongoDB and no CouchDB: others that speak the same protocols.

    python3 tests/servers/install.py

SecantusDB speaks MongoDB's protocol and comes from PyPI, into an environment of its own; pouchdb-server speaks
CouchDB's and comes from npm. Both go below the directory in TESTS_SERVERS, else below .servers/ of this clone,
where the tests look for them. What is there already in its version is left alone. Only tests run them, each as a
process of its own; nothing here is imported by ekiden or shipped with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

DIRECTORY = Path(os.environ.get("TESTS_SERVERS") or Path(__file__).parents[2] / ".servers").absolute()
SECANTUS = "SecantusDB==0.7.0b3"
POUCHDB_SERVER = "pouchdb-server@4.2.0"

SECANTUS_PROGRAM = DIRECTORY / "secantus" / "bin" / "secantusd-py"
POUCHDB_PROGRAM = DIRECTORY / "pouchdb" / "node_modules" / "pouchdb-server" / "bin" / "pouchdb-server"

_ATTEMPTS = 4
_PAUSE_SECONDS = 10.0


def main() -> int:
    """Install what is missing; the status says whether all is there."""
    done = [
        install(SECANTUS, SECANTUS_PROGRAM, install_secantus),
        install(POUCHDB_SERVER, POUCHDB_PROGRAM, install_pouchdb_server),
    ]
    return 0 if all(done) else 1


def install(requirement: str, program: Path, method: Callable[[Path], None]) -> bool:
    """Have ``method`` fill a fresh directory until it works, and say whether it is there now."""
    place = next(parent for parent in program.parents if parent.parent == DIRECTORY)
    stamp = place / "installed"
    if program.exists() and stamp.exists() and stamp.read_text() == requirement:
        print(f"{requirement} is in {place}")
        return True
    for attempt in range(1, _ATTEMPTS + 1):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            method(place)
        except (OSError, subprocess.SubprocessError) as error:
            print(f"could not install {requirement} (attempt {attempt} of {_ATTEMPTS}): {error}", file=sys.stderr)
            if attempt < _ATTEMPTS:
                time.sleep(attempt * _PAUSE_SECONDS)
        else:
            stamp.write_text(requirement)
            print(f"{requirement} has been installed in {place}")
            return True
    return False


def install_secantus(place: Path) -> None:
    """An environment with it and what it needs; none of that gets into the environment of the tests."""
    venv.create(place, with_pip=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--only-binary=SecantusDB", SECANTUS], check=True, timeout=600)


def install_pouchdb_server(place: Path) -> None:
    """Without install scripts: these would compile what we do not use, and the store that we use comes compiled."""
    npm = shutil.which("npm")
    if npm is None:
        raise OSError("there is no npm here: apt-get install npm")
    quietly = ["--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error"]
    subprocess.run(
        [npm, "install", "--prefix", str(place), "--ignore-scripts", *quietly, POUCHDB_SERVER],
        cwd=place,
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=600,
    )


if __name__ == "__main__":
    sys.exit(main())
