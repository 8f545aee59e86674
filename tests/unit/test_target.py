"""Under which name another process imports an app, and what it must not do then."""

import subprocess
import sys
from pathlib import Path

import pytest

APP = """
import time

from ekiden import Ekiden

app = Ekiden("limits", broker="memory://limits")


@app.task(time_limit=10)
def here() -> str:
    return __name__
"""


def run(directory: Path, program: str) -> str:
    (directory / "program.py").write_text(program)
    ended = subprocess.run(
        [sys.executable, "program.py"], cwd=directory, capture_output=True, text=True, timeout=50, check=False
    )
    return ended.stdout + ended.stderr


@pytest.mark.slow
def test_a_body_process_imports_the_module_that_made_the_app(tmp_path: Path) -> None:
    (tmp_path / "limits.py").write_text(APP)

    said = run(
        tmp_path,
        "from limits import app, here\nwith app.worker():\n    print(here.delay().get(timeout=40))\n",
    )

    assert said == "limits\n"


@pytest.mark.slow
def test_a_module_that_starts_a_worker_when_it_is_imported_says_so(tmp_path: Path) -> None:
    said = run(tmp_path, f"{APP}\nwith app.worker():\n    print(here.delay().get(timeout=40))\n")

    assert 'put app.worker() under if __name__ == "__main__"' in said
