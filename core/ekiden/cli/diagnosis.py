"""``ekiden transports``, ``ekiden explain`` and ``ekiden doctor``."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from ekiden import plugins
from ekiden.cli.output import json_option, print_fields, print_json
from ekiden.errors import ConfigurationError
from ekiden.urls import BrokerURL


@click.command()
@json_option
def transports(as_json: bool) -> None:
    """The brokers that ekiden can talk to here, and what each promises.

    \b
    ekiden transports

    Every installed transport is listed, whoever wrote it. Times are in seconds.
    """
    found = described_transports()
    if as_json:
        print_json(found)
        return
    for number, transport in enumerate(found):
        click.echo("\n" * (number > 0) + click.style(f"{transport['scheme']}://", bold=True, fg="green"))
        print_fields({name: value for name, value in transport.items() if name != "scheme"})


def described_transports() -> list[dict[str, Any]]:
    """What each installed transport says of itself, by scheme; of one that cannot be loaded, why."""
    return [{"scheme": scheme, **_described(scheme)} for scheme in plugins.installed(plugins.TRANSPORTS)]


def _described(scheme: str) -> dict[str, Any]:
    try:
        kind = plugins.transport_class(BrokerURL(f"{scheme}://", scheme))
    except ConfigurationError as error:
        return {"error": str(error)}
    fields = msgspec.structs.asdict(kind.description)
    options = fields.pop("options")
    fields["options"] = {} if options is None else {each.name: each.default for each in msgspec.structs.fields(options)}
    return {**fields, "implemented_by": f"{kind.__module__}.{kind.__qualname__}"}
