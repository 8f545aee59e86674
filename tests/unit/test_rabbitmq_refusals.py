"""Whatever a RabbitMQ server, pika, TLS or the network says is one sentence, and tells whose move it is."""

import socket
import ssl

import pika.exceptions
import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed
from ekiden_rabbitmq.refusals import (
    RULES,
    Rule,
    blocked,
    closed,
    missing_queue,
    nacked,
    refusal,
    too_late,
)
from pika.adapters.utils.connection_workflow import (
    AMQPConnectionWorkflowFailed,
    AMQPConnectorSocketConnectError,
    AMQPConnectorTransportSetupError,
)

SERVER = "amqp://me:***@broker/shop"

# What servers say (3.10.8 where it could be made to), the class, and what stands in the sentence.
ANSWERS = [
    (311, "CONTENT_TOO_LARGE", BrokerRefused, "too large"),
    (
        406,
        "PRECONDITION_FAILED - message size 1048577 is larger than configured max size 1048576",
        BrokerRefused,
        "1048577 bytes, and this server takes 1048576",
    ),
    (313, "NO_CONSUMERS", BrokerUnavailable, "nobody consumes"),
    (320, "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'", BrokerUnavailable, "shutdown"),
    (402, "INVALID_PATH - unknown", BrokerRefused, "virtual host"),
    (
        403,
        "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile.",
        BrokerRefused,
        "user name and password",
    ),
    (
        403,
        "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'limited'",
        BrokerRefused,
        "limited may not publish to queues of the virtual host /",
    ),
    (
        403,
        "ACCESS_REFUSED - access to queue 'it's' in vhost '/' refused for user 'limited'",
        BrokerRefused,
        "the user limited has not the read right on the queue it's of the virtual host /",
    ),
    (
        403,
        "ACCESS_REFUSED - queue name 'amq.bad' contains reserved prefix 'amq.*'",
        BrokerRefused,
        "the server's own: amq.bad",
    ),
    (403, "ACCESS_REFUSED - something new", BrokerRefused, "something new"),
    (404, "NOT_FOUND - no queue 'a b' in vhost '/'", BrokerUnavailable, "no queue a b in the virtual host /"),
    (
        404,
        "NOT_FOUND - home node 'rabbit@b' of durable queue 'q' in vhost '/' is down or inaccessible",
        BrokerUnavailable,
        "the server that holds it is not",
    ),
    (404, "NOT_FOUND - something new", BrokerUnavailable, "something new"),
    (
        405,
        "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'mine' in vhost '/'. It could be originally "
        "declared on another connection or the exclusive property value does not match that of the original.",
        BrokerUnavailable,
        "the queue mine belongs to another connection alone",
    ),
    (405, "RESOURCE_LOCKED - something new", BrokerUnavailable, "something new"),
    (
        406,
        "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'mine' in vhost '/': received the value "
        "'quorum' of type 'longstr' but current is none",
        BrokerRefused,
        "the queue mine of the virtual host / was declared by somebody else with another x-queue-type (received",
    ),
    (
        406,
        "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 1800000 ms. This "
        "timeout value can be configured, see consumers doc guide to learn more",
        BrokerUnavailable,
        "consumer_timeout of 1800000 ms",
    ),
    (
        406,
        "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: -1 ms. This "
        "timeout value can be configured, see consumers doc guide to learn more",
        BrokerUnavailable,
        "for longer than its consumer_timeout; raise that setting",
    ),
    (406, "PRECONDITION_FAILED - unknown delivery tag 99", BrokerRefused, "unknown delivery tag 99"),
    (501, "FRAME_ERROR - type 2, all octets = <<>>", BrokerUnavailable, "could not read"),
    (502, "SYNTAX_ERROR - bad", BrokerRefused, "could not read"),
    (503, "COMMAND_INVALID - unknown exchange type 'x'", BrokerUnavailable, "did not expect"),
    (504, "CHANNEL_ERROR - expected 'channel.open'", BrokerUnavailable, "no such channel"),
    (505, "UNEXPECTED_FRAME - expected content header", BrokerUnavailable, "did not expect"),
    (506, "RESOURCE_ERROR - memory", BrokerUnavailable, "resources"),
    (530, "NOT_ALLOWED - vhost nope not found", BrokerRefused, "there is no virtual host nope"),
    (
        530,
        "NOT_ALLOWED - access to vhost 'shop' refused for user 'me': connection limit (5) is reached",
        BrokerUnavailable,
        "no more connections",
    ),
    (
        530,
        "NOT_ALLOWED - access to vhost 'the limit is down' refused for user 'limited'",
        BrokerRefused,
        "limited has no rights in",
    ),
    (530, "NOT_ALLOWED - access to vhost 'shop' refused for user 'me'", BrokerRefused, "me has no rights in"),
    (530, "NOT_ALLOWED - something new", BrokerRefused, "something new"),
    (540, "NOT_IMPLEMENTED - queue 'qq' in vhost '/' does not support global qos", BrokerRefused, "cannot do that"),
    (541, "INTERNAL_ERROR", BrokerUnavailable, "error of its own"),
]


def tls_error(reason: str) -> ssl.SSLError:
    """As OpenSSL's are: the reason has a name, whatever the text."""
    error = ssl.SSLError(1, "TLS went wrong")
    error.reason = reason
    return error


@pytest.mark.parametrize(("code", "text", "kind", "words"), ANSWERS, ids=[f"{a[0]} {a[1][:40]}" for a in ANSWERS])
def test_every_answer_is_a_sentence(code: int, text: str, kind: type[Exception], words: str) -> None:
    told = closed(code, text, SERVER, doing="testing", right="read")

    assert type(told) is kind
    assert str(told).startswith(f"{SERVER}: testing: ")
    assert str(told).endswith(".")
    assert words in str(told)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.code} {rule.pattern[:40]}")
def test_every_rule_has_an_answer_that_it_tells(rule: Rule) -> None:
    beginning = rule.sentence.partition("{")[0]

    told = [str(closed(code, text, SERVER)) for code, text, _, _ in ANSWERS if code == rule.code]

    assert any(beginning in sentence for sentence in told)


def test_an_answer_that_nobody_knows_is_told_as_it_is() -> None:
    told = closed(599, "NEW_CODE - with words", SERVER)

    assert type(told) is BrokerUnavailable
    assert "599 (with words)" in str(told)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            pika.exceptions.ProbableAuthenticationError(
                repr(pika.exceptions.ConnectionClosedByBroker(403, "ACCESS_REFUSED - Login was refused using ..."))
            ),
            BrokerRefused,
            "user name and password",
        ),
        (
            pika.exceptions.ProbableAuthenticationError(
                repr(pika.exceptions.ConnectionClosedByBroker(320, "CONNECTION_FORCED - shutdown"))
            ),
            BrokerUnavailable,
            "an operator closed it or the server stops",
        ),
        (
            pika.exceptions.ProbableAuthenticationError(
                repr(pika.exceptions.StreamLostError("Stream connection lost: ConnectionResetError(104, 'reset')"))
            ),
            BrokerUnavailable,
            "connection was lost",
        ),
        (
            pika.exceptions.ProbableAccessDeniedError(
                repr(pika.exceptions.ConnectionClosedByBroker(530, "NOT_ALLOWED - vhost nope not found"))
            ),
            BrokerRefused,
            "no virtual host nope",
        ),
        (
            pika.exceptions.ProbableAccessDeniedError(
                repr(
                    pika.exceptions.ConnectionClosedByBroker(
                        530, "NOT_ALLOWED - access to vhost 'shop' refused for user 'me'"
                    )
                )
            ),
            BrokerRefused,
            "the user me has no rights in the virtual host shop;",
        ),
        (
            pika.exceptions.IncompatibleProtocolError(
                repr(pika.exceptions.StreamLostError("Stream connection lost: ConnectionResetError(104, 'reset')"))
            ),
            BrokerUnavailable,
            "write amqps://",
        ),
        (pika.exceptions.IncompatibleProtocolError("AMQP 1.0"), BrokerRefused, "does not speak AMQP 0-9-1"),
        (
            pika.exceptions.ConnectionOpenAborted("Timeout while setting up AMQP to ..."),
            BrokerUnavailable,
            "did not speak AMQP in time",
        ),
        (
            pika.exceptions.AMQPHeartbeatTimeout("No activity"),
            BrokerUnavailable,
            "silent for longer than two heartbeats",
        ),
        (pika.exceptions.ConnectionBlockedTimeout("blocked"), BrokerUnavailable, "short of memory or disk"),
        (pika.exceptions.ConsumerCancelled(), BrokerUnavailable, "deleted, or moved"),
        (pika.exceptions.StreamLostError("Stream connection lost: EOF"), BrokerUnavailable, "lost (EOF)"),
        (
            pika.exceptions.ChannelClosedByBroker(404, "NOT_FOUND - no queue 'q' in vhost '/'"),
            BrokerUnavailable,
            "no queue q",
        ),
        (ConnectionRefusedError(111, "Connection refused"), BrokerUnavailable, "no server listens there"),
        (socket.gaierror(-2, "Name or service not known"), BrokerUnavailable, "host is not known"),
        (TimeoutError(), BrokerUnavailable, "silent"),
        (BrokenPipeError(32, "Broken pipe"), BrokerUnavailable, "Broken pipe"),
        (tls_error("WRONG_VERSION_NUMBER"), BrokerRefused, "write amqp://"),
        (tls_error("TLSV13_ALERT_CERTIFICATE_REQUIRED"), BrokerRefused, "wants a certificate of this client"),
        (tls_error("SSLV3_ALERT_HANDSHAKE_FAILURE"), BrokerRefused, "wants a certificate of this client"),
        (tls_error("UNEXPECTED_EOF_WHILE_READING"), BrokerUnavailable, "TLS failed"),
        (
            AMQPConnectionWorkflowFailed(
                [
                    AMQPConnectorSocketConnectError(ConnectionRefusedError(111, "Connection refused")),
                    AMQPConnectorTransportSetupError(tls_error("WRONG_VERSION_NUMBER")),
                ]
            ),
            BrokerRefused,
            "does not speak TLS",
        ),
        (
            pika.exceptions.AMQPConnectionError(
                AMQPConnectionWorkflowFailed(
                    [AMQPConnectorSocketConnectError(ConnectionRefusedError(111, "Connection refused"))]
                )
            ),
            BrokerUnavailable,
            "no server listens there",
        ),
        (pika.exceptions.AMQPError("something new"), BrokerUnavailable, "AMQPError: something new"),
    ],
    ids=repr,
)
def test_every_error_of_the_client_is_a_sentence(error: BaseException, kind: type[Exception], words: str) -> None:
    told = refusal(error, SERVER, doing="testing")

    assert type(told) is kind
    assert words in str(told)
    assert str(told).startswith(f"{SERVER}: testing: ")


def test_an_error_of_our_own_stays_as_it_is() -> None:
    error = TransportClosed("closed")

    assert refusal(error, SERVER) is error


def test_what_comes_as_no_error_is_told_as_well() -> None:
    told = [
        nacked(SERVER, "shop"),
        too_late(SERVER, 2.5, doing="publishing"),
        blocked(SERVER, "low on memory", 2.5, doing="publishing"),
        missing_queue(SERVER, "shop"),
    ]

    assert [str(error) for error in told] == [
        f"{SERVER}: the server did not store the message: the queue shop is full and refuses more, or too few servers "
        "of its cluster are up.",
        f"{SERVER}: publishing: no answer within 2.5 s.",
        f"{SERVER}: publishing: the server takes no messages now, because it is low on memory; gave up after 2.5 s.",
        f"{SERVER}: the queue shop was deleted while it was used.",
    ]
