"""What a CouchDB URL may say."""

from __future__ import annotations

import pytest
from ekiden.errors import ConfigurationError
from ekiden.plugins import open_transport
from ekiden.urls import Host, parse_url
from ekiden_couchdb.options import Place, address_of, options_in, place_in


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("couchdb://", Place((Host("localhost", 5984),))),
        ("couchdb://h", Place((Host("h", 5984),))),
        ("couchdb://h:1/shop", Place((Host("h", 1),))),
        ("couchdbs://h", Place((Host("h", 6984),), tls=True)),
        ("couchdb://u:p%40@a,b:2,[::1]:3/x", Place((Host("a", 5984), Host("b", 2), Host("::1", 3)), "u", "p@")),
    ],
)
def test_it_names_the_servers(url: str, expected: Place) -> None:
    assert place_in(parse_url(url)) == expected


@pytest.mark.parametrize(
    ("url", "prefix"),
    [
        ("couchdb://h", "ekiden"),
        ("couchdb://h/", "ekiden"),
        ("couchdb://h/shop", "shop"),
        ("couchdb://h/shop/", "shop"),
        ("couchdb://h/a_1$(2)+b-c", "a_1$(2)+b-c"),
        ("couchdb://h?prefix=shop", "shop"),
    ],
)
def test_the_path_is_the_prefix_of_all_databases(url: str, prefix: str) -> None:
    assert options_in(parse_url(url)).prefix == prefix


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("couchdb://h/Shop", "databases cannot be called 'Shop'"),
        ("couchdb://h/1shop", "begin with a lower-case letter"),
        ("couchdb://h/_shop", "begin with a lower-case letter"),
        ("couchdb://h/a/b", "databases cannot be called 'a/b'"),
        ("couchdb://h/" + "a" * 101, "up to 100"),
        ("couchdb://h/a?prefix=b", "given twice"),
        ("couchdb://h/?timeout=0", "timeout is a number of seconds"),
        ("couchdb://h/?timeout=nan", "timeout is a number of seconds"),
        ("couchdb://h/?timeout=soon", "timeout"),
        ("couchdb://h/?max_message_bytes=-1", "0 or more"),
        ("couchdb://h/?q=0", "1 or more"),
        ("couchdb://h/?n=0", "1 or more"),
        ("couchdb://h/?auth=kerberos", "auth"),
        ("couchdb://h/?cafile=x", "write couchdbs://"),
        ("couchdbs://h/?cafile=/no/such/file", "no certificates can be read"),
        ("couchdbs://h/?keyfile=x", "give both"),
        ("couchdbs://h/?certfile=/no/such/file", "cannot be read"),
        ("couchdb+cluster://h/", "one after another"),
        ("couchdb://:secret@h/", "no user name"),
        ("couchdb://a%3Ab:secret@h/", "holds no colon"),
        ("couchdb://h/?colour=red", "colour"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        open_transport(url)

    assert words in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_a_place_shows_no_password() -> None:
    place = place_in(parse_url("couchdb://u:secret@h,[::1]/"))

    assert str(place) == "CouchDB at h:5984,[::1]:5984"
    assert "secret" not in repr(place)
    assert address_of(Host("::1", 1)) == "[::1]:1"
