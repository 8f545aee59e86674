"""The ``ekiden`` command, also as ``python -m ekiden``."""

import sys

from ekiden.starting import started_ahead


def main() -> None:
    """The entry point."""
    spare = started_ahead(sys.argv[1:])
    try:
        from ekiden.cli import ekiden  # while the worker process starts

        ekiden(prog_name="ekiden", obj=spare)
    finally:
        if spare is not None:
            spare.end()


if __name__ == "__main__":
    main()
