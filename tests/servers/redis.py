"""Redis (or Valkey) servers of a test's own: one, a pair under Sentinel, a cluster of three."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from tests.servers.certificates import Certificates
from tests.servers.processes import HOST, CannotStart, ServerProcess, find_program, free_port

SLOTS = 16_384
HEALTHY_WITHIN = 60.0


def redis_program() -> str | None:
    """The server that is installed here, if any is."""
    return find_program("redis-server", "valkey-server")


class RedisServer(ServerProcess):
    """One server on a port of its own.

    ``append_only``: every write is on the disk before it is answered (``appendfsync always``); otherwise nothing is
    kept. ``options`` are settings of redis.conf, by name. ``certificates``: it speaks TLS, and nothing else.
    """

    def __init__(
        self,
        directory: Path,
        *,
        append_only: bool = False,
        password: str | None = None,
        certificates: Certificates | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        program = redis_program()
        if program is None:
            raise CannotStart("redis-server is not installed: apt-get install redis-server")
        self.port = free_port()
        self.password = password
        self.certificates = certificates
        self.socket_path = directory / "redis.sock"
        settings = {
            "bind": HOST,
            "port": str(self.port),
            "unixsocket": str(self.socket_path),
            "dir": str(directory),
            "save": "",
            "appendonly": "yes" if append_only else "no",
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
            **({"requirepass": password} if password else {}),
            **(_tls_settings(self.port, certificates) if certificates else {}),
            **(options or {}),
        }
        command = [program]
        for name, value in settings.items():
            command += [f"--{name}", value]
        super().__init__(f"redis-{self.port}", command, directory, is_ready=self._answers)

    @property
    def url(self) -> str:
        """Where it is; with its password, if it has one."""
        return self.url_as(None, self.password)

    def url_as(self, username: str | None, password: str | None) -> str:
        """The same, for another user."""
        credentials = f"{quote(username or '')}:{quote(password, safe='')}@" if password else ""
        if self.certificates is None:
            return f"redis://{credentials}{HOST}:{self.port}/0"
        return f"rediss://{credentials}{HOST}:{self.port}/0"

    def client(self) -> redis.Redis:
        """A connection for the test itself; close it, or use it in a ``with`` block."""
        tls = {"ssl": True, "ssl_ca_certs": str(self.certificates.authority)} if self.certificates else {}
        return redis.Redis(HOST, self.port, password=self.password, socket_timeout=10.0, **tls)  # type: ignore[arg-type]

    def _answers(self) -> bool:
        return redis_answers(self.client())


def _tls_settings(port: int, certificates: Certificates) -> dict[str, str]:
    return {
        "port": "0",
        "tls-port": str(port),
        "tls-cert-file": str(certificates.server),
        "tls-key-file": str(certificates.server_key),
        "tls-ca-cert-file": str(certificates.authority),
        "tls-auth-clients": "optional",
    }


def redis_answers(client: redis.Redis) -> bool:
    """Whether the server behind ``client`` answers and has loaded its data. Closes ``client``."""
    try:
        return bool(client.ping())
    except (AuthenticationError, NoPermissionError):
        return True
    except RedisError:
        return False
    finally:
        client.close()


class RedisUnderSentinel:
    """A primary, a replica of it, and three sentinels who make the replica the primary when the primary is away."""

    SERVICE = "tasks"

    def __init__(self, directory: Path) -> None:
        self.nodes = [RedisServer(directory / f"node-{number}") for number in range(2)]
        self.sentinels = [_Sentinel(directory / f"sentinel-{number}", self.nodes[0].port) for number in range(3)]

    @property
    def url(self) -> str:
        """All sentinels, and the name of the service."""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.SERVICE}/0"

    def start(self) -> None:
        """Start all five, and wait until the replica follows and every sentinel knows everybody."""
        primary, replica = self.nodes
        for node in self.nodes:
            node.start()
        with replica.client() as client:
            client.replicaof(HOST, primary.port)
        _wait(lambda: self.replicas_of(primary) == 1, "the replica follows")
        for sentinel in self.sentinels:  # only now: they ask for the replicas at once, and then every ten seconds
            sentinel.start()
        _wait(self._know_each_other, "the sentinels know the replica and each other")

    def kill(self) -> None:
        """End all five."""
        for each in self.sentinels + self.nodes:
            each.kill()

    def primary(self) -> RedisServer:
        """The node that all sentinels say is the primary now. Raises RedisError while they do not agree."""
        ports = set()
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                _, port = client.sentinel_get_master_addr_by_name(self.SERVICE)
                ports.add(int(port))
        found = [node for node in self.nodes if {node.port} == ports]
        if not found:
            raise RedisError(f"the sentinels do not agree: {ports}")
        return found[0]

    def replicas_of(self, node: RedisServer) -> int:
        """How many replicas follow ``node`` and have everything."""
        with node.client() as client:
            replication = client.info("replication")
        followers = [value for name, value in replication.items() if name.startswith("slave") and name[5:].isdigit()]
        return sum(follower["state"] == "online" for follower in followers)

    def wait_until_replicated(self) -> None:
        """Wait until the replica has everything that the primary has at this moment."""
        _wait(self._has_replicated, "the replica has everything")

    def fail_over(self) -> RedisServer:
        """Kill the primary, wait until the other node is the primary, and return the killed one."""
        killed = self.primary()
        killed.kill()
        _wait(lambda: self.primary() is not killed, "the replica is the primary")
        _wait(lambda: _role(self.primary()) == "master", "the new primary knows that it is")
        return killed

    def wait_until_followed(self) -> None:
        """Wait until all sentinels say the same, and a replica follows the primary and has everything."""
        _wait(lambda: self.replicas_of(self.primary()) == 1, "a replica follows the primary")

    def _has_replicated(self) -> bool:
        with self.primary().client() as client:
            client.set("replicated until here", "1")  # WAIT is about this connection's own writes and all before them
            return bool(client.wait(1, 10_000) == 1)

    def _know_each_other(self) -> bool:
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                state = client.sentinel_master(self.SERVICE)
            if (state["num-slaves"], state["num-other-sentinels"]) != (1, 2):
                return False
        return True


class _Sentinel(ServerProcess):
    def __init__(self, directory: Path, primary_port: int) -> None:
        program = redis_program()
        if program is None:
            raise CannotStart("redis-server is not installed: apt-get install redis-server")
        self.port = free_port()
        directory.mkdir(parents=True, exist_ok=True)
        configuration = directory / "sentinel.conf"  # it writes to this file what it learns
        configuration.write_text(
            f"bind {HOST}\n"
            f"port {self.port}\n"
            f"dir {directory}\n"
            f"sentinel monitor {RedisUnderSentinel.SERVICE} {HOST} {primary_port} 2\n"
            f"sentinel down-after-milliseconds {RedisUnderSentinel.SERVICE} 2500\n"
            f"sentinel failover-timeout {RedisUnderSentinel.SERVICE} 5000\n"
        )
        command = [program, str(configuration), "--sentinel"]
        super().__init__(f"sentinel-{self.port}", command, directory, is_ready=lambda: redis_answers(self.client()))

    def client(self) -> redis.Redis:
        return redis.Redis(HOST, self.port, socket_timeout=10.0, decode_responses=True)


class RedisClusterOfThree:
    """Three primaries that share the slots, without replicas."""

    def __init__(self, directory: Path) -> None:
        options = {"cluster-enabled": "yes", "cluster-node-timeout": "5000"}
        self.nodes = [RedisServer(directory / f"node-{number}", options=options) for number in range(3)]

    @property
    def url(self) -> str:
        """All nodes."""
        return "redis+cluster://" + ",".join(f"{HOST}:{node.port}" for node in self.nodes)

    def start(self) -> None:
        """Start all three, share the slots among them, and wait until each sees the cluster as a whole."""
        for node in self.nodes:
            node.start()
        bounds = [SLOTS * number // 3 for number in range(4)]
        for number, node in enumerate(self.nodes):
            with node.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                client.execute_command("CLUSTER MEET", HOST, self.nodes[0].port)
        _wait(lambda: all(_cluster_is_whole(node) for node in self.nodes), "the cluster is whole")

    def kill(self) -> None:
        """End all three."""
        for node in self.nodes:
            node.kill()


def _cluster_is_whole(node: RedisServer) -> bool:
    with node.client() as client:
        state = client.execute_command("CLUSTER INFO")
    text = state if isinstance(state, str) else str(state)
    return "'cluster_state': 'ok'" in text and "'cluster_known_nodes': '3'" in text


def _role(node: RedisServer) -> str:
    with node.client() as client:
        return str(client.info("replication")["role"])


def _wait(look: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + HEALTHY_WITHIN
    while True:
        trouble: RedisError | None = None
        try:
            if look():
                return
        except RedisError as error:  # a node that is just being started, or has just been killed
            trouble = error
        if time.monotonic() > give_up:
            raise CannotStart(f"not within {HEALTHY_WITHIN:g} s: {what}") from trouble
        time.sleep(0.05)
