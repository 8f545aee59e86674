"""What an amqp:// URL says: the connections that it names, and what it may not say."""

import os
import ssl
import subprocess
from pathlib import Path

import pytest
from ekiden.errors import ConfigurationError
from ekiden.urls import parse_url
from ekiden_rabbitmq.options import RabbitMQOptions, client_properties, connection_parameters, options_in


def parameters_of(text: str) -> list[object]:
    url = parse_url(text)
    return list(connection_parameters(url, options_in(url), purpose="testing"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("amqp://", ("localhost", 5672, "/", "guest", "guest")),
        ("amqp://broker", ("broker", 5672, "/", "guest", "guest")),
        ("amqp://broker/", ("broker", 5672, "/", "guest", "guest")),
        ("amqp://broker/%2F", ("broker", 5672, "/", "guest", "guest")),
        ("amqp://broker/shop", ("broker", 5672, "shop", "guest", "guest")),
        ("amqp://broker/a%2Fb", ("broker", 5672, "a/b", "guest", "guest")),
        ("amqp://me:p%40ss@broker:5673/shop", ("broker", 5673, "shop", "me", "p@ss")),
        ("amqp://me@broker", ("broker", 5672, "/", "me", "")),
        ("amqp://[::1]:5674", ("::1", 5674, "/", "guest", "guest")),
        ("amqps://broker", ("broker", 5671, "/", "guest", "guest")),
        ("amqps://broker:443", ("broker", 443, "/", "guest", "guest")),
    ],
)
def test_a_url_names_a_connection(text: str, expected: tuple[object, ...]) -> None:
    url = parse_url(text)

    (parameters,) = connection_parameters(url, options_in(url), purpose="testing")

    credentials = parameters.credentials
    assert (parameters.host, parameters.port, parameters.virtual_host) == expected[:3]
    assert (credentials.username, credentials.password) == expected[3:]  # type: ignore[union-attr]


def test_several_hosts_are_several_connections_to_try() -> None:
    url = parse_url("amqp://me:pw@a,b:5673,[::1]:5674/shop")

    found = connection_parameters(url, options_in(url), purpose="testing")

    assert [(one.host, one.port, one.virtual_host) for one in found] == [
        ("a", 5672, "shop"),
        ("b", 5673, "shop"),
        ("::1", 5674, "shop"),
    ]


def test_times_are_passed_on() -> None:
    url = parse_url("amqp://broker/?heartbeat=7&timeout=3.5")

    (parameters,) = connection_parameters(url, options_in(url), purpose="testing")

    assert parameters.heartbeat == 7
    assert parameters.socket_timeout == parameters.stack_timeout == 3.5
    assert parameters.blocked_connection_timeout is None


def test_every_option_is_read() -> None:
    options = options_in(
        parse_url(
            "amqps://broker/?prefix=test-&queue_type=classic&heartbeat=5&timeout=9&consumer_timeout=60&queue_expires=30"
            "&cafile=/ca.pem&certfile=/cert.pem&keyfile=/key.pem&verify=false&server_hostname=mq.example"
        )
    )

    assert options == RabbitMQOptions(
        prefix="test-",
        queue_type="classic",
        heartbeat=5,
        timeout=9.0,
        consumer_timeout=60.0,
        queue_expires=30.0,
        cafile="/ca.pem",
        certfile="/cert.pem",
        keyfile="/key.pem",
        verify=False,
        server_hostname="mq.example",
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("amqp://h/?heartbaet=5", "no option 'heartbaet'"),
        ("amqp://h/?queue_type=stream", "does not fit"),
        ("amqp://h/?heartbeat=0", "heartbeat"),
        ("amqp://h/?heartbeat=1.5", "does not fit"),
        ("amqp://h/?timeout=0", "timeout"),
        ("amqp://h/?timeout=nan", "timeout"),
        ("amqp://h/?consumer_timeout=0", "consumer_timeout"),
        ("amqp://h/?queue_expires=0.5", "queue_expires"),
        ("amqp://h/?queue_expires=9999999", "49 days"),
        ("amqp://h/?prefix=a%0Ab", "printable"),
        (f"amqp://h/?prefix={'p' * 101}", "at most 100"),
        ("amqp://h/?cafile=/ca.pem&verify=false", "cafile, verify is for TLS; write amqps://"),
        ("amqps://h/?keyfile=/key.pem", "give both"),
    ],
)
def test_what_cannot_work_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        options_in(parse_url(text.replace("amqp://h", "amqp://me:hidden@h")))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("amqp+pool://h/", "no variant 'pool'"),
        (f"amqp://h/{'v' * 256}", "at most 255 bytes"),
        ("amqps://h/?cafile=/no/such/file.pem", "cafile=/no/such/file.pem"),
        ("amqps://h/?certfile=/no/such/file.pem", "certfile=/no/such/file.pem"),
    ],
)
def test_a_connection_that_cannot_be_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parameters_of(text)


def test_no_complaint_holds_the_password() -> None:
    with pytest.raises(ConfigurationError) as raised:
        parameters_of("amqps://me:hidden@h/?cafile=/no/such/file.pem")

    assert "hidden" not in str(raised.value)


def test_tls_checks_the_certificate_and_the_name() -> None:
    url = parse_url("amqps://a,b/")

    found = connection_parameters(url, options_in(url), purpose="testing")

    for parameters, name in zip(found, ("a", "b"), strict=True):
        assert parameters.ssl_options is not None
        assert parameters.ssl_options.server_hostname == name
        assert parameters.ssl_options.context.verify_mode is ssl.CERT_REQUIRED
        assert parameters.ssl_options.context.check_hostname


def test_the_name_in_the_certificate_can_be_another() -> None:
    url = parse_url("amqps://10.0.0.1/?server_hostname=mq.example")

    (parameters,) = connection_parameters(url, options_in(url), purpose="testing")

    assert parameters.ssl_options is not None
    assert parameters.ssl_options.server_hostname == "mq.example"


def test_the_certificate_is_not_looked_at_where_the_url_says_so() -> None:
    url = parse_url("amqps://broker/?verify=false")

    (parameters,) = connection_parameters(url, options_in(url), purpose="testing")

    assert parameters.ssl_options is not None
    assert parameters.ssl_options.context.verify_mode is ssl.CERT_NONE


def test_a_key_with_a_passphrase_is_refused_and_asks_nobody(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:word", "-subj", "/CN=x"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
        timeout=30,
    )

    with pytest.raises(ConfigurationError, match="a key with a passphrase is not supported"):
        parameters_of(f"amqps://broker/?certfile={certificate}&keyfile={key}")


def test_an_operator_reads_who_is_connected() -> None:
    properties = client_properties("publishing")

    assert properties["product"] == "ekiden"
    assert properties["version"]
    assert "publishing" in properties["connection_name"]
    assert str(os.getpid()) in properties["connection_name"]
