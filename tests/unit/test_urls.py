"""URLs are taken apart in one way for every broker, and never show their password."""

import string
from functools import partial
from urllib.parse import quote

import msgspec
import pytest
from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL, Host, parse_url, without_password
from hypothesis import given
from hypothesis import strategies as st

quoted = partial(quote, safe="")

names = st.text(string.ascii_lowercase + string.digits + "-.", min_size=1, max_size=20)
texts = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
ports = st.none() | st.integers(0, 65535)


class Options(msgspec.Struct, frozen=True):
    timeout: float = 1.0
    durable: bool = False
    name: str = ""


class Secretive(msgspec.Struct, frozen=True):
    sentinel_password: str = ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("memory://", {"scheme": "memory"}),
        ("memory://name", {"scheme": "memory", "hosts": (Host("name"),)}),
        ("sqlite:///tasks.db", {"scheme": "sqlite", "path": "tasks.db"}),
        ("sqlite:////abs/tasks.db", {"scheme": "sqlite", "path": "/abs/tasks.db"}),
        ("sqlite:///a%20b.db?x=1", {"scheme": "sqlite", "path": "a b.db", "options": {"x": "1"}}),
        ("REDIS://h:1/0", {"scheme": "redis", "hosts": (Host("h", 1),), "path": "0"}),
        ("mongodb+srv://h/db", {"scheme": "mongodb", "variant": "srv", "hosts": (Host("h"),), "path": "db"}),
        (
            "amqp://user:p%40ss@a:1,b,[::1]:3/v%2Fhost?a=1&b=",
            {
                "scheme": "amqp",
                "username": "user",
                "password": "p@ss",
                "hosts": (Host("a", 1), Host("b"), Host("::1", 3)),
                "path": "v/host",
                "options": {"a": "1", "b": ""},
            },
        ),
        ("redis://:secret@h", {"scheme": "redis", "password": "secret", "hosts": (Host("h"),)}),
        ("redis://user@h", {"scheme": "redis", "username": "user", "hosts": (Host("h"),)}),
    ],
)
def test_a_url_is_taken_apart(text: str, expected: dict[str, object]) -> None:
    assert parse_url(text) == BrokerURL(text=text, **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tasks.db", "not a broker URL"),
        ("", "not a broker URL"),
        ("://host", "not a broker URL"),
        ("redis:/host", "not a broker URL"),
        ("redis://h:port", "is not a port"),
        ("redis://h:65536", "a number up to 65535"),
        ("redis://h:-1", "is not a port"),
        ("redis://h:²", "is not a port"),
        ("redis://[::1", "begins no host"),
        ("redis://[::1]x", "begins no host"),
    ],
)
def test_what_is_not_a_url_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parse_url(text)


@pytest.mark.parametrize("password", ["12/s3cret", "s3cret/x", "12?a=s3cret", "s3@cret/x"])
def test_a_raw_password_that_begins_like_a_port_is_refused(password: str) -> None:
    with pytest.raises(ConfigurationError, match=r"%40|is not a port") as caught:
        parse_url(f"redis://user:{password}@h/0")

    assert "cret" not in str(caught.value)


def test_what_follows_a_raw_ampersand_of_a_password_is_not_shown() -> None:
    with pytest.raises(ConfigurationError, match=r"behind sentinel_password=.*%26") as caught:
        parse_url("redis+sentinel://h/m?sentinel_password=a&s3cret=1").options_as(Secretive)

    assert "s3cret" not in str(caught.value)


def test_options_are_converted_to_their_types() -> None:
    options = parse_url("x://h?timeout=2.5&durable=true&name=a%20b").options_as(Options)

    assert options == Options(2.5, True, "a b")


def test_an_unknown_option_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_url("x://user:s3cret@h?tiemout=1").options_as(Options)

    assert "'tiemout'" in str(caught.value)
    assert "durable, name, timeout" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_an_option_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'name' is given twice"):
        parse_url("x://h?name=a&timeout=1&name=b").options_as(Options)


def test_a_url_tells_which_options_a_client_library_will_find_several_times() -> None:
    url = parse_url("mongodb://h/?readPreferenceTags=dc:a&w=1&readPreferenceTags=")

    assert url.repeated == ("readPreferenceTags",)
    assert url.options == {"readPreferenceTags": "", "w": "1"}


def test_an_option_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="timeout"):
        parse_url("x://h?timeout=soon").options_as(Options)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://user:s3cret@h:1/0?a=b", "redis://user:***@h:1/0?a=b"),
        ("redis://:s3cret@h", "redis://:***@h"),
        ("redis://user@h", "redis://user@h"),
        ("memory://", "memory://"),
        ("sqlite:///a@b:c.db", "sqlite:///a@b:c.db"),
        ("redis:user:s3cret@h", "redis:***@h"),
        ("user:s3cret@h:6379", "user:***@h:6379"),
        ("redis://user:s3cret", "redis://user:***"),
        ("redis://user:12/s3cret@h", "redis://user:***@h"),
        ("localhost:6379", "localhost:6379"),
        ("redis://[::1]:6379,[::2]/0", "redis://[::1]:6379,[::2]/0"),
        ("mongodb://h/?authMechanismProperties=AWS_SESSION_TOKEN:x", "mongodb://h/?authMechanismProperties=***"),
        ("redis://user:s3@cret@h/0", "redis://user:***@h/0"),
        ("redis://user:s3cret@a:1,b:2/0", "redis://user:***@a:1,b:2/0"),
        ("no URL at all", "no URL at all"),
        ("redis+sentinel://h/s?sentinel_password=s3cret&a=b", "redis+sentinel://h/s?sentinel_password=***"),
        ("redis://:s3cret@h/0?a=b&password=s3cret", "redis://:***@h/0?a=b&password=***"),
        ("mongodb://h/?tlsCertificateKeyFilePassword=s3cret&w=1", "mongodb://h/?tlsCertificateKeyFilePassword=***"),
    ],
)
def test_a_password_is_replaced(text: str, shown: str) -> None:
    assert without_password(text) == shown


@pytest.mark.parametrize("password", ["s3cret/with/slashes", "s3cret#x", "s3cret:x", "s3cret@x", "s3cret%2Fx"])
def test_an_odd_password_is_not_shown_either(password: str) -> None:
    text = f"redis://user:{password}@h:1/0"

    assert "s3cret" not in without_password(text)


@pytest.mark.parametrize("text", ["redis://user:s3cret@h:port", "redis://user:s3cret@[::1"])
def test_a_refusal_shows_no_password(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_url(text)

    assert "s3cret" not in str(caught.value)
    assert "***" in str(caught.value)


@given(
    username=st.none() | texts,
    password=st.none() | texts,
    hosts=st.lists(st.tuples(names, ports), max_size=3),
    path=texts | st.just(""),
    options=st.dictionaries(names, names, max_size=3),
)
@pytest.mark.slow
def test_a_url_that_was_put_together_is_taken_apart_again(
    username: str | None,
    password: str | None,
    hosts: list[tuple[str, int | None]],
    path: str,
    options: dict[str, str],
) -> None:
    credentials = quoted(username) if username else ""
    if password:
        credentials += ":" + quoted(password)
    authority = (credentials + "@" if credentials else "") + ",".join(
        name if port is None else f"{name}:{port}" for name, port in hosts
    )
    query = "&".join(f"{quoted(name)}={quoted(value)}" for name, value in options.items())
    text = f"some://{authority}/{quoted(path)}" + (f"?{query}" if query else "")

    url = parse_url(text)

    assert url.username == username
    assert url.password == password
    assert url.hosts == tuple(Host(name, port) for name, port in hosts)
    assert url.path == path
    assert url.options == options


@given(password=st.text(string.printable, min_size=1).map(lambda text: f"s3cret{text}s3cret"))
def test_no_password_is_ever_shown(password: str) -> None:
    shown = {
        without_password(f"redis://user:{password}@host:1/0"),
        without_password(f"redis://user:{quoted(password)}@h"),
    }

    assert not any("s3cret" in text for text in shown)


@given(password=texts.map(lambda text: f"s3cret{text}"))
def test_no_url_shows_its_password(password: str) -> None:
    url = parse_url(f"redis://user:{quoted(password)}@h:1/0?a=b")

    assert url.password == password
    assert "s3cret" not in str(url) + repr(url) + f"{url}" + f"{(url,)}"


@pytest.mark.parametrize(
    ("text", "scheme", "variant"),
    [
        ("valkey://localhost/1", "redis", None),
        ("valkeys://localhost", "rediss", None),
        ("valkey+socket:///run/valkey.sock", "unix", None),
        ("redis+socket:///run/redis.sock", "unix", None),
        ("valkey+cluster://a,b", "redis", "cluster"),
        ("VALKEY://localhost", "redis", None),
        ("pyamqp://guest@localhost//", "amqp", None),
    ],
)
def test_other_names_of_a_scheme_are_known(text: str, scheme: str, variant: str | None) -> None:
    url = parse_url(text)

    assert (url.scheme, url.variant) == (scheme, variant)
    assert url.text == text
