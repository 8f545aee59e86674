"""What is built from this repository works away from it: every wheel, in a fresh environment, in an empty directory."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
MEMBERS = sorted(path.parent for group in ("transports", "plugins") for path in ROOT.glob(f"{group}/*/pyproject.toml"))

BUILD_A_WHEEL = ("-m", "build", "--no-isolation", "--wheel")

PUT_AND_GET = """
import sys

import ekiden

with ekiden.connect(sys.argv[1]) as connection:
    queue = connection.queue("q")
    queue.put({"a": 1})
    item = queue.get(timeout=1)
    assert item.value == {"a": 1}, item
    item.ack()
print(ekiden.__file__)
"""


OPEN_AND_CLOSE = """
import sys

from ekiden.plugins import open_transport

open_transport(sys.argv[1]).close()
"""


@dataclass(frozen=True, slots=True)
class Installation:
    """A virtual environment that holds what was built, and nothing of the clone.

    ``wheels``: what was built. ``origins``: where each of our distributions was taken from, by its name.
    """

    wheels: Path
    environment: Path
    origins: dict[str, str]

    def command(self, name: str) -> str:
        return str(self.environment / "bin" / name)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a wheel of the root and of every member."""
    built = tmp_path_factory.mktemp("wheels")
    for source in [ROOT, *MEMBERS]:
        run(sys.executable, *BUILD_A_WHEEL, "--outdir", str(built), str(source))
    return built


@pytest.fixture(scope="module")
def installation(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """What ``pip install ekiden`` gives."""
    return install("ekiden", wheels, tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def installation_with_extras(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """What ``pip install 'ekiden[...]'`` gives, with the extra of every transport."""
    extras = ",".join(member.name for member in MEMBERS if member.parent.name == "transports")
    return install(f"ekiden[{extras}]", wheels, tmp_path_factory.mktemp("extras"))


def install(requirement: str, wheels: Path, place: Path) -> Installation:
    """A fresh environment with ``requirement`` in it, found by its name among the wheels as in an index."""
    environment, report = place / "environment", place / "report.json"
    venv.create(environment, with_pip=True)
    pip = (str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet")
    run(*pip, "--find-links", str(wheels), "--report", str(report), requirement, cwd=place)
    installed = json.loads(report.read_text())["install"]
    origins = {each["metadata"]["name"]: each["download_info"]["url"] for each in installed}
    return Installation(wheels, environment, {name: url for name, url in origins.items() if name.startswith("ekiden")})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("url", ["memory://", "sqlite:///file.db"])
def test_an_installed_wheel_opens_the_embedded_brokers(installation: Installation, url: str, tmp_path: Path) -> None:
    module = run(installation.command("python"), "-c", PUT_AND_GET, url, cwd=tmp_path)

    assert Path(module.strip()).is_relative_to(installation.environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("url", "distribution"),
    [
        ("redis://localhost/0", "ekiden-redis"),
        ("amqp://localhost/", "ekiden-rabbitmq"),
        ("mongodb://localhost/", "ekiden-mongodb"),
        ("couchdb://localhost/", "ekiden-couchdb"),
    ],
)
def test_the_core_alone_says_what_a_transport_is_in(
    installation: Installation, url: str, distribution: str, tmp_path: Path
) -> None:
    refusal = subprocess.run(
        [installation.command("python"), "-c", OPEN_AND_CLOSE, url],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert refusal.returncode == 1
    last_line = refusal.stderr.splitlines()[-1]
    assert last_line.startswith("ekiden.errors.ConfigurationError: ")
    assert f"pip install {distribution}" in last_line


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost/0",
        "unix:///tmp/redis.sock",
        "amqp://localhost/",
        "mongodb://localhost/",
        "couchdb://localhost/",
        "couchdbs://localhost/",
    ],
)
def test_the_extras_bring_our_own_transports(installation_with_extras: Installation, url: str, tmp_path: Path) -> None:
    run(installation_with_extras.command("python"), "-c", OPEN_AND_CLOSE, url, cwd=tmp_path)

    transports = {project(member)["name"] for member in MEMBERS if member.parent.name == "transports"}
    assert set(installation_with_extras.origins) == {"ekiden", *transports}
    assert all(
        url.startswith(installation_with_extras.wheels.as_uri()) for url in installation_with_extras.origins.values()
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_installed_wheel_has_the_command(installation: Installation, tmp_path: Path) -> None:
    text = run(installation.command("ekiden"), "--help", cwd=tmp_path)

    assert "worker" in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_wheel_carries_the_demo_which_says_what_it_needs(installation: Installation, tmp_path: Path) -> None:
    (wheel,) = installation.wheels.glob("ekiden-*.whl")

    refusal = subprocess.run(
        [installation.command("ekiden"), "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert "ekiden/demo/tasks.py" in ZipFile(wheel).namelist()
    assert refusal.returncode == 1
    assert "which is not installed: pip install 'ekiden[demo]'." in refusal.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_wheel_carries_its_types(wheels: Path) -> None:
    for wheel in wheels.iterdir():
        package = wheel.name.partition("-")[0]
        assert f"{package}/py.typed" in ZipFile(wheel).namelist()


def test_every_member_has_the_roots_version_and_pins_it() -> None:
    version = project(ROOT)["version"]

    for member in MEMBERS:
        assert project(member)["version"] == version, member
        assert f"ekiden=={version}" in project(member)["dependencies"], member


def test_every_transport_is_an_extra_of_the_root_in_its_version() -> None:
    version, extras = project(ROOT)["version"], project(ROOT)["optional-dependencies"]

    for member in MEMBERS:
        if member.parent.name == "transports":
            assert extras[member.name] == [f"{project(member)['name']}=={version}"], member


def project(directory: Path) -> dict[str, Any]:
    """The [project] table of its pyproject.toml."""
    return tomllib.loads((directory / "pyproject.toml").read_text())["project"]


def run(*command: str, cwd: Path = ROOT) -> str:
    """What the command printed; it must succeed, and sees nothing of the environment that the tests run in."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    finished = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, f"{shlex.join(command)}\n{finished.stdout}{finished.stderr}"
    return finished.stdout
