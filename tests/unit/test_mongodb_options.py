"""What reaches pymongo of a MongoDB URL, and how its servers are asked."""

from __future__ import annotations

import bson
import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.urls import parse_url
from ekiden_mongodb.client import Client
from ekiden_mongodb.options import MongoDBOptions, options_in, place_in
from pymongo import ReadPreference
from pymongo.read_concern import ReadConcern


def a_client(url: str) -> Client:
    return Client(parse_url(url), unavailable=BrokerUnavailable, refused=BrokerRefused)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mongodb://h:1,[::1]:2/db", "mongodb://h:1,[::1]:2/db"),
        ("mongodb://", "mongodb://localhost/"),
        ("mongodb:///db", "mongodb://localhost/db"),
        ("mongodb://user:p%40ss@/db", "mongodb://user:p%40ss@localhost/db"),
        ("mongodb://h?prefix=a&timeout=2&max_message_bytes=9", "mongodb://h/"),
        ("mongodb://h/?prefix=a&w=2&timeout=2&replicaSet=rs", "mongodb://h/?w=2&replicaSet=rs"),
        (
            "mongodb://h/?readPreferenceTags=dc:a&readPreferenceTags=",
            "mongodb://h/?readPreferenceTags=dc:a&readPreferenceTags=",
        ),
        ("mongodb+srv://h/db?srvMaxHosts=2&prefix=a", "mongodb+srv://h/db?srvMaxHosts=2"),
        ("MongoDB://h/db", "mongodb://h/db"),
        ("mongodb://%2Ftmp%2Fmongodb-27017.sock/db", "mongodb://%2Ftmp%2Fmongodb-27017.sock/db"),
    ],
)
def test_all_but_our_own_options_reaches_pymongo(url: str, text: str) -> None:
    assert place_in(parse_url(url)).text == text


def test_our_own_options_are_read() -> None:
    url = parse_url("mongodb://h/?prefix=shop&w=1&timeout=2.5&max_message_bytes=100")

    assert options_in(url) == MongoDBOptions("shop", 2.5, 100)


@pytest.mark.parametrize(("path", "database"), [("", "ekiden"), ("/", "ekiden"), ("/shop", "shop")])
def test_the_database_is_the_paths_or_ours(path: str, database: str) -> None:
    client = a_client(f"mongodb://h{path}")

    assert client.database.name == database
    client.close()


@pytest.mark.parametrize(
    ("w", "expected"), [("", "majority"), ("w=0", "majority"), ("w=1", "majority"), ("w=3", 3), ("w=both", "both")]
)
def test_what_must_last_is_written_to_a_majority_or_more(w: str, expected: int | str) -> None:
    client = a_client(f"mongodb://h/?{w}")

    concern = client.collection("messages", durable=True).write_concern

    assert concern.document == {"w": expected, "j": True}
    client.close()


def test_the_primary_is_asked_whatever_the_url_says() -> None:
    client = a_client("mongodb://h/?readPreference=secondary&readConcernLevel=available&w=0")

    messages = client.collection("messages")

    assert messages.read_preference == ReadPreference.PRIMARY
    assert messages.read_concern == ReadConcern("local")
    assert messages.write_concern.document == {"w": 1}
    assert client.database.read_preference == ReadPreference.PRIMARY
    client.close()


@pytest.mark.parametrize(
    ("options", "selection", "connect"),
    [
        ("", 5.0, 10.0),
        ("timeout=2", 2.0, 2.0),
        ("timeout=60", 5.0, 60.0),
        ("serverSelectionTimeoutMS=1500&connectTimeoutMS=700", 1.5, 0.7),
        ("serverSelectionTimeoutMS=90000&timeout=20", 20.0, 20.0),
    ],
)
def test_no_search_for_a_server_is_longer_than_a_call(options: str, selection: float, connect: float) -> None:
    client = a_client(f"mongodb://h/?{options}")

    found = client.mongo.options

    assert found.server_selection_timeout == selection
    assert found.pool_options.connect_timeout == connect
    client.close()


def test_a_place_shows_no_password() -> None:
    client = a_client("mongodb://user:s3cret@a:1,b/db")

    assert "s3cret" not in f"{client.place} {client.place!r} {vars(client)}"
    assert str(client.place) == "MongoDB at a:1,b"


def test_a_text_that_is_none_makes_no_batch_unreadable() -> None:
    client = a_client("mongodb://h/")
    broken = bson.encode({"_id": "id", "h": "XX"}).replace(b"XX", b"\xff\xfe")

    document = bson.decode(broken, client.collection("messages").codec_options)

    assert document == {"_id": "id", "h": "\N{REPLACEMENT CHARACTER}" * 2}
    client.close()
