"""`python -m ilajax` says what runs where; `python -m ilajax check` checks the kernels on this machine."""

import argparse
import sys

from ilajax import check
from ilajax.ffi import backend


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m ilajax", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser(
        "check", help="compare every kernel with its reference here; a GPU that passes gets a stamp"
    ).add_argument(
        "--limit", type=float, default=check.LIMIT, metavar="S", help="seconds (%(default)g)"
    )
    options = parser.parse_args(arguments)
    if options.command == "check":
        return check.supervise(options.limit)
    print(backend())
    return 0


if __name__ == "__main__":
    sys.exit(main())
