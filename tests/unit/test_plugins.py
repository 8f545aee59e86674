"""A URL's scheme finds its plugin; where it cannot, one sentence says what is wrong and what to do."""

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ekiden.errors import ConfigurationError
from ekiden.memory import MemoryBackend, MemoryTransport
from ekiden.plugins import (
    BACKENDS,
    TRANSPORTS,
    backend_class,
    installed,
    open_backend,
    open_transport,
    transport_class,
)
from ekiden.urls import parse_url

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one module and one entry point, for this test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install_distribution(distribution: str, group: str, name: str, value: str, *, source: str = "") -> None:
        module = value.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        metadata = tmp_path / f"{distribution}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")

    return install_distribution


def test_the_embedded_ones_are_installed() -> None:
    assert {"memory", "sqlite"} <= set(installed(TRANSPORTS))
    assert {"memory", "sqlite"} <= set(installed(BACKENDS))


def test_a_url_opens_what_its_scheme_names() -> None:
    with open_transport("memory://") as transport, open_backend(parse_url("memory://")) as backend:
        assert isinstance(transport, MemoryTransport)
        assert isinstance(backend, MemoryBackend)


def test_a_plugin_installed_a_moment_ago_is_found(install: Install) -> None:
    source = "from ekiden.memory import MemoryTransport\n\nclass Fresh(MemoryTransport): ..."
    install("fresh", TRANSPORTS, "fresh", "fresh_plugin:Fresh", source=source)

    assert transport_class(parse_url("fresh+tls://name")).__name__ == "Fresh"
    assert "fresh" in installed(TRANSPORTS)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("nothing-like-it://host", ["no transport for nothing-like-it://", "installed: ", "memory://", "sqlite://"]),
        ("memroy://", ["Did you mean memory://?"]),
        ("redsi://user:s3cret@host", ["Did you mean redis://?", "***"]),
    ],
)
def test_an_unknown_scheme_is_refused_with_what_was_probably_meant(url: str, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_transport(url)

    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("scheme", "meant"), [("redsi", "redis"), ("amqq", "amqp"), ("mongdb", "mongodb")])
def test_only_what_is_not_installed_is_advised_to_be_installed(scheme: str, meant: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_transport(f"{scheme}://host")

    assert f"Did you mean {meant}://?" in str(caught.value)
    assert ("pip install" in str(caught.value)) == (meant not in installed(TRANSPORTS))


def test_a_backend_is_called_a_result_backend() -> None:
    with pytest.raises(ConfigurationError, match="no result backend for nothing-like-it://"):
        open_backend("nothing-like-it://host")


def test_two_plugins_of_one_scheme_are_an_error(install: Install) -> None:
    install("one", TRANSPORTS, "twice", "one_plugin:One")
    install("two", TRANSPORTS, "twice", "two_plugin:Two")

    with pytest.raises(ConfigurationError, match="more than one plugin") as caught:
        open_transport("twice://")

    assert "one_plugin:One of one" in str(caught.value)
    assert "two_plugin:Two of two" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import a_module_that_nobody_has", "No module named 'a_module_that_nobody_has'"),
        ("raise RuntimeError('broken inside')", "broken inside"),
        ("", "Plugin"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_says_why(install: Install, source: str, complaint: str) -> None:
    install("broken", TRANSPORTS, "broken", "broken_plugin:Plugin", source=source)

    with pytest.raises(ConfigurationError, match="cannot be loaded") as caught:
        open_transport("broken://")

    assert complaint in str(caught.value)


def test_a_plugin_of_another_kind_is_refused(install: Install) -> None:
    install("wrong", BACKENDS, "wrong", "wrong_plugin:Wrong", source="class Wrong: ...")

    with pytest.raises(ConfigurationError, match="not an ekiden Backend"):
        backend_class(parse_url("wrong://"))


def test_a_plugin_in_a_zip_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "plugins.zip", "w") as archive:
        archive.writestr(
            "zipped_plugin.py", "from ekiden.memory import MemoryTransport\n\nclass Zipped(MemoryTransport): ..."
        )
        archive.writestr("zipped-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: zipped\nVersion: 1.0\n")
        archive.writestr("zipped-1.0.dist-info/entry_points.txt", f"[{TRANSPORTS}]\nzipped = zipped_plugin:Zipped\n")
    monkeypatch.syspath_prepend(str(tmp_path / "plugins.zip"))

    assert transport_class(parse_url("zipped://name")).__name__ == "Zipped"


def test_of_two_installations_of_one_plugin_the_first_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    older = tmp_path / "older"
    (older / "Doubled-0.9.dist-info").mkdir(parents=True)
    (older / "Doubled-0.9.dist-info" / "entry_points.txt").write_text(f"[{TRANSPORTS}]\ndoubled = gone:Gone\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(older)])
    source = "from ekiden.memory import MemoryTransport\n\nclass Newer(MemoryTransport): ..."
    install("doubled", TRANSPORTS, "doubled", "doubled_plugin:Newer", source=source)

    assert transport_class(parse_url("doubled://name")).__name__ == "Newer"


@pytest.mark.parametrize(
    "text", ["", "[other]\nodd = a:b\n", "odd = a:b\n", "[ekiden.transports]\n# odd = a:b\n\nodd\n"]
)
def test_entry_points_that_are_none_are_passed_over(install: Install, tmp_path: Path, text: str) -> None:
    install("odd", TRANSPORTS, "odd", "odd_plugin:Odd")
    (tmp_path / "odd-1.0.dist-info" / "entry_points.txt").write_text(text)

    assert "odd" not in installed(TRANSPORTS)


def test_what_installs_slowly_is_not_taken_for_a_plugin_without_entry_points(install: Install, tmp_path: Path) -> None:
    install("slow", TRANSPORTS, "slow", "slow_plugin:Slow")
    entry_points = tmp_path / "slow-1.0.dist-info" / "entry_points.txt"
    text = entry_points.read_text()
    entry_points.unlink()
    assert "slow" not in installed(TRANSPORTS)

    entry_points.write_text(text)

    assert "slow" in installed(TRANSPORTS)
