"""`python -m mfmjt.train STAGE RECIPE [key=value ...]`: training where only torch is installed.

`torchrun --nproc-per-node N -m mfmjt.train STAGE RECIPE ...` shares a stage among N processes, on
any number of machines: the network's batches, or the clips whose features are computed.
"""

from __future__ import annotations

import argparse
import sys

from mfmjt.errors import InputError, MfmjtError
from mfmjt.processes import rank_and_world
from mfmjt.train.stages import STAGES, run

SHARED = ("features", "network")


def main() -> int:
    """Run one stage and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mfmjt.train", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("recipe", help="a JSON file, or the name of a recipe that ships: nano")
    parser.add_argument("override", nargs="*", help="settings to change, such as steps=100")
    given = parser.parse_args()
    who = ""
    try:
        rank, world = rank_and_world()
        who = f"[process {rank}] " if rank else ""
        if world > 1 and given.stage not in SHARED:
            raise InputError(
                f"The stage {given.stage} is made by one process, not {world}. Start it without "
                f"torchrun; it is {' and '.join(SHARED)} that are shared."
            )
        done = run(given.stage, given.recipe, given.override)
        if rank == 0:
            sys.stdout.write(done + "\n")
    except MfmjtError as error:
        sys.stderr.write(f"{who}Error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
