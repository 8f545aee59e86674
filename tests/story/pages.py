"""The README and the pages of docs/, as programs: their code blocks, and what runs them.

    ```python title="shop.py"     a file; every page has a directory of its own, into which its files are written
    ```python                     a program of its own, which must end well in that directory
    ```console                    lines that begin with "$ " are commands; what follows is what each must print

What a command prints is compared loosely: each line that the page shows must come, in that order, somewhere in the
output. "..." stands for anything, and one id for another. A command that ends with " &" runs until the end of the
page, or until "kill %1". A comment before a block says what is special about it:

    <!-- not run: why -->     nobody runs this block
    <!-- fails -->            the commands of this block must exit with an error
    <!-- command: NAME -->    .ci/run runs this block

Every block in a language that runs must be run, be a file, or say why it is not.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple, Self

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)(?: (?P<rest>[^\n]*))?\n(?P<text>.*?)^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
_TITLE = re.compile(r'title="([^"]+)"')
_MARK = re.compile(r"<!-- (not run: .+|fails|command: \w+) -->\s*\Z")
_ID = re.compile(r"\b[0-9a-f]{32}\b")
_SAID_WHEN_READY = "is ready"


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    title: str | None
    text: str
    mark: str
    line: int


def pages() -> list[Path]:
    """Every page with blocks that run."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text("utf-8")
    for match in _FENCE.finditer(text):
        title = _TITLE.search(match["rest"] or "")
        mark = _MARK.search(text[: match.start()])
        yield Block(
            match["language"],
            title[1] if title else None,
            dedent(match["text"]),
            mark[1] if mark else "",
            text.count("\n", 0, match.start()) + 1,
        )


class Reader:
    """Somebody who does in ``directory`` what a page says, from its top to its end."""

    def __init__(self, page: Path, directory: Path) -> None:
        self._page = page
        self._directory = directory
        self._background: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        bin_directory = Path(sys.executable).parent
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("EKIDEN_", "DJANGO_"))},
            "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        for command, process, log in self._background:
            try:
                self._stop(command, process, log)
            except AssertionError:
                if raised[0] is None:
                    raise

    @staticmethod
    def _stop(command: str, process: subprocess.Popen[bytes], log: Path) -> None:
        if process.poll() is None:
            process.terminate()
        try:
            code: int | None = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        assert code == 0, f"{command} ended with {code}:\n{log.read_text(errors='replace')}"

    def follow(self) -> None:
        """Do everything, and raise an AssertionError, with the place in the page, for what is not as it says."""
        for block in blocks(self._page):
            place = f"{self._page.relative_to(ROOT)}:{block.line}"
            if block.title is not None:
                file = self._directory / block.title
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.text, "utf-8")
            elif block.mark.startswith(("not run", "command")):
                continue
            elif block.language == "python":
                file = self._directory / "block.py"
                file.write_text(block.text, "utf-8")
                self._run(f"{sys.executable} block.py", [], place)
            elif block.language == "console":
                for command, expected in _commands(block.text):
                    self._run(command, expected, place, fails=block.mark == "fails")

    def _run(self, command: str, expected: list[str], place: str, *, fails: bool = False) -> None:
        if command.endswith(" &"):
            assert not expected, f"{place}: what {command} prints is not compared"
            self._start(command.removesuffix(" &"), place)
            return
        if command.startswith("kill %"):
            self._stop(*self._background[int(command.removeprefix("kill %")) - 1])
            return
        process = subprocess.run(
            ["bash", "-c", command],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            check=False,
        )
        output = process.stdout.decode(errors="replace")
        shown = f"{place}: $ {command}\n{output}{self._logs()}"
        assert (process.returncode != 0) == fails, f"{shown}\n(it exited with {process.returncode})"
        missing = _first_missing(expected, output)
        assert missing is None, f"{shown}\n(the page shows a line that is not there: {missing!r})"

    def _start(self, command: str, place: str) -> None:
        log = self._directory / f"background-{len(self._background)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._background.append((command, process, log))
        give_up = time.monotonic() + PATIENCE
        while _SAID_WHEN_READY not in (said := log.read_text(errors="replace")):
            assert process.poll() is None, f"{place}: {command} ended with {process.returncode}:\n{said}"
            assert time.monotonic() < give_up, f"{place}: {command} did not say that it {_SAID_WHEN_READY}:\n{said}"
            time.sleep(0.05)

    def _logs(self) -> str:
        return "".join(f"\n-- {command}:\n{log.read_text(errors='replace')}" for command, _, log in self._background)


def _commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it is shown to print."""
    command: str | None = None
    expected: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield command, expected
            command, expected = line.removeprefix("$ "), []
        else:
            expected.append(line)
    assert command is not None, f"a console block without a command:\n{text}"
    yield command, expected


def _first_missing(expected: list[str], output: str) -> str | None:
    """The first line of ``expected`` that is not in what is left of ``output``, or None."""
    lines = iter([" ".join(line.split()) for line in output.splitlines()])
    for line in expected:
        words = " ".join(line.split())
        if words and words != "..." and not any(_pattern(words).fullmatch(each) for each in lines):
            return line
    return None


def _pattern(line: str) -> re.Pattern[str]:
    parts = [re.escape(part) for part in _ID.sub("<id>", line).split("...")]
    return re.compile(".*".join(parts).replace("<id>", "[0-9a-f]{32}"))
