"""`python -m mfmjt.train STAGE RECIPE [key=value ...]`: training where only torch is installed."""

from __future__ import annotations

import argparse
import sys

from mfmjt.errors import MfmjtError
from mfmjt.train.stages import STAGES, run


def main() -> int:
    """Run one stage and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mfmjt.train", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", help="a JSON file, or the name of a recipe that ships: nano")
    parser.add_argument("override", nargs="*", help="settings to change, such as steps=100")
    given = parser.parse_args()
    try:
        sys.stdout.write(run(given.stage, given.recipe, given.override) + "\n")
    except MfmjtError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
