"""The README and the pages of docs/ say what is: their code runs, and what is generated from the code is up to date."""

import runpy
from pathlib import Path

import pytest

from tests.story.pages import ROOT, Reader, blocks, pages

RUNNABLE = {"python", "console", "sh", "bash"}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", pages(), ids=_name)
def test_a_reader_who_follows_a_page_finds_what_it_says(page: Path, tmp_path: Path) -> None:
    with Reader(page, tmp_path) as reader:
        reader.follow()


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_every_block_of_code_is_run_or_says_why_not(page: Path) -> None:
    idle = [
        f"{_name(page)}:{block.line}"
        for block in blocks(page)
        if block.language in RUNNABLE - {"python", "console"} and block.title is None and not block.mark
    ]

    assert idle == []


@pytest.mark.parametrize("page", pages(), ids=_name)
def test_code_is_no_wider_than_a_page(page: Path) -> None:
    wide = [
        f"{_name(page)}:{block.line}: {line}"
        for block in blocks(page)
        if block.language == "python"
        for line in block.text.splitlines()
        if len(line) > 100
    ]

    assert wide == []


def test_what_is_generated_from_the_code_is_up_to_date() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))

    stale = [
        _name(page) for page in pages() if generate["generated"](page.read_text("utf-8")) != page.read_text("utf-8")
    ]

    assert stale == [], "run: .venv/bin/python docs/generate.py"


def test_every_generated_part_stands_in_a_page() -> None:
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    everything = "\n".join(page.read_text("utf-8") for page in pages())

    missing = [name for name in generate["PARTS"] if f"<!-- generated: {name} -->" not in everything]

    assert missing == []


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text("utf-8")

    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in menu] == []
