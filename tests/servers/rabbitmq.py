"""RabbitMQ servers of a test's own: one node, or a cluster of three on this machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pika
from ekiden.message import Depth
from pika import frame, spec
from pika.amqp_object import Method
from pika.exceptions import AMQPError

from tests.servers.certificates import Certificates
from tests.servers.processes import HOST, CannotStart, ServerProcess, answers, find_program, free_port

# Debian's /usr/sbin/rabbitmq-server changes the user, and with it who may read what; the scripts behind it do not.
_SCRIPTS = ("/usr/lib/rabbitmq/bin",)

# Of a server that the operating system allows 1024 open files, some hundred queues leave none for connections.
IDLE_QUEUES_GO_AFTER_SECONDS = {"^test-": 30, "^long-": 300}

DEAD_LETTERED_AGAIN_MS = 3000
"""What a level of delay hands on and is not confirmed, it hands on again after so long; by default it takes minutes."""


def rabbitmq_program() -> str | None:
    """The server that is installed here, if one is."""
    return find_program("rabbitmq-server", also_in=_SCRIPTS)


class RabbitMQServer(ServerProcess):
    """One node on ports of its own, with its own port mapper, cookie, files and name.

    ``settings`` are lines of rabbitmq.conf. ``certificates``: it speaks TLS, and nothing else. To start one takes five
    seconds on a machine that does nothing else, so a test that does it no harm shares it with others.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Mapping[str, str] | None = None,
        certificates: Certificates | None = None,
        port_mapper: PortMapper | None = None,
    ) -> None:
        program = rabbitmq_program()
        if program is None:
            raise CannotStart("rabbitmq-server is not installed: apt-get install rabbitmq-server")
        self.port = free_port()
        self.certificates = certificates
        self.node = f"ekiden-{self.port}@localhost"
        self._own_port_mapper = PortMapper(directory / "epmd") if port_mapper is None else None
        mapper = port_mapper or self._own_port_mapper
        assert mapper is not None
        directory.mkdir(parents=True, exist_ok=True)
        listener = "listeners.ssl" if certificates else "listeners.tcp"
        lines = {
            f"{listener}.own": f"{HOST}:{self.port}",
            **(_tls_settings(certificates) if certificates else {}),
            "disk_free_limit.absolute": "10MB",
            **(settings or {}),
        }
        (directory / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in lines.items()))
        (directory / "enabled_plugins").write_text("[].")
        (directory / "rabbitmq-env.conf").write_text("")
        environment = {
            **mapper.variables(),
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_IP_ADDRESS": HOST,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_BASE": str(directory),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "generated"),
            # With these two the script becomes the server, instead of waiting for it: signals reach it by its id.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-noinput +S 1:1 -kernel inet_dist_use_interface {127,0,0,1} "
                f"-rabbit dead_letter_worker_publisher_confirm_timeout {DEAD_LETTERED_AGAIN_MS}"
            ),
        }
        super().__init__(f"rabbitmq-{self.port}", [program], directory, is_ready=self._answers, environment=environment)

    @property
    def url(self) -> str:
        """Where it is, for the user that every new server has."""
        return self.url_as("guest", "guest")

    def url_as(self, username: str, password: str, *, vhost: str = "/") -> str:
        """The same, for another user or virtual host."""
        scheme = "amqps" if self.certificates else "amqp"
        return f"{scheme}://{quote(username)}:{quote(password, safe='')}@{HOST}:{self.port}/{quote(vhost, safe='')}"

    def launch(self) -> None:
        """Start it, and its port mapper, without waiting until it answers."""
        if self._own_port_mapper is not None and not self._own_port_mapper.is_up:
            self._own_port_mapper.start()
        super().launch()

    def ctl(self, *arguments: str) -> str:
        """What ``rabbitmqctl`` says about this node; it must succeed. Takes a second or two."""
        return run_ctl(ctl_command(), *arguments, environment=self.environment)

    def remembers_all_quorum_queues(self) -> bool:
        """Whether every quorum queue there is now would be found again after a ``kill -9``.

        The server writes the list of them every half second. One that is not in it when the server is killed is there
        afterwards, and answers nobody any more. (Of the queues whose names have letters and signs that need no quotes.)
        """
        rows = json.loads(self.ctl("--quiet", "--formatter=json", "list_queues", "name", "type"))
        written = (self.directory / "mnesia" / self.node / "quorum" / self.node / "names.dets").read_bytes()
        return all(row["name"].encode() in written for row in rows if row["type"] == "quorum")

    def kill(self) -> None:
        """``kill -9``, and the same for its port mapper, which ``start`` starts again."""
        super().kill()
        if self._own_port_mapper is not None:
            self._own_port_mapper.kill()

    def _answers(self) -> bool:
        # It listens only when all is loaded and recovered; over TLS, that is the answer.
        return answers(HOST, self.port) and (self.certificates is not None or rabbitmq_answers(self.url))


def _tls_settings(certificates: Certificates) -> dict[str, str]:
    return {
        "listeners.tcp": "none",
        "ssl_options.cacertfile": str(certificates.authority),
        "ssl_options.certfile": str(certificates.server),
        "ssl_options.keyfile": str(certificates.server_key),
        "ssl_options.verify": "verify_peer",
        "ssl_options.fail_if_no_peer_cert": "false",
    }


class PortMapper(ServerProcess):
    """Erlang's epmd, which tells nodes each other's ports, and the cookie that nodes and ``rabbitmqctl`` share.

    It is not the machine's own: that one would be started by our first node and outlive it.
    """

    def __init__(self, directory: Path) -> None:
        program = find_program("epmd")
        if program is None:
            raise CannotStart("Erlang's epmd is not installed: apt-get install rabbitmq-server")
        self.port = free_port()
        command = [program, "-port", str(self.port), "-address", HOST]
        super().__init__(f"epmd-{self.port}", command, directory, is_ready=lambda: answers(HOST, self.port))
        cookie = directory / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text("EKIDENTESTS")
            cookie.chmod(0o400)

    def variables(self) -> dict[str, str]:
        """What makes an Erlang program use it."""
        return {"HOME": str(self.directory), "ERL_EPMD_PORT": str(self.port), "ERL_EPMD_ADDRESS": HOST}


class RabbitMQClusterOfThree:
    """Three nodes that are one broker."""

    def __init__(self, directory: Path) -> None:
        self._port_mapper = PortMapper(directory / "epmd")
        self.nodes = [RabbitMQServer(directory / f"node-{n}", port_mapper=self._port_mapper) for n in range(3)]

    @property
    def url(self) -> str:
        """All nodes."""
        hosts = ",".join(f"{HOST}:{node.port}" for node in self.nodes)
        return f"amqp://guest:guest@{hosts}/%2F"

    def start(self) -> None:
        """Start all three, and join the second and the third to the first."""
        self._port_mapper.start()
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()
        first, *others = self.nodes
        for node in others:
            node.ctl("stop_app")
            node.ctl("join_cluster", first.node)
            node.ctl("start_app")
            node.wait_until_ready()

    def kill(self) -> None:
        """End all three."""
        for node in self.nodes:
            node.kill()
        self._port_mapper.kill()

    def leader_of(self, queue: str) -> RabbitMQServer:
        """The node that leads a quorum queue, or holds a classic one; asked of a node that runs."""
        asked = next(node for node in self.nodes if node.is_up)
        rows = json.loads(asked.ctl("--formatter=json", "-q", "list_queues", "name", "leader", "pid"))
        (row,) = [row for row in rows if row["name"] == queue]
        return next(node for node in self.nodes if node.node == row["leader"] or node.node in str(row["pid"]))

    def move_leader_of(self, queue: str, *, not_to: RabbitMQServer) -> None:
        """Have another node lead a quorum queue. All nodes are up; ``not_to`` one that may not have caught up yet."""
        said = self.nodes[0].ctl("eval", _MOVE_LEADER_IN_ERLANG % (_binary(queue), not_to.node))
        if said.strip() != "ok":
            raise CannotStart(f"the leader of {queue} stays where it is: {said.strip()}")


class VirtualHost:
    """A virtual host of the tests' own at a server, where tests' queues that nobody uses go away by themselves.

    ``ctl``: the command that is this server's ``rabbitmqctl``. Everything here takes about a second.
    """

    def __init__(self, name: str, ctl: list[str], *, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._ctl = ctl
        self._environment = environment

    def create(self, username: str) -> None:
        """Make it, and let ``username`` do everything there."""
        self._run("add_vhost", self.name)
        self._run("set_permissions", "-p", self.name, username, ".*", ".*", ".*")
        for names, seconds in IDLE_QUEUES_GO_AFTER_SECONDS.items():
            policy = json.dumps({"expires": seconds * 1000})
            self._run("set_policy", "-p", self.name, "--apply-to", "queues", f"idle queues {names}", names, policy)

    def delete(self) -> None:
        """Delete it, with everything in it."""
        self._run("delete_vhost", self.name)

    def depth(self, queue: str) -> Depth:
        """What is in a queue at this moment, in all its bands, by the server's own word; an AMQP client cannot know.

        ``queue`` with its prefix. What is delayed is counted for the whole virtual host.
        """
        counts = self._run("eval", _COUNT % (_binary(self.name), _binary(queue), _binary(f"{queue}.priority.")))
        ready, delayed, leased = (int(number) for number in re.findall(r"\d+", counts))
        return Depth(ready, delayed, leased)

    def _run(self, *arguments: str) -> str:
        return run_ctl(self._ctl, "--quiet", *arguments, environment=self._environment)


_MOVE_LEADER_IN_ERLANG = """
    {ok, Queue} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, %s)),
    {Member, Leader} = amqqueue:get_pid(Queue),
    Nodes = case maps:get(nodes, amqqueue:get_type_state(Queue)) of
        ByNode when is_map(ByNode) -> maps:keys(ByNode);
        List -> List
    end,
    [Next] = Nodes -- [Leader, '%s'],
    ra:transfer_leadership({Member, Leader}, {Member, Next}).
"""

# rabbitmqctl list_queues tells of quorum queues what was true up to five seconds ago; this asks their leaders.
_COUNT_IN_ERLANG = """
    Count = fun(Q) ->
        case amqqueue:get_type(Q) of
            rabbit_quorum_queue ->
                {ok, {_, Now}, _} = ra:leader_query(amqqueue:get_pid(Q), {rabbit_fifo, overview, []}),
                {maps:get(num_ready_messages, Now), maps:get(num_checked_out, Now)};
            _ ->
                [{_, Ready}, {_, Held}] = rabbit_amqqueue:info(Q, [messages_ready, messages_unacknowledged]),
                {Ready, Held}
        end
    end,
    Begins = fun(Beginning, Name) -> binary:longest_common_prefix([Beginning, Name]) =:= byte_size(Beginning) end,
    lists:foldl(
        fun(Q, {Ready, Delayed, Leased}) ->
            Name = element(4, amqqueue:get_name(Q)),
            Ours = Name =:= Queue orelse Begins(Bands, Name),
            case {Ours, Begins(<<"ekiden.delay.">>, Name)} of
                {true, _} -> {R, L} = Count(Q), {Ready + R, Delayed, Leased + L};
                {_, true} -> {R, L} = Count(Q), {Ready, Delayed + R + L, Leased};
                _ -> {Ready, Delayed, Leased}
            end
        end,
        {0, 0, 0},
        rabbit_amqqueue:list(Host)
    ).
"""
_COUNT = "Host = %s, Queue = %s, Bands = %s, " + " ".join(_COUNT_IN_ERLANG.split())


def _binary(text: str) -> str:
    """``text`` as Erlang writes bytes."""
    return f"<<{','.join(str(byte) for byte in text.encode())}>>"


def ctl_command() -> list[str]:
    """The ``rabbitmqctl`` that speaks to a node of our own: it runs as we do."""
    program = find_program("rabbitmqctl", also_in=_SCRIPTS)
    assert program is not None, "rabbitmqctl is installed with rabbitmq-server"
    return [program]


def run_ctl(command: list[str], *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """What a ``rabbitmqctl`` says. Raises CannotStart with what it complains about."""
    finished = subprocess.run(
        [*command, *arguments],
        env=dict(environment) if environment is not None else dict(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if finished.returncode:
        raise CannotStart(
            f"rabbitmqctl {' '.join(arguments)[:100]}: {finished.stderr.strip() or finished.stdout.strip()}"
        )
    return finished.stdout


def rabbitmq_answers(url: str) -> bool:
    """Whether a RabbitMQ is there that lets the user of the URL in.

    The greetings are exchanged here, over a socket of ours: pika's blocking connection leaves that of a failed attempt
    to the garbage collector.
    """
    parameters = pika.URLParameters(url)
    address = (parameters.host, parameters.port)
    try:
        with socket.create_connection(address, timeout=5.0) as connection:
            if parameters.ssl_options is None:
                return _lets_in(connection, parameters)
            with parameters.ssl_options.context.wrap_socket(
                connection, server_hostname=parameters.ssl_options.server_hostname
            ) as encrypted:
                return _lets_in(encrypted, parameters)
    except (AMQPError, OSError):
        return False


def _lets_in(connection: socket.socket, parameters: pika.URLParameters) -> bool:
    """Whether the server opens the virtual host for the user. Raises OSError when it hangs up instead."""
    buffer = bytearray()

    def send(method: Method) -> None:
        connection.sendall(frame.Method(0, method).marshal())

    def receive(kind: type[Method]) -> Any:
        """What comes next, if it is of this kind."""
        while True:
            used, found = frame.decode_frame(bytes(buffer))
            if found is not None:
                del buffer[:used]
                return found.method if isinstance(found.method, kind) else None
            received = connection.recv(65_536)
            if not received:
                raise ConnectionError("it hung up")
            buffer.extend(received)

    credentials = parameters.credentials
    connection.sendall(frame.ProtocolHeader().marshal())
    if receive(spec.Connection.Start) is None:
        return False
    proof = f"\0{credentials.username}\0{credentials.password}"
    send(spec.Connection.StartOk({}, mechanism="PLAIN", response=proof, locale="en_US"))
    tuned = receive(spec.Connection.Tune)
    if tuned is None:
        return False
    send(spec.Connection.TuneOk(tuned.channel_max, tuned.frame_max, heartbeat=0))
    send(spec.Connection.Open(parameters.virtual_host))
    opened = receive(spec.Connection.OpenOk) is not None
    if opened:
        send(spec.Connection.Close(200, "thank you", 0, 0))
        receive(spec.Connection.CloseOk)
    return opened
