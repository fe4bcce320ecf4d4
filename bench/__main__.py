"""`python -m bench gpu --out DIR`: check, time and train on a GPU, within a time limit."""

from __future__ import annotations

import argparse
import sys

from bench import gpu
from mfmjt.errors import MfmjtError


def main() -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "gpu", description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--out", required=True, help="folder of the results, small files only")
    command.add_argument("--work", help="folder of features and training states [OUT/work]")
    command.add_argument("--part", choices=(*gpu.PARTS, "all"), default="all")
    command.add_argument("--minutes", type=float, default=9.0, help="stop after so long [9]")
    command.add_argument("--device", default="cuda")
    command.add_argument("--smoke", action="store_true", help="everything tiny")
    command.add_argument("override", nargs="*", help="settings of the training, such as lr=1e-3")
    try:
        return gpu.main(parser.parse_args())
    except MfmjtError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
