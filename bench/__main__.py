"""Time what this project is made of, compare two runs, and make plots and tables of them."""

from __future__ import annotations

import argparse
import importlib
import sys

from mfmjt.errors import MfmjtError

COMMANDS = {
    "gpu": "bench.gpu.drive",
    "precompile": "bench.gpu.precompile",
    "cpu": "bench.cpu",
    "report": "bench.report",
    "compare": "bench.compare",
}


def main() -> int:
    """Parse the command line and run; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    # Only what is asked for is imported: the parent of a GPU's pieces does without PyTorch.
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    for name in [asked] if asked in COMMANDS else COMMANDS:
        module = importlib.import_module(COMMANDS[name])
        about, _, examples = (module.__doc__ or "").partition("Examples:")
        command = commands.add_parser(
            name,
            help=about.partition("\n")[0],
            description=about,
            epilog=f"examples:{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    given = parser.parse_args()
    try:
        status: int = given.run(given)
    except MfmjtError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    return status


if __name__ == "__main__":
    sys.exit(main())
