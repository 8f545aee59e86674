"""``python -m ekiden``: the same as the ``ekiden`` command."""

from ekiden.cli import main

if __name__ == "__main__":
    main()
