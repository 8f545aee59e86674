"""What an operator should change at a Redis server: what could lose what we keep there, or stop it from taking more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ekiden_redis.client import Client

_OLDEST = (6, 2)
_NEARLY_FULL = 0.9
_SETTINGS = ("maxmemory-policy", "appendonly", "appendfsync", "save", "min-replicas-to-write")


def warnings_about(client: Client, kept: str) -> list[str]:
    """One sentence for each thing that should be different. Raises what the client raises, but for forbidden questions.

    ``kept``: what we keep there, in the plural. In a cluster or with Sentinels it is about the server that answers now.
    """
    where = client.place
    try:
        info = _info(client.command(b"INFO"))
    except client.errors.refused as error:
        return [f"{where}: what it is set up like cannot be told, because this user may not send INFO: {error}"]
    try:
        settings = _settings(client)
    except client.errors.refused:
        settings = {}
    found = list(_of_version(info))
    if settings:
        found += [*_of_persistence(settings, kept), *_of_replication(info, settings, kept)]
    else:
        found.append(
            "this user may not send CONFIG GET, so persistence could not be looked at; permit it with ACL SETUSER"
        )
    return [f"{where}: {sentence}." for sentence in [*found, *_of_memory(info, kept)]]


def _of_version(info: Mapping[str, str]) -> Iterator[str]:
    # Valkey says 7.2.4 there, for those who look no further.
    version = info.get("redis_version", "")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < _OLDEST:
        yield f"Redis {version} is too old: use 6.2 or newer, or Valkey"


def _of_memory(info: Mapping[str, str], kept: str) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    if policy != "noeviction":
        when = "when it is full" if limit else "as soon as somebody sets maxmemory"
        yield f"maxmemory-policy is {policy}, so it deletes {kept} {when}: set it to noeviction"
    if limit and used > _NEARLY_FULL * limit:
        yield (
            f"it is nearly full: {used // 2**20} of {limit // 2**20} MiB; when maxmemory is reached it takes no "
            f"{kept}: drain it, or raise maxmemory"
        )


def _of_persistence(settings: Mapping[str, str], kept: str) -> Iterator[str]:
    if settings.get("appendonly") != "yes":
        if settings.get("save"):
            yield (
                "it saves snapshots only (RDB), so a crash loses all that came since the last one: "
                "set appendonly to yes"
            )
        else:
            yield f"it keeps nothing on disk, so a restart loses all {kept}: set appendonly to yes"
    elif settings.get("appendfsync") == "no":
        yield (
            "appendfsync is no, so a power failure loses what the system had not written by itself: "
            "set it to everysec, or to always"
        )
    elif settings.get("appendfsync") == "everysec":
        yield (
            "appendfsync is everysec, so a power failure loses up to the last two seconds: "
            "set it to always if that is too much"
        )


def _of_replication(info: Mapping[str, str], settings: Mapping[str, str], kept: str) -> Iterator[str]:
    if int(info.get("connected_slaves", 0)) and settings.get("min-replicas-to-write", "0") == "0":
        yield (
            f"it has replicas and does not wait for them, so a master that is cut off takes {kept} that are lost when "
            "another becomes the master: set min-replicas-to-write to 1"
        )


def _info(text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode("utf-8", "replace").splitlines())
    return {name: value.strip() for name, _, value in lines}


def _settings(client: Client) -> dict[str, str]:
    settings: dict[str, str] = {}
    for name in _SETTINGS:
        reply = client.command(b"CONFIG", b"GET", name)
        settings |= {key.decode(): value.decode() for key, value in zip(reply[::2], reply[1::2], strict=True)}
    return settings
