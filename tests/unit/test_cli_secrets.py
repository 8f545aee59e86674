"""No command shows the password of a URL: neither of the app's, nor of one that was typed in a wrong place."""

import logging
from pathlib import Path

import pytest
from click.testing import CliRunner
from ekiden import Ekiden
from ekiden.cli import ekiden

URLS = ["redis://user:s3cret@h/0", "redis:user:s3cret@h", "redis://u:12/b's3cret@h", "redis://u:s3cret"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["URL"],
        ["-A", "URL", "queues"],
        ["queues", "-A", "URL"],
        ["queues", "URL"],
        ["explain", "URL", "add"],
        ["worker", "--pool", "URL", "shop:app"],
        ["worker", "--processes=URL", "shop:app"],
        ["worker", "--broker", "URL", "shop:app"],
        ["worker", "shop:app", "URL"],
        ["-b", "URL", "worker", "shop:app"],
        ["call", "--brokr=URL", "shop:app"],
        ["demo", "URL"],
        ["port", "URL"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("url", URLS)
def test_a_url_in_a_wrong_place_hides_its_password(arguments: list[str], url: str) -> None:
    result = CliRunner().invoke(ekiden, [each.replace("URL", url) for each in arguments])

    assert result.exit_code != 0
    assert "s3cret" not in result.output


@pytest.fixture(params=["redis://user:s3cret@127.0.0.1:1/0?timeout=0.1", "redis:user:s3cret@127.0.0.1:1"])
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with an app whose broker cannot be reached, or whose URL is none."""
    name = f"hidden_{len(request.param)}"
    text = f"""
        from ekiden import Ekiden
        app = Ekiden("shop", broker={request.param!r}, task_publish_retry=False)

        @app.task
        def add(x: int) -> int:
            return x
    """
    (tmp_path / f"{name}.py").write_text("\n".join(line[8:] for line in text.splitlines()))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", "MODULE:app"],
        ["doctor", "MODULE:app", "--json"],
        ["explain", "MODULE:app", "add"],
        ["explain", "MODULE:app", "add", "--json"],
        ["queues", "MODULE:app"],
        ["call", "MODULE:app", "add", "--args", "[1]"],
    ],
    ids=" ".join,
)
def test_a_command_hides_the_password_of_its_app(
    arguments: list[str], module: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        result = CliRunner().invoke(ekiden, [each.replace("MODULE", module) for each in arguments])

    assert "127.0.0.1" in result.output
    assert "s3cret" not in result.output + caplog.text


def test_port_hides_the_passwords_that_it_reads(tmp_path: Path) -> None:
    (tmp_path / "celeryconfig.py").write_text(
        'broker_url = "redis:user:s3cret@h"\nresult_backend = "cache+memcached://user:s3cret@h"\n'
        'broker_read_url = "amqp://user:s3cret@h"\nbroker_transport_options = {"sentinel_kwargs": "s3cret"}\n'
    )
    (tmp_path / "app.py").write_text(
        'from celery import Celery\napp = Celery("shop", broker="redis://user:12/s3cret@h", backend="db+x://u:s3cret@h")\n'
    )

    result = CliRunner().invoke(ekiden, ["port", str(tmp_path)])

    assert "result_backend" in result.output
    assert "s3cret" not in result.output


def test_settings_hide_the_passwords_of_their_urls() -> None:
    app = Ekiden("shop", broker="redis://user:s3cret@h/0", backend="redis://h/0?password=s3cret")

    assert "broker_url='redis://user:***@h/0'" in repr(app.conf)
    assert "s3cret" not in f"{app.conf!r} {app.conf}"
