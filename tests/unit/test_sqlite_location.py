"""sqlite:// URLs: which file, which options, and what is refused before anything is opened."""

from pathlib import Path

import pytest
from ekiden.errors import ConfigurationError
from ekiden.sqlite import SQLiteBackend, SQLiteTransport
from ekiden.sqlite.location import options_in, path_in
from ekiden.urls import parse_url


def test_three_slashes_are_relative_and_four_are_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert path_in(parse_url("sqlite:///tasks.db")) == str(tmp_path / "tasks.db")
    assert path_in(parse_url(f"sqlite:///{tmp_path}/a%20b.db")) == str(tmp_path / "a b.db")


def test_a_link_is_the_file_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")

    assert path_in(parse_url(f"sqlite:///{tmp_path}/link.db")) == str(tmp_path / "real.db")


@pytest.mark.parametrize("kind", [SQLiteTransport, SQLiteBackend])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite://", "memory://"),
        ("sqlite:///", "memory://"),
        ("sqlite:///:memory:", "memory://"),
        ("sqlite://tasks.db", "three slashes"),
        ("sqlite://user@/tasks.db", "three slashes"),
        ("sqlite+fast:///tasks.db", "three slashes"),
        ("sqlite:////", "is a directory"),
        ("sqlite:////no/such/directory/tasks.db", "make it first"),
        ("sqlite:///a%00b.db", "zero bytes"),
        ("sqlite:///tasks.db?synchronous=off", "synchronous"),
        ("sqlite:///tasks.db?busy_timeout=soon", "busy_timeout"),
        ("sqlite:///tasks.db?busy_timeout=-1", "busy_timeout"),
        ("sqlite:///tasks.db?busy_timeout=nan", "busy_timeout"),
        ("sqlite:///tasks.db?wake=loudly", "wake"),
        ("sqlite:///tasks.db?sync=full", "'sync'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    kind: type[SQLiteTransport] | type[SQLiteBackend], url: str, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said) as refusal:
        kind(parse_url(url))

    assert str(refusal.value).startswith(url)
    assert "\n" not in str(refusal.value)


def test_options_are_read() -> None:
    options = options_in(parse_url("sqlite:///x.db?synchronous=full&busy_timeout=0.5&wake=poll&max_message_bytes=10"))

    assert (options.synchronous, options.busy_timeout, options.wake, options.max_message_bytes) == (
        "full",
        0.5,
        "poll",
        10,
    )


def test_nothing_is_made_before_it_is_needed(tmp_path: Path) -> None:
    SQLiteTransport(parse_url(f"sqlite:///{tmp_path}/tasks.db")).close()

    assert list(tmp_path.iterdir()) == []
