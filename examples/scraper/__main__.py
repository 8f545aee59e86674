"""``python -m examples.scraper``: the same as ``ekiden demo``."""

from .command import demo

if __name__ == "__main__":
    demo(prog_name="python -m examples.scraper")
