"""What an ``amqp://`` or ``amqps://`` URL may say, and the connections that it names."""

from __future__ import annotations

import os
import platform
import ssl
from typing import Any, Literal

import ekiden
import msgspec
import pika
from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL, Host

PLAIN_PORT, TLS_PORT = 5672, 5671
LONGEST_PREFIX = 100
LONGEST_EXPIRY_SECONDS = 49 * 24 * 3600.0
"""Below the 2**32 milliseconds that every version of the server takes."""

_SHORT_STRING_BYTES = 255
_TLS_OPTIONS = ("cafile", "certfile", "keyfile", "verify", "server_hostname")


class RabbitMQOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of an ``amqp://`` or ``amqps://`` URL.

    ``prefix``: put before the name of every queue and exchange that is not shared by the whole virtual host.
    ``queue_type``: the type of the queues that ekiden makes: ``quorum`` (the default where the server has them, 3.8
    and newer) or ``classic``. A queue that exists is used as it is.
    ``heartbeat``: seconds; a peer that is silent is given up after three times as long at most. ``timeout``: after so
    many seconds every call ends, with an answer or an error. ``consumer_timeout``: the setting of that name at the
    server, in seconds: it takes a delivery back after so long; ekiden cannot ask for it, and warns about tasks that
    may run on. ``queue_expires``: queues that ekiden makes vanish, with their messages, after so many seconds without
    a consumer.
    ``cafile``, ``certfile``, ``keyfile``, ``verify`` and ``server_hostname`` are for ``amqps://``: who signed the
    server's certificate (the system's authorities if not given), this client's certificate and its key, whether the
    server's certificate is looked at, and the name that it must carry (the URL's host if not given).
    """

    prefix: str = ""
    queue_type: Literal["quorum", "classic"] | None = None
    heartbeat: int = 20
    timeout: float = 30.0
    consumer_timeout: float = 1800.0
    queue_expires: float | None = None
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    server_hostname: str | None = None


def options_in(url: BrokerURL) -> RabbitMQOptions:
    """The options of ``url``. Raises ConfigurationError for one that does not exist, or whose value does not fit."""
    options = url.options_as(RabbitMQOptions)
    if len(options.prefix) > LONGEST_PREFIX or not options.prefix.isprintable():
        raise ConfigurationError(f"{url}: a prefix has at most {LONGEST_PREFIX} printable characters.")
    if not 1 <= options.heartbeat <= 3600:
        raise ConfigurationError(f"{url}: heartbeat is a number of seconds, 1 to 3600.")
    if not 0.1 <= options.timeout <= 3600:  # NaN fails as well, here and below
        raise ConfigurationError(f"{url}: timeout is a number of seconds, 0.1 to 3600.")
    if not options.consumer_timeout > 0:
        raise ConfigurationError(f"{url}: consumer_timeout is a number of seconds above 0.")
    if options.queue_expires is not None and not 1 <= options.queue_expires <= LONGEST_EXPIRY_SECONDS:
        raise ConfigurationError(
            f"{url}: queue_expires is a number of seconds, 1 to {LONGEST_EXPIRY_SECONDS:.0f} (49 days)."
        )
    if url.scheme != "amqps":
        given = [name for name in _TLS_OPTIONS if name in url.options]
        if given:
            # amqp://host?cafile=... instead of amqps://
            raise ConfigurationError(f"{url}: {', '.join(given)} is for TLS; write amqps:// instead of amqp://.")
    if options.keyfile and not options.certfile:
        raise ConfigurationError(f"{url}: keyfile is the key of a certfile; give both.")
    return options


def connection_parameters(url: BrokerURL, options: RabbitMQOptions, *, purpose: str) -> list[pika.ConnectionParameters]:
    """How to connect to each host of ``url``, in the URL's order; try them in an order of your own, shuffled.

    ``purpose`` ("publishing", "consuming") stands in the connection's name, which the server shows to operators.
    Reads the certificate files. Raises ConfigurationError for what is wrong with the URL.
    """
    if url.variant:
        raise ConfigurationError(f"{url}: there is no variant {url.variant!r} of {url.scheme}://.")
    virtual_host = url.path or "/"
    username = "guest" if url.username is None else url.username
    password = "guest" if url.username is None and url.password is None else url.password or ""
    if len(virtual_host.encode()) > _SHORT_STRING_BYTES:
        raise ConfigurationError(f"{url}: a virtual host's name has at most {_SHORT_STRING_BYTES} bytes.")
    context = _tls_context(url, options) if url.scheme == "amqps" else None
    properties = client_properties(purpose)
    return [
        pika.ConnectionParameters(
            host=host.name,
            port=host.port or (PLAIN_PORT if context is None else TLS_PORT),
            virtual_host=virtual_host,
            credentials=pika.PlainCredentials(username, password),
            heartbeat=options.heartbeat,
            socket_timeout=options.timeout,
            stack_timeout=options.timeout,
            # A blocked connection is noticed by the deadline of each call; closing it would only lose what it holds.
            blocked_connection_timeout=None,
            connection_attempts=1,
            retry_delay=0,
            client_properties=properties,
            ssl_options=None if context is None else pika.SSLOptions(context, options.server_hostname or host.name),
        )
        for host in url.hosts or (Host("localhost"),)
    ]


def client_properties(purpose: str) -> dict[str, Any]:
    """What the server's operator reads of this connection: who, which version, which process, what for."""
    return {
        "product": "ekiden",
        "version": ekiden.__version__,
        "platform": f"{platform.python_implementation()} {platform.python_version()}, pika {pika.__version__}",
        "information": "ekiden-rabbitmq",
        "connection_name": f"ekiden {purpose} (process {os.getpid()} on {platform.node()})",
    }


def _tls_context(url: BrokerURL, options: RabbitMQOptions) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.cafile)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"{url}: no certificates can be read from cafile={options.cafile}: {error}."
        ) from error
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if options.certfile:
        try:
            # Without a password function, a key with a passphrase would ask for it on the terminal.
            context.load_cert_chain(options.certfile, options.keyfile, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(
                f"{url}: the certificate and key of certfile={options.certfile}, keyfile={options.keyfile} cannot be "
                f"read: {error}; a key with a passphrase is not supported."
            ) from error
    return context
