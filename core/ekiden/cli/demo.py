"""``ekiden demo``: the scraper of examples/scraper, which is installed as ``ekiden.demo``."""

from __future__ import annotations

import click

from ekiden.errors import ConfigurationError


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def demo(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Crawl a site: a worker, retries, a rate limit, time limits, all on this machine."""
    try:
        from ekiden.demo import command  # it needs what only the extra installs
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the demo needs {error.name}, which is not installed: pip install 'ekiden[demo]'."
        ) from error
    command.demo.main(args=list(arguments), prog_name=ctx.command_path, standalone_mode=False)
