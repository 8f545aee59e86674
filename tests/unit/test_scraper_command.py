"""What the scraper's command says when it cannot begin."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from examples.scraper.command import demo
from examples.scraper.server import serving
from examples.scraper.site import read_site
from examples.scraper.store import Crawl, Store


def run(*arguments: str | Path) -> Result:
    return CliRunner(env={"EKIDEN_BROKER_URL": None}).invoke(demo, [str(argument) for argument in arguments])


def test_help_tells_what_it_does_and_every_option() -> None:
    result = run("--help")

    assert result.exit_code == 0
    assert "Crawl a site with ekiden" in result.output
    for option in ("--url", "--pages", "--depth", "--rate", "--broker", "--directory", "--kill"):
        assert option in result.output


@pytest.mark.parametrize("url", ["example.org", "ftp://example.org/", ""])
def test_what_is_no_address_is_refused_in_one_sentence(tmp_path: Path, url: str) -> None:
    result = run("--url", url, "--directory", tmp_path)

    assert result.exit_code == 1
    assert result.output == f"Error: {url!r} is no address to crawl; write one such as https://example.org/\n"


def test_a_site_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with serving(read_site(1)) as server:
        url = server.url

    result = run("--url", url, "--directory", tmp_path)

    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {url} does not answer")


def test_a_directory_holds_one_crawl(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.begin(Crawl("crawl-1", "http://one.example/", "http://one.example/", 10, 10, ""))

    result = run("--url", "http://two.example/", "--directory", tmp_path)

    assert result.exit_code == 2
    assert "holds a crawl of http://one.example/; choose another --directory" in result.output


def test_an_unknown_broker_is_refused_in_one_sentence(tmp_path: Path) -> None:
    result = run("--broker", "carrier-pigeon://loft", "--pages", "1", "--directory", tmp_path)

    assert result.exit_code == 1
    assert "carrier-pigeon" in result.output.splitlines()[-1]
