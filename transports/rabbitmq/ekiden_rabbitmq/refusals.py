"""What the server, pika, TLS and the network say, in one sentence each, and as the class that tells whose move it is.

``refusal`` takes any error that pika hands to a callback, or that reading a socket raises. The other functions are for
what comes as no error: a nack, a deadline, an alarm. ``server`` is the URL without its password (``str(url)``).

pika wraps errors in errors, and at some places only their text survives: then reply codes are read from it.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator

import msgspec
import pika.exceptions
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed, AMQPConnectorPhaseErrorBase

from ekiden_rabbitmq.wire import NotAMQP

UNAVAILABLE, REFUSED = BrokerUnavailable, BrokerRefused

Told = tuple[type[BrokerUnavailable] | type[BrokerRefused], str]
"""Whose move it is, and the sentence."""


class Rule(msgspec.Struct, frozen=True):
    """``code`` and ``pattern`` (searched in the server's text) of an answer, and what it is told as.

    ``sentence`` is a format of the pattern's groups.
    """

    code: int
    pattern: str
    kind: type[BrokerUnavailable] | type[BrokerRefused]
    sentence: str


RULES = (
    # 311 in the specification; servers answer 406.
    Rule(311, r"(?P<text>.*)", REFUSED, "the message is too large for this server ({text})"),
    Rule(
        406,
        r"message size (?P<size>\d+) is larger than configured max size (?P<most>\d+)",
        REFUSED,
        "the message is too large: {size} bytes, and this server takes {most} (its setting max_message_size)",
    ),
    Rule(313, r"(?P<text>.*)", UNAVAILABLE, "nobody consumes there now ({text})"),
    Rule(
        320,
        r"(?P<text>.*)",
        UNAVAILABLE,
        "the server closed the connection, because an operator closed it or the server stops ({text})",
    ),
    Rule(402, r"(?P<text>.*)", REFUSED, "the virtual host does not exist ({text})"),
    Rule(
        403,
        r"Login was refused|login refused",
        REFUSED,
        "the server does not know this user name and password (and the user guest may connect from the server's own "
        "machine only)",
    ),
    Rule(
        403,
        r"access to exchange 'amq\.default' in vhost '(?P<vhost>.*)' refused for user '(?P<user>.*)'",
        REFUSED,
        "the user {user} may not publish to queues of the virtual host {vhost}: the pattern of the write right must "
        "match amq.default too",
    ),
    Rule(
        403,
        r"access to (?P<kind>\w+) '(?P<name>.*)' in vhost '(?P<vhost>.*)' refused for user '(?P<user>.*)'",
        REFUSED,
        "the user {user} has not the {right}right on the {kind} {name} of the virtual host {vhost}; "
        "rabbitmqctl set_permissions gives it",
    ),
    Rule(
        403,
        r"(?P<kind>\w+) name '(?P<name>.*)' contains reserved prefix",
        REFUSED,
        "{kind} names that begin with amq. are the server's own: {name}",
    ),
    Rule(403, r"(?P<text>.*)", REFUSED, "the server does not permit it ({text})"),
    Rule(
        404,
        r"no (?P<kind>\w+) '(?P<name>.*)' in vhost '(?P<vhost>.*)'",
        UNAVAILABLE,
        "there is no {kind} {name} in the virtual host {vhost} any more",
    ),
    Rule(
        404,
        r"(?P<text>.*(?:down|unavailable|not available|stopped).*)",
        UNAVAILABLE,
        "the queue is there, but the server that holds it is not ({text})",
    ),
    Rule(404, r"(?P<text>.*)", UNAVAILABLE, "the server does not find it ({text})"),
    Rule(
        405,
        r"locked queue '(?P<name>.*)' in vhost '(?P<vhost>.*?)'",
        UNAVAILABLE,
        "the queue {name} belongs to another connection alone (it was declared as exclusive)",
    ),
    Rule(405, r"(?P<text>.*)", UNAVAILABLE, "another connection uses it alone ({text})"),
    Rule(
        406,
        r"inequivalent arg '(?P<argument>.*?)' for (?P<kind>\w+) '(?P<name>.*)' in vhost '(?P<vhost>.*?)'"
        r": (?P<text>.*)",
        REFUSED,
        "the {kind} {name} of the virtual host {vhost} was declared by somebody else with another {argument} ({text})",
    ),
    Rule(
        406,
        r"delivery acknowledgement on channel \d+ timed out. Timeout value used: (?P<timeout>\d+) ms",
        UNAVAILABLE,
        "the server took a delivery back, because it was held for longer than its consumer_timeout of {timeout} ms; "
        "raise that setting at the server",
    ),
    # 4.3 says "-1 ms" where the delivery's subscription had been cancelled before.
    Rule(
        406,
        r"delivery acknowledgement on channel \d+ timed out",
        UNAVAILABLE,
        "the server took a delivery back, because it was held for longer than its consumer_timeout; raise that setting "
        "at the server",
    ),
    Rule(406, r"(?P<text>.*)", REFUSED, "the server does not take it in this form ({text})"),
    Rule(501, r"(?P<text>.*)", UNAVAILABLE, "the server could not read what it was sent ({text})"),
    Rule(502, r"(?P<text>.*)", REFUSED, "the server could not read what it was sent ({text})"),
    Rule(503, r"(?P<text>.*)", UNAVAILABLE, "the server did not expect what it was sent ({text})"),
    Rule(504, r"(?P<text>.*)", UNAVAILABLE, "the server has no such channel ({text})"),
    Rule(505, r"(?P<text>.*)", UNAVAILABLE, "the server did not expect what it was sent ({text})"),
    Rule(506, r"(?P<text>.*)", UNAVAILABLE, "the server has not the resources for it now ({text})"),
    Rule(
        530,
        r"vhost '?(?P<vhost>.*?)'? not found",
        REFUSED,
        "there is no virtual host {vhost}; rabbitmqctl add_vhost makes one",
    ),
    Rule(
        530,
        r"(?P<text>.*': .*(?:connection limit|is down|not running).*)",
        UNAVAILABLE,
        "the server takes no more connections to this virtual host now ({text})",
    ),
    Rule(
        530,
        r"access to vhost '(?P<vhost>.*)' refused for user '(?P<user>.*)'",
        REFUSED,
        "the user {user} has no rights in the virtual host {vhost}; rabbitmqctl set_permissions gives them",
    ),
    Rule(530, r"(?P<text>.*)", REFUSED, "the server does not allow it ({text})"),
    Rule(540, r"(?P<text>.*)", REFUSED, "this server cannot do that ({text})"),
    Rule(541, r"(?P<text>.*)", UNAVAILABLE, "the server had an error of its own, which its log tells ({text})"),
)
"""The first rule that fits holds."""

_CODE_IN_TEXT = re.compile(r"\((\d{3})\) (\\*[\"'])(.*)\2", re.DOTALL)


def refusal(error: BaseException, server: str, *, doing: str = "", right: str = "") -> TransportError:
    """``error`` as what a user sees; raise it ``from error``.

    ``doing``: what was tried, such as "publishing to the queue shop". ``right``: what that takes
    of a user's rights: configure, write or read. An error of ekiden's own comes back as it is.
    """
    if isinstance(error, TransportError):
        return error
    beginning = f"{server}: {doing}: " if doing else f"{server}: "
    for cause in _causes(error):
        if isinstance(cause, pika.exceptions.ConnectionClosed | pika.exceptions.ChannelClosed):
            return closed(cause.reply_code, cause.reply_text, server, doing=doing, right=right)
        found = _told(cause)
        if found is not None:
            kind, sentence = found
            return kind(f"{beginning}{sentence}.")
    return BrokerUnavailable(f"{beginning}{type(error).__name__}: {error}.")


def closed(reply_code: int, reply_text: str, server: str, *, doing: str = "", right: str = "") -> TransportError:
    """A channel or connection that the server closed with this code and text, as what a user sees."""
    kind, sentence = _answered(reply_code, reply_text, right)
    beginning = f"{server}: {doing}: " if doing else f"{server}: "
    return kind(f"{beginning}{sentence}.")


def nacked(server: str, queue: str) -> BrokerUnavailable:
    """The server answered a message with a nack: it has not stored it."""
    return BrokerUnavailable(
        f"{server}: the server did not store the message: the queue {queue} is full and refuses more, or too few "
        "servers of its cluster are up."
    )


def too_late(server: str, seconds: float, *, doing: str) -> BrokerUnavailable:
    """The deadline of a call passed without an answer."""
    return BrokerUnavailable(f"{server}: {doing}: no answer within {seconds:g} s.")


def blocked(server: str, reason: str, seconds: float, *, doing: str) -> BrokerUnavailable:
    """The deadline of a call passed while the server had blocked the connection for ``reason`` ("low on memory")."""
    return BrokerUnavailable(
        f"{server}: {doing}: the server takes no messages now, because it is {reason or 'short of something'}; gave up "
        f"after {seconds:g} s."
    )


def missing_queue(server: str, queue: str) -> BrokerUnavailable:
    """A queue was deleted again and again while it was used."""
    return BrokerUnavailable(f"{server}: the queue {queue} was deleted while it was used.")


class Difference(msgspec.Struct, frozen=True):
    """The first ``argument`` in which a queue or exchange is other than it was to be, and the server's words for it."""

    argument: str
    text: str


def difference(reply_text: str) -> Difference:
    """What the server named when it refused a declaration because of an inequivalent argument."""
    found = re.search(r"inequivalent arg '(.*?)' for .*?': (.*)", reply_text, re.DOTALL)
    return Difference(found[1], found[2]) if found else Difference("declaration", reply_text)


def _answered(reply_code: int, reply_text: str, right: str) -> Told:
    text = reply_text.partition(" - ")[2] or reply_text
    for rule in RULES:
        match = rule.code == reply_code and re.search(rule.pattern, text, re.DOTALL)
        if match:
            return rule.kind, rule.sentence.format(**match.groupdict(), right=f"{right} " if right else "")
    return BrokerUnavailable, f"the server answered {reply_code} ({text})"


def _told(error: BaseException) -> Told | None:
    """What an error means that is no answer of the server; None: look at what it was caused by."""
    if isinstance(error, OSError):
        return _of_the_network(error)
    match error:
        case pika.exceptions.AMQPHeartbeatTimeout():
            return UNAVAILABLE, "the server was silent for longer than two heartbeats, and was given up"
        case pika.exceptions.ConnectionBlockedTimeout():
            return UNAVAILABLE, "the server takes no messages now, because it is short of memory or disk space"
        case pika.exceptions.ConsumerCancelled():
            return UNAVAILABLE, "the queue was deleted, or moved to another server, while it was consumed"
        case NotAMQP():
            return UNAVAILABLE, "what is at this address does not speak AMQP 0-9-1"
        case pika.exceptions.IncompatibleProtocolError():
            return _no_amqp(error)
        case (
            pika.exceptions.ProbableAuthenticationError()
            | pika.exceptions.ProbableAccessDeniedError()
            | pika.exceptions.StreamLostError()
        ):
            # The first two are pika's guess: a server that stops just then is told as a wrong password as well.
            code, text = _code_in(error)
            return _answered(code, text, "") if code else (UNAVAILABLE, f"the connection was lost ({_lost(error)})")
        case pika.exceptions.AuthenticationError():
            return REFUSED, "the server does not offer to log in by user name and password (PLAIN)"
        case pika.exceptions.ConnectionOpenAborted():
            return _open_aborted(error)
        case pika.exceptions.ProtocolSyntaxError():
            return REFUSED, "what is at this address does not speak AMQP 0-9-1"
        case _:
            return None


def _of_the_network(error: OSError) -> Told:
    match error:
        case ssl.SSLError():
            return _tls(error)
        case socket.gaierror():
            return UNAVAILABLE, f"this host is not known ({error.strerror})"
        case ConnectionRefusedError():
            return UNAVAILABLE, "no server listens there (connection refused)"
        case TimeoutError():
            return UNAVAILABLE, "no answer: the server, or a firewall before it, is silent"
        case _:
            return UNAVAILABLE, f"the connection failed ({error.strerror or error})"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it wraps, outermost first; of several attempts to connect the last, which failed last."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, AMQPConnectionWorkflowFailed):
            pending += current.exceptions[-1:]
        elif isinstance(current, AMQPConnectorPhaseErrorBase):
            pending.append(current.exception)
        else:
            pending += [wrapped for wrapped in current.args if isinstance(wrapped, BaseException)]
            pending += [wrapped for wrapped in (current.__cause__,) if wrapped is not None]


def _no_amqp(error: BaseException) -> Told:
    if pika.exceptions.StreamLostError.__name__ in str(error):  # pika keeps only its repr
        # A TLS port, or a proxy whose server is away: both just close.
        return UNAVAILABLE, (
            "the connection was closed before a word of AMQP was said; if this is a TLS port, write amqps:// "
            "instead of amqp://"
        )
    return REFUSED, "what is at this address does not speak AMQP 0-9-1"


def _open_aborted(error: BaseException) -> Told:
    if "Timeout while setting up" in str(error):
        return UNAVAILABLE, "what is at this address took the connection and did not speak AMQP in time"
    return UNAVAILABLE, "the connection was given up before it was open"


def _tls(error: ssl.SSLError) -> Told:
    if isinstance(error, ssl.SSLCertVerificationError):
        return REFUSED, (
            f"the server's certificate is not accepted ({error.verify_message.rstrip('.')}); cafile= names who signed "
            "it, server_hostname= the name that it must carry"
        )
    reason = str(getattr(error, "reason", None) or "")  # OpenSSL's name for the code
    if reason == "WRONG_VERSION_NUMBER":
        return REFUSED, "this port does not speak TLS: write amqp:// instead of amqps://, or name the TLS port (5671)"
    if reason.endswith(("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE")):
        return REFUSED, f"the server wants a certificate of this client: certfile= and keyfile= name it ({reason})"
    return UNAVAILABLE, f"TLS failed ({reason or error})"


def _code_in(error: BaseException) -> tuple[int, str]:
    """The reply code and text in what pika made of an error; (0, "") when there are none."""
    found = _CODE_IN_TEXT.search(" ".join(map(str, error.args)))
    return (int(found[1]), found[3].replace("\\", "")) if found else (0, "")


def _lost(error: BaseException) -> str:
    """``Stream connection lost: ConnectionResetError(104, 'Connection reset by peer')``, without its wrapping."""
    text = " ".join(map(str, error.args))
    return text.partition("Stream connection lost: ")[2] or text
