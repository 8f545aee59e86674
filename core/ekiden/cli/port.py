"""``ekiden port``: what a project that uses Celery has to change."""

from __future__ import annotations

import os
import sys
from itertools import groupby
from pathlib import Path

import click

from ekiden.cli.output import Styled, json_option, plural, print_json, say

_COLOURS = {"stays": "green", "becomes": "yellow", "missing": "red"}


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--write", is_flag=True, help="Rewrite imports, and lines that run the command.")
@click.option("--all", "every", is_flag=True, help="Show what stays as it is, too.")
@json_option
def port(path: Path, write: bool, every: bool, as_json: bool) -> None:
    """Say what of a project that uses Celery stays, what becomes what, and what is missing and why.

    \b
    ekiden port .
    ekiden port . --write                                 rewrite imports and commands
    ekiden port shop/settings.py --all

    PATH is a directory or a file: Python modules, and scripts and service files that run the command. Nothing of it is
    run or imported. The exit status is 1 if something is missing.
    """
    from ekiden.porting.reading import Fate, count, files_below, findings_in, is_command_file

    findings, written = [], []
    for file in files_below(path):
        shown = os.path.relpath(file)
        found = findings_in(file, shown)
        findings += found
        if write and any(each.fate is Fate.BECOMES for each in found) and _rewrite(file, is_command_file(file)):
            written.append(shown)
    counted = count(findings)
    if as_json:
        print_json({"findings": findings, "counts": counted, "written": written})
    else:
        chosen = [each for each in findings if every or each.fate is not Fate.STAYS]
        for name, group in groupby(chosen, key=lambda each: each.file):
            say(Styled(name, bold=True))
            for each in group:
                fate = Styled(f"{each.fate:7}", fg=_COLOURS[each.fate])
                say(f"  {each.line:5}  ", fate, f"  {each.what}: {each.text}")
        say(", ".join(f"{number} {fate}" for fate, number in counted.items()) + ".")
        if write:
            say(f"{plural(len(written), 'file')} rewritten.")
    if counted[Fate.MISSING]:
        sys.exit(1)


def _rewrite(file: Path, is_script: bool) -> bool:
    """Rewrite one file where something changes; its line endings and all other bytes stay."""
    from ekiden.porting.rewriting import rewritten_commands, rewritten_python

    with file.open(encoding="utf-8", newline="") as opened:
        text = opened.read()
    new = rewritten_commands(text) if is_script else rewritten_python(text)
    if new == text:
        return False
    with file.open("w", encoding="utf-8", newline="") as opened:
        opened.write(new)
    return True
