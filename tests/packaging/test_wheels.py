"""What is built from this repository works away from it: every wheel, in a fresh environment, in an empty directory."""

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


@dataclass(frozen=True, slots=True)
class Installation:
    """A virtual environment that holds what was built, and nothing of the clone."""

    wheels: Path
    environment: Path

    def command(self, name: str) -> str:
        return str(self.environment / "bin" / name)


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    place = tmp_path_factory.mktemp("away")
    installation = Installation(wheels=place / "wheels", environment=place / "environment")

    for source in [ROOT, *MEMBERS]:
        run(sys.executable, *BUILD_A_WHEEL, "--outdir", str(installation.wheels), str(source))
    venv.create(installation.environment, with_pip=True)
    built = [str(wheel) for wheel in installation.wheels.iterdir()]
    run(installation.command("python"), "-m", "pip", "install", "--quiet", *built, cwd=place)

    return installation


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("url", ["memory://", "sqlite:///file.db"])
def test_an_installed_wheel_opens_the_embedded_brokers(installation: Installation, url: str, tmp_path: Path) -> None:
    module = run(installation.command("python"), "-c", PUT_AND_GET, url, cwd=tmp_path)

    assert Path(module.strip()).is_relative_to(installation.environment)


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
def test_every_wheel_carries_its_types(installation: Installation) -> None:
    for wheel in installation.wheels.iterdir():
        package = wheel.name.partition("-")[0]
        assert f"{package}/py.typed" in ZipFile(wheel).namelist()


def test_every_member_has_the_roots_version_and_pins_it() -> None:
    version = project(ROOT)["version"]

    for member in MEMBERS:
        assert project(member)["version"] == version, member
        assert f"ekiden=={version}" in project(member)["dependencies"], member


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
