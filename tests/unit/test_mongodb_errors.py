"""Every error of pymongo becomes one of ours: whether it may work later, and one sentence."""

from __future__ import annotations

import ssl

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, EkidenError
from ekiden.urls import parse_url
from ekiden_mongodb.errors import Errors
from ekiden_mongodb.options import place_in
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    CursorNotFound,
    DocumentTooLarge,
    DuplicateKeyError,
    ExecutionTimeout,
    InvalidName,
    InvalidOperation,
    NetworkTimeout,
    NotPrimaryError,
    OperationFailure,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
    WriteConcernError,
)

PLACE = place_in(parse_url("mongodb://user:s3cret@h:1/shop"))
LATER, NEVER = BrokerUnavailable, BrokerRefused


@pytest.fixture
def errors() -> Errors:
    return Errors(PLACE, 10.0, LATER, NEVER)


def failure(code: int, message: str = "it said so", *labels: str) -> OperationFailure:
    return OperationFailure(message, code, {"errmsg": message, "code": code, "errorLabels": list(labels)})


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        (NetworkTimeout("timed out"), LATER, "did not answer within 10 s"),
        (ExecutionTimeout("slow", 50), LATER, "did not answer within 10 s"),
        (failure(50), LATER, "did not answer within 10 s"),
        (NotPrimaryError("not primary", {"code": 10107}), LATER, "no primary"),
        (WaitQueueTimeoutError("none left"), LATER, "maxPoolSize"),
        (AutoReconnect("h:1: [Errno 111] Connection refused"), LATER, "Connection refused"),
        (AutoReconnect("h:1: connection closed"), LATER, "closed the connection"),
        (AutoReconnect("SSL handshake failed: [SSL: CERTIFICATE_VERIFY_FAILED] self-signed"), NEVER, "its certificate"),
        (AutoReconnect("SSL handshake failed: [SSL: WRONG_VERSION_NUMBER]"), NEVER, "does not speak TLS as we do"),
        (failure(13, "not allowed"), NEVER, "role readWrite on the database 'shop'"),
        (failure(18, "authentication failed"), NEVER, "refused the user name or the password"),
        (failure(73, "bad name"), NEVER, "does not take this name"),
        (failure(79), NEVER, "write concern"),
        (failure(59), NEVER, "MongoDB 4.2 or newer"),
        (failure(112), LATER, "others write the same documents"),
        (failure(14031), LATER, "out of disk space"),
        (failure(16500), LATER, "request rate"),
        (failure(8000, "you are over your space quota, using 512 MB of 512 MB"), LATER, "is full"),
        (failure(462, "x", "SystemOverloadedError"), LATER, "overloaded"),
        (failure(99999, "x", "RetryableWriteError"), LATER, "could not do it now"),
        (failure(99999, "something new"), NEVER, "something new (code 99999)"),
        (CursorNotFound("gone", 43), NEVER, "gone"),
        (DuplicateKeyError("E11000", 11000), NEVER, "E11000"),
        (WriteConcernError("waiting", 64), LATER, "not on as many members"),
        (BulkWriteError({"writeErrors": [{"index": 0, "code": 121, "errmsg": "no"}]}), NEVER, "validator"),
        (BulkWriteError({"writeConcernErrors": [{"code": 64, "errmsg": "no"}]}), LATER, "not on as many members"),
        (DocumentTooLarge("too large"), NEVER, "16 MiB"),
        (InvalidName("empty"), NEVER, "empty"),
        (InvalidOperation("Cannot use MongoClient after close"), LATER, "were closed here"),
        (ConfigurationError("The DNS query name does not exist"), LATER, "DNS"),
        (ConfigurationError("Server at h:1 reports wire version 5"), NEVER, "wire version 5"),
        (OSError(28, "No space left on device"), LATER, "No space left"),
    ],
)
def test_what_happened_is_said(errors: Errors, trouble: Exception, kind: type[EkidenError], words: str) -> None:
    error = errors.of(trouble)

    assert type(error) is kind
    assert words in str(error)
    assert "MongoDB at h:1" in str(error)
    assert error.__cause__ is trouble
    assert "s3cret" not in str(error)


def test_an_error_of_ours_stays_as_it_is(errors: Errors) -> None:
    ours = BrokerRefused("as it is")

    assert errors.of(ours) is ours


def test_the_cause_of_a_lost_connection_is_told(errors: Errors) -> None:
    cause = ssl.SSLCertVerificationError(1, "bad")
    cause.verify_message = "self-signed certificate"
    trouble = AutoReconnect("SSL handshake failed")
    trouble.__cause__ = cause

    error = errors.of(trouble)

    assert type(error) is NEVER
    assert "self-signed certificate" in str(error)


def test_who_finds_no_server_is_told_so(errors: Errors) -> None:
    error = errors.of(ServerSelectionTimeoutError("No replica set members match selector"))

    assert type(error) is LATER
    assert "replicaSet=" in str(error)
