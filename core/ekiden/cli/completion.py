"""``ekiden completion``: has a shell complete commands, options, apps, tasks and queues."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

COMPLETE_VARIABLE = "_EKIDEN_COMPLETE"
"""The shell asks the command for completions through this variable; the name is click's."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options, apps, tasks and queues.

    \b
    eval "$(ekiden completion bash)"                      in ~/.bashrc
    eval "$(ekiden completion zsh)"                       in ~/.zshrc
    ekiden completion fish > ~/.config/fish/completions/ekiden.fish

    Apps are found in the Python files below the current directory. To complete tasks and queues, the shell has the
    command import the app that you have named.
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows these three shells"
    click.echo(kind(ctx.find_root().command, {}, "ekiden", COMPLETE_VARIABLE).source())
