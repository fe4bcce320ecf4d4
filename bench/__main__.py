"""Time what this project is made of, compare two runs, and make plots and tables of them.

`python -m bench COMMAND --help` says more.

Examples:
  python -m bench ops swiglu,adaln --quick                   two ops on this CPU
  python -m bench ops --out bench/results/mine               every op, some ten minutes
  python -m bench report bench/results/mine                  plots and tables of it
  python -m bench compare bench/results/zen4_2_cores bench/results/mine
  python -m bench gpu --out output/gpu --minutes 9           all that needs a GPU
"""

from __future__ import annotations

import importlib
import sys

from bench import parser
from mfmjt.errors import MfmjtError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "ops": ("bench.run", "every op on a CPU, against plain PyTorch and torch.compile"),
    "step": ("bench.networks.step", "a training step, against flow matching"),
    "generate": ("bench.networks.generate", "one guided step, and from a video to sound"),
    "tangent": ("bench.networks.tangent", "what a tangent costs the whole network"),
    "lsd": ("bench.networks.lsd", "gradients of tangents: LSD against its own formula"),
    "trainers": ("bench.networks.trainers", "trainers of others, with our tangents inside"),
    "memory": ("bench.networks.memory", "what a training step keeps, counted"),
    "curves": ("bench.networks.curves", "do our ops train as plain PyTorch does?"),
    "mmaudio": ("bench.networks.mmaudio", "MMAudio's encoders and vocoder"),
    "store": ("bench.store", "reading and writing of extracted features"),
    "parts": ("bench.parts", "codec, text encoder and classifier of a model, alone"),
    "copying": ("bench.copying", "training recordings in what a network makes"),
    "serve": ("bench.serve", "the web server under load and under faults"),
    "aot": ("bench.aot", "Triton kernels compiled for GPUs that are not there"),
    "totals": ("bench.cost.totals", "what a training step and others take on sm_90, modelled"),
    "launches": ("bench.launches", "kernels that a guided step launches, counted"),
    "build": ("bench.build", "compile time and size of the C++ extension"),
    "report": ("bench.report", "plots and tables of a folder of results"),
    "compare": ("bench.compare", "what became slower between two folders of results"),
    "gpu": ("bench.gpu.drive", "all that needs a GPU, in ten minutes"),
    "precompile": ("bench.gpu.precompile", "the GPU's kernels, compiled without a GPU"),
}
"""Module and purpose of each command. The module has `main(argv)`, which returns its status."""


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    usage = parser("COMMAND", __doc__)
    usage.prog, width = "python -m bench", max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    usage.description = "\n".join([usage.description or "", "commands:", *lines])
    usage.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    command = usage.parse_args(argv[:1]).command
    try:
        # Only what is asked for is imported: the parent of a GPU's pieces does without PyTorch.
        status: int = importlib.import_module(COMMANDS[command][0]).main(argv[1:])
    except MfmjtError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        sys.stderr.write("Error: pandas is not installed: tables need it. Install mfmjt[bench].\n")
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
