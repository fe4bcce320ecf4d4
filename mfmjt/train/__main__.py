"""`python -m mfmjt.train STAGE RECIPE [key=value ...]`: `mfmjt train` for torchrun.

`torchrun --nproc-per-node N -m mfmjt.train STAGE RECIPE ...` shares a stage among N processes, on
any number of machines: the network's batches, or the clips whose features are computed. STAGE is
codec, teacher, text, encoders, features, network or classifier; RECIPE a JSON file, or the name of
one that ships.
"""

import sys

from mfmjt.errors import InputError, MfmjtError
from mfmjt.processes import rank_and_world
from mfmjt.train.stages import run


def main(arguments: list[str]) -> int:
    """Run one stage and return the exit status."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(__doc__)
        return 0
    who = ""
    try:
        rank, _ = rank_and_world()
        who = f"[process {rank}] " if rank else ""
        if len(arguments) < 2:
            raise InputError("A stage and a recipe are needed. See python -m mfmjt.train --help.")
        stage, recipe, *overrides = arguments
        done = run(stage, recipe, overrides)
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
    sys.exit(main(sys.argv[1:]))
